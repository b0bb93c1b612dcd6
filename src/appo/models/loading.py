"""Checkpoints: a folder or a hub id becomes a model and its processor; LoRA adapters are merged into their base."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import cached_file, logging
from transformers.utils.peft_utils import find_adapter_config_file

from appo.models.families import use_pretrained_positions
from appo.models.names import source_of

_CHECKPOINT_FILES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".py")
_WHOLE, _PIECE, _PIECES = 1 << 24, 1 << 16, 64  # bytes: files up to 16 MB are read whole, of larger ones 64 pieces
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_ADAPTER, _ADAPTER_PICKLE = "adapter_model.safetensors", "adapter_model.bin"
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
        OSError, ValueError: there is no such checkpoint, it is none of a video language model, or its weights are
            pickles; one line.
    """
    source = source_of(source)
    _assert_safetensors(source)
    if not sys.stderr.isatty():  # bars are for terminals: in a log they bury the line that says what is wrong
        logging.disable_progress_bar()
    settings = {"trust_remote_code": trust_remote_code}
    kwargs = {"use_safetensors": True, **kwargs}
    if find_adapter_config_file(source) is None:
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, **settings, **kwargs)
        place, revision = source, None
    else:
        base, revision = _base_of(source)
        _assert_safetensors(base)
        kwargs = {"revision": revision, **kwargs}
        model = _merged(AutoModelForImageTextToText.from_pretrained(base, dtype=dtype, **settings, **kwargs), source)
        own = any(_has_file(source, name) for name in _PROCESSOR_FILES)
        place, revision = (source, None) if own else (base, revision)
    processor = AutoProcessor.from_pretrained(place, revision=revision, padding_side="left", **settings)
    return use_pretrained_positions(model), processor


def _assert_safetensors(source: str) -> None:
    """Weights are read from safetensors only: loading a pickle can run code, also of a model without remote code.

    Raises:
        ValueError: a folder, or an adapter's repository, has its weights as pickles only.
    """
    if Path(source).is_dir():
        names = {path.name for path in Path(source).iterdir()}
    else:  # of whole models transformers sees to it itself
        names = {name for name in (_ADAPTER, _ADAPTER_PICKLE) if _has_file(source, name)}
    pickles = sorted(name for name in names if Path(name).suffix in _PICKLES and name != "training_args.bin")
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise ValueError(
            f"{source}: its weights are a pickle ({pickles[0]}), which can run code when it is loaded; where you trust "
            "it, load and save it once with transformers 5 or PEFT (save_pretrained), which writes safetensors"
        )


def usual_dtype() -> str:
    """Of weights that are not trained: bfloat16 on a GPU, else float32."""
    return "bfloat16" if torch.cuda.is_available() else "float32"


def usual_place() -> dict[str, Any]:
    """Where weights that are not trained go, for ``from_pretrained``: over the GPUs there are, else the CPU."""
    return {"device_map": "auto"} if torch.cuda.is_available() else {}


def fingerprint(source: str | os.PathLike[str]) -> str:
    """Which checkpoint this is: of a folder a digest of its files, of a hub id the commit; of an adapter both models'.

    Of large files 64 pieces spread over the whole are read: training changes all weights, and reading
    gigabytes takes minutes.

    Raises:
        OSError: there is no such checkpoint.
    """
    source = source_of(source)
    base = "" if find_adapter_config_file(source) is None else f" on {fingerprint(_base_of(source)[0])}"
    if not Path(source).is_dir():
        file = cached_file(source, "adapter_config.json" if base else "config.json")
        return f"commit {Path(str(file)).parent.name}{base}"
    digest = hashlib.sha256()
    for file in sorted(Path(source).iterdir()):
        if file.is_file() and file.suffix in _CHECKPOINT_FILES:
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            for piece in _pieces(file):
                digest.update(piece)
    return f"files {digest.hexdigest()[:16]}{base}"


def _pieces(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    with file.open("rb") as handle:
        if size <= _WHOLE:
            yield handle.read()
            return
        for piece in range(_PIECES):
            handle.seek((size - _PIECE) * piece // (_PIECES - 1))
            yield handle.read(_PIECE)


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
    return source_of(str(base)), config.revision


def _merged(model: Any, adapter: str) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def _has_file(source: str, name: str) -> bool:
    return cached_file(source, name, _raise_exceptions_for_missing_entries=False) is not None
