"""What `appo train` refuses before it loads libraries: unknown settings, impossible values, rewards, paths.

A mistake is answered in a second or two, and before anything is written. What only the libraries can check is checked
when they are loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from appo.data import read_each, response_format_of
from appo.data.files import exists, is_url
from appo.models.names import SPOTLIGHT, checkpoint_of
from appo.reports.jsonl import check_unused
from appo.rewards.functions import PAPER_REWARDS, reward_functions
from appo.training.atomic_checkpoint import LAST, resumable
from appo.training.setting_rules import check_texts, meant, setting_flags
from appo.world.world import dials_of

# Two real steps of a few short responses on one core; a flag of the command line wins.
_STEPS = {
    "max_steps": "2", "num_generations": "2", "per_device_train_batch_size": "2", "gradient_accumulation_steps": "2",
    "max_completion_length": "16", "logging_steps": "1", "save_strategy": "no", "report_to": "none", "use_cpu": "true",
    "bf16": "false", "use_vllm": "false", "optim": "adamw_torch", "model_init_kwargs": "{}", "disable_tqdm": "true",
}  # fmt: skip
# Model and data, which no flag changes.
REPLACED: dict[str, Any] = {
    "model": SPOTLIGHT, "dataset": SPOTLIGHT, "annotations": None, "videos": None, "split": None, "clips": 8,
    "video_min_pixels": None, "video_max_pixels": None, "image_max_pixels": None,
    "load_in_4bit": False, "load_in_8bit": False,
}  # fmt: skip
_OWN_FLAGS = ("--config", "--tiny", "--help")
# Settings of TRL's own scripts that have another name here.
_RENAMED = {"reward_funcs": "`rewards`, a list of names or of module:function"}


def check_start(arguments: Sequence[str], config: str | None = None, *, tiny: bool = False) -> None:
    """Refuse what is known to be wrong with the settings of a run.

    Args:
        arguments: what stands behind ``appo train``, without ``--config`` and ``--tiny``.
        config: the YAML file of settings.
        tiny: they are those of a dry run.

    Raises:
        ValueError: an unknown or impossible setting, or a reward that cannot be had; named, with the fix.
        OSError: a file or folder that is not there or, to be written into, not empty.
    """
    if tiny:
        shrunk(arguments)
    flags = setting_flags()
    given = {**_of_file(config, flags), **dict(_of_flags(arguments, flags))}
    if tiny:
        given = {name: value for name, value in given.items() if name not in REPLACED}
    check_texts(given)
    if given.get("method") != "sft":
        reward_functions(given.get("rewards", list(PAPER_REWARDS)))
    check_data(given)
    checkpoint_of(str(given.get("model") or SPOTLIGHT))
    # Of several processes the first one has the run folder, and says what is wrong with it.
    if given.get("output_dir") and os.environ.get("RANK", "0") == "0":
        _check_folder(Path(given["output_dir"]), str(given.get("resume_from_checkpoint") or "false"))


def check_data(settings: Mapping[str, Any]) -> None:
    """Refuse rows that cannot be had. Nothing of a dataset is read yet.

    Args:
        settings: those of :class:`appo.training.arguments.TrainScript`, by name; what is missing has its default.

    Raises:
        ValueError: dataset, split, format or level is unknown, or they do not go together.
        OSError: the annotations or the folder of videos is not there.
    """
    dataset, split = settings.get("dataset") or SPOTLIGHT, settings.get("split")
    annotations, videos = settings.get("annotations"), settings.get("videos")
    if annotations is not None:
        read_each(dataset, annotations, videos, split)  # checks the names; reads when iterated
        _check_there("annotations", annotations)
        if videos is not None:
            _check_there("videos", videos)
    elif dataset != SPOTLIGHT:
        raise ValueError(f"dataset {dataset} is read from files: set `annotations` (and `videos`)")
    elif videos is not None or split is not None:
        raise ValueError(
            "`videos` and `split` are about a dataset's files: set `annotations` as well, or leave them out"
        )
    else:
        dials_of(settings.get("level") or "L1")
    response_format_of(dataset, settings.get("response_format"))


def _check_there(setting: str, path: str) -> None:
    if not is_url(path) and not exists(path):
        raise FileNotFoundError(f"{setting} {path}: there is no such file or folder; correct the path")


def _check_folder(folder: Path, resume: str) -> None:
    """Refuse a run folder that is used, or a checkpoint that cannot be gone on from."""
    if resume.lower() == "false":
        check_unused(folder)
    elif resume.lower() not in LAST:
        resumable(Path(resume), folder)


# -- what is given -----------------------------------------------------------------------------------------------------


def _of_file(path: str | None, flags: Mapping[str, str] | None) -> dict[str, Any]:
    """The settings of a YAML file by name; ``env``, which sets the environment, is none."""
    if path is None:
        return {}
    with open(path, encoding="utf-8") as file:
        settings = yaml.safe_load(file)
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: holds no settings; write `name: value` lines, as in recipes/spotlight.yaml")
    settings.pop("env", None)
    names = None if flags is None else set(flags.values())
    for name in settings:
        if names is not None and name not in names:
            near = meant(str(name), names)
            raise ValueError(f"{path}: there is no setting `{name}`; {_instead(str(name), near and f'`{near}`')}")
    return settings


def _of_flags(arguments: Sequence[str], flags: Mapping[str, str] | None) -> Iterator[tuple[str, Any]]:
    """Each flag's setting and value, as text or texts."""
    if arguments and not arguments[0].startswith("-"):
        raise ValueError(f"{arguments[0]!r} stands behind no flag; a file of settings is given as --config FILE")
    starts = [place for place, word in enumerate(arguments) if _is_flag(word)]
    for start, end in pairwise([*starts, len(arguments)]):
        flag, has_value, value = arguments[start].partition("=")
        values = [*([value] if has_value else []), *arguments[start + 1 : end]]
        if flags is not None and flag not in flags:
            near = meant(flag, [*flags, *_OWN_FLAGS])
            raise ValueError(f"there is no setting {flag}; {_instead(flag[2:].replace('-', '_'), near)}")
        name = flag[2:].replace("-", "_") if flags is None else flags[flag]
        if name == "rewards" or len(values) > 1:
            yield name, values
        else:
            yield name, values[0] if values else str(not flag.startswith("--no"))


def _is_flag(word: str) -> bool:
    """Whether argparse takes a word for a flag: a text with a space in it is a value."""
    return word.startswith("--") and " " not in word.partition("=")[0]


def _instead(name: str, near: str) -> str:
    if name in _RENAMED:
        return f"it is TRL's name, write {_RENAMED[name]}"
    return f"did you mean {near}?" if near else "`appo train --help` shows an example"


def shrunk(arguments: Sequence[str]) -> list[str]:
    """The arguments of ``appo train`` behind those of a dry run.

    Raises:
        ValueError: they set what a dry run replaces.
    """
    if clash := [name for name in REPLACED if f"--{name}" in arguments]:
        raise ValueError(f"--tiny sets {clash[0]} itself: leave out --{clash[0]} or --tiny")
    return [*(word for name, value in _STEPS.items() for word in (f"--{name}", value)), *arguments]
