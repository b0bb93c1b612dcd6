"""Checkpoints: a folder or a hub id becomes a model and its processor; LoRA adapters are merged into their base."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

# What tells a processor of pictures and text from a mere tokenizer, which an adapter's folder may hold alone.
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def load_model(
    source: str | os.PathLike[str], *, dtype: str = "float32", trust_remote_code: bool = False, **kwargs: Any
) -> tuple[Any, Any]:
    """A checkpoint's model and processor; the processor pads from the left, as generation needs it.

    A LoRA adapter is loaded onto the base model that its configuration names, and merged into it: the result is an
    ordinary model. Its processor is the adapter's own if it was saved along, else the base's.

    Args:
        source: a Hugging Face folder or hub id, of a whole model or of a PEFT adapter.
        dtype: of the weights; float32 are the master weights TRL trains.
        trust_remote_code: run the code that a checkpoint brings. Never unless asked for.
        kwargs: passed to the model's ``from_pretrained``.

    Raises:
        OSError, ValueError: there is no such checkpoint, or it is none of a video language model; one line.
    """
    source = os.fspath(source)
    if Path(source).is_dir() and not any(Path(source).glob("*config.json")):
        raise FileNotFoundError(f"{source}: no checkpoint (no config.json); give the folder that a model was saved to")
    settings = {"trust_remote_code": trust_remote_code}
    if find_adapter_config_file(source) is None:
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, **settings, **kwargs)
        return model, AutoProcessor.from_pretrained(source, padding_side="left", **settings)
    base, revision = _base_of(source)
    kwargs = {"revision": revision, **kwargs}
    model = _merged(AutoModelForImageTextToText.from_pretrained(base, dtype=dtype, **settings, **kwargs), source)
    own = any(_has_file(source, name) for name in _PROCESSOR_FILES)
    place = (source, None) if own else (base, revision)
    return model, AutoProcessor.from_pretrained(place[0], revision=place[1], padding_side="left", **settings)


def _base_of(adapter: str) -> tuple[str, str | None]:
    """The checkpoint an adapter was trained on, and which revision of it."""
    try:
        from peft import PeftConfig
    except ImportError:
        raise ValueError(f"{adapter} is an adapter: install PEFT to load it (pip install 'appo[peft]')") from None
    config = PeftConfig.from_pretrained(adapter)
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(f"{adapter}: adapter_config.json names no `base_model_name_or_path`; write the base model in")
    return str(base), config.revision


def _merged(model: Any, adapter: str) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def _has_file(source: str, name: str) -> bool:
    return cached_file(source, name, _raise_exceptions_for_missing_entries=False) is not None
