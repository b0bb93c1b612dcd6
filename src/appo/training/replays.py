"""A batch that was not trained on, on disk: its tensors in a safetensors file, the rest and where each goes as JSON.

RUN/replay/step-N/
    policy/                 weights and processor, as they were before the step
    batch-RANK.safetensors  the tensors of the micro-batches of one process
    replay.json             what was not finite, settings of the run, and the micro-batches of each process as a tree
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from appo.training.trainer_state import as_saved, plain

FOLDER, FILE = "replay", "replay.json"
_TENSOR, _TUPLE = "__tensor__", "__tuple__"


class NotFiniteError(ValueError):
    """The loss or the gradient of a step is not finite. One line with the fix; nothing was applied."""


@dataclass(frozen=True)
class Replay:
    """A step that was stopped.

    Attributes:
        folder: where it lies.
        step: optimiser steps done before.
        problem: what was not finite, and in which processes.
        settings: all settings of training.
        dtype: of the weights.
        accumulation: micro-batches in a whole step; those behind the one that was stopped at are not there.
        batches: micro-batches of one process.
    """

    folder: Path
    step: int
    problem: str
    settings: dict[str, Any]
    dtype: str
    accumulation: int
    batches: list[dict[str, Any]]


def write_tensors(folder: Path, rank: int, batches: Sequence[Mapping[str, Any]]) -> Any:
    """Write the tensors of one process; returns the tree that says where each goes."""
    tensors: dict[str, Tensor] = {}
    tree = _tree(plain(list(batches)), tensors)
    save_file(tensors, folder / f"batch-{rank}.safetensors")
    return tree


def write_description(folder: Path, trees: Sequence[Any], **description: Any) -> None:
    """Write the rest: where the tensors of each process go, and the other fields of a `Replay`."""
    data = {**description, "processes": list(trees)}
    (folder / FILE).write_text(json.dumps(data, default=str) + "\n", encoding="utf-8")


def read_replay(run: Path, rank: int = 0) -> Replay:
    """The last step of a run that was stopped.

    Raises:
        OSError, ValueError: there is none, or no such process; one line.
    """
    steps = sorted((run / FOLDER).glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    if not steps:
        raise FileNotFoundError(f"{run}: nothing to replay; {FOLDER}/ is written when a loss or gradient is not finite")
    folder = steps[-1]
    data = json.loads((folder / FILE).read_text(encoding="utf-8"))
    if not 0 <= rank < len(data["processes"]):
        raise ValueError(f"{folder}: there is no process {rank}, choose from 0 to {len(data['processes']) - 1}")
    tensors = load_file(folder / f"batch-{rank}.safetensors")
    batches = as_saved(_untree(data["processes"][rank], tensors))
    names = ("step", "problem", "settings", "dtype", "accumulation")
    return Replay(folder, **{name: data[name] for name in names}, batches=batches)


def _tree(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A plain value with names in the place of its tensors, which are put into `tensors`."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {_TENSOR: name}
    if isinstance(value, dict):
        return {key: _tree(item, tensors) for key, item in value.items()}
    if isinstance(value, tuple):
        return {_TUPLE: [_tree(item, tensors) for item in value]}
    return [_tree(item, tensors) for item in value] if isinstance(value, list) else value


def _untree(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_untree(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(_untree(item, tensors) for item in value[_TUPLE])
    return {key: _untree(item, tensors) for key, item in value.items()}
