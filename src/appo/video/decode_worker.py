"""Videos are opened and decoded in a process of its own: a file that hangs or crashes the decoder costs one sample.

All that a Python process reads this way goes through one such process, one file after another. It loads neither torch
nor the program's main module. Frames come back through shared memory, as pipes are slow on busy machines.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from appo.types import VideoSource
from appo.video.frame_sampling import CorruptVideoError
from appo.video.workers import Helper, Lost

_FIX = "encode it again, or leave its rows out"
Task = tuple[Any, ...]  # a function of a module, and its arguments


@dataclass(frozen=True)
class Raised:
    """What a function raised in the other process."""

    error: Exception


@dataclass(frozen=True)
class Lent:
    """An array that lies in shared memory, to be taken out once."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Decoder:
    """Calls functions about videos elsewhere: a ``Call`` of :func:`appo.video.reader.read_video`.

    Attributes:
        limit: seconds after which a call is given up.
    """

    limit: float

    def __call__(self, function: Callable[..., Any], source: VideoSource, *arguments: Any) -> Any:
        """What the function returns.

        Raises:
            CorruptVideoError: the decoder did not end within the limit, or its process ended, twice.
            Exception: what the function raises.
        """
        task = (function, source, *arguments)
        result = _process().do(task, self.limit)
        # A process may have been ended for reasons of its own: a scheduler tells all of a job to end, not the trainer
        # alone, and a machine short of memory ends what it likes.
        if isinstance(result, Lost) and result.ended:
            result = _process().do(task, self.limit)
        if isinstance(result, Lost):
            raise CorruptVideoError(source.path, f"cannot be decoded ({result.reason})", _FIX)
        if isinstance(result, Raised):
            raise result.error
        return tuple(map(_taken, result)) if isinstance(result, tuple) else result


@cache
def _process() -> Helper[Task, Any]:
    return Helper(_perform)


def _perform(task: Task, allow: Callable[[float], None]) -> Any:
    function, *arguments = task
    try:
        result = function(*arguments)
        return tuple(map(_lent, result)) if isinstance(result, tuple) else result
    except Exception as error:
        return Raised(error)


def _lent(value: Any) -> Any:
    """An array as one in shared memory, if there is room for it; anything else as it is."""
    if not isinstance(value, np.ndarray) or not _fits(value.nbytes):
        return value
    memory = SharedMemory(create=True, size=value.nbytes)
    np.ndarray(value.shape, value.dtype, memory.buf)[...] = value
    memory.close()
    return Lent(memory.name, value.shape, value.dtype.str)


def _fits(size: int) -> bool:
    """Containers often have 64 MB of shared memory, and writing beyond it ends the process. Elsewhere (Windows) it is
    gone once this process lets go of it."""
    shared = Path("/dev/shm")
    return shared.exists() and shutil.disk_usage(shared).free > 2 * size


def _taken(value: Any) -> Any:
    if not isinstance(value, Lent):
        return value
    memory = SharedMemory(value.name)
    try:
        array: npt.NDArray[Any] = np.ndarray(value.shape, value.dtype, memory.buf).copy()
        return array
    finally:
        memory.close()
        memory.unlink()
