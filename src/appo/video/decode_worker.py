"""Tasks in worker processes: one that hangs is ended, one that dies is reported, and all end with their parent.

Decoders of damaged videos do hang and crash. `concurrent.futures` handles neither: it breaks as a whole when one of
its processes dies, and cannot end a task that runs. `Decoder` reads videos this way: all calls of a Python process go
through one worker, which loads neither torch nor the program's main module. Frames return in shared memory, because
pipes are slow on busy machines.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from appo.types import VideoSource
from appo.video.frame_sampling import CorruptVideoError

START_SECONDS = 120.0  # for a new process to import what it needs

Task = TypeVar("Task")
Result = TypeVar("Result")
# A function gets its task and `allow`, which it calls with how many more seconds it may take from now on.
Function = Callable[[Task, Callable[[float], None]], Result]


@dataclass(frozen=True)
class WorkerFailure:
    """Why a task has no result. ``ended``: its process ended, by itself or by a signal."""

    reason: str
    ended: bool = False


def run_tasks(
    function: Function[Task, Result], tasks: Iterable[Task], workers: int, limit: float
) -> Iterator[tuple[Task, Result | WorkerFailure]]:
    """The result of each task, in the order in which they are done.

    Args:
        function: of a module, for the processes import it; it must not raise.
        tasks: taken as workers become free. Tasks and results are pickled.
        workers: processes at the same time.
        limit: seconds for a task, unless it asks for more while it runs.
    """
    idle: list[_Worker] = []
    try:
        yield from _run(function, tasks, workers, limit, idle)
    finally:
        for worker in idle:
            worker.end()


@dataclass(frozen=True)
class Decoder:
    """Calls functions about videos in the worker: a ``Call`` of :func:`appo.video.reader.read_video`."""

    limit: float  # seconds after which a call is given up

    def __call__(self, function: Callable[..., Any], source: VideoSource, *arguments: Any) -> Any:
        """What the function returns.

        Raises:
            CorruptVideoError: the call did not end within the limit, or its process ended, twice.
            Exception: what the function raises.
        """
        for _ in range(2):
            ((_, result),) = _run(_call, [(function, source, *arguments)], 1, self.limit, _idle_decoders)
            # A process may end without fault of the file: a scheduler ends all of a job, or memory is short. Try again.
            if not (isinstance(result, WorkerFailure) and result.ended):
                break
        if isinstance(result, WorkerFailure):
            fix = "encode it again, or leave its rows out"
            raise CorruptVideoError(source.path, f"cannot be decoded ({result.reason})", fix)
        if isinstance(result, Exception):
            raise result
        return tuple(map(_unshare, result)) if isinstance(result, tuple) else result


@dataclass(frozen=True)
class _SharedArray:
    """An array in shared memory, to be taken out once."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def _call(task: tuple[Any, ...], allow: Callable[[float], None]) -> Any:
    function, *arguments = task
    try:
        result = function(*arguments)
        return tuple(map(_share, result)) if isinstance(result, tuple) else result
    except Exception as error:
        return error


def _share(value: Any) -> Any:
    """An array as one in shared memory, if there is space for it; anything else as it is."""
    if not isinstance(value, np.ndarray) or not _fits(value.nbytes):
        return value
    memory = SharedMemory(create=True, size=value.nbytes)
    np.ndarray(value.shape, value.dtype, memory.buf)[...] = value
    memory.close()
    return _SharedArray(memory.name, value.shape, value.dtype.str)


def _fits(size: int) -> bool:
    """Containers often have 64 MB of shared memory, and writing beyond it ends the process. Windows has no /dev/shm:
    its shared memory is gone once this process closes it."""
    shared = Path("/dev/shm")
    return shared.exists() and shutil.disk_usage(shared).free > 2 * size


def _unshare(value: Any) -> Any:
    if not isinstance(value, _SharedArray):
        return value
    memory = SharedMemory(value.name)
    try:
        array: npt.NDArray[Any] = np.ndarray(value.shape, value.dtype, memory.buf).copy()
        return array
    finally:
        memory.close()
        memory.unlink()


def _run(
    function: Function[Any, Any], tasks: Iterable[Any], workers: int, limit: float, idle: list[_Worker]
) -> Iterator[tuple[Any, Any]]:
    """`run_tasks` with workers from `idle`, which go back there."""
    waiting = iter(tasks)
    busy: dict[connection.Connection, _Worker] = {}
    try:
        while True:
            while len(busy) < workers and (task := next(waiting, None)) is not None:
                worker = idle.pop() if idle else _Worker(function)
                worker.assign(task, limit)
                busy[worker.pipe] = worker
            if not busy:
                return
            soonest = min(worker.deadline for worker in busy.values())
            ready = connection.wait(list(busy), max(0.0, soonest - time.monotonic()))
            now = time.monotonic()
            for worker in list(busy.values()):
                if worker.pipe in ready:
                    answer = worker.answer()
                else:
                    answer = [worker.give_up()] if worker.deadline <= now else []
                for result in answer:
                    del busy[worker.pipe]
                    if not isinstance(result, WorkerFailure):
                        idle.append(worker)
                    yield worker.task, result
    finally:
        for worker in busy.values():
            worker.end()


class _Worker:
    """A process and its task."""

    task: Any
    limit: float
    deadline: float

    def __init__(self, function: Function[Any, Any]) -> None:
        # A fresh process: a copy of this one (fork) could inherit a locked lock of its libraries.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        with _interrupts_blocked(), _without_main():
            self._process.start()
        theirs.close()

    def assign(self, task: Any, limit: float) -> None:
        """Begin a task. That the process has ended shows in `answer`."""
        self.task = task
        self._allow(START_SECONDS)
        with suppress(OSError):
            self.pipe.send((task, limit))

    def answer(self) -> list[Any]:
        """[result or failure]; [] if the worker only asked for more time."""
        try:
            seconds, *results = self.pipe.recv()
        except (EOFError, OSError):
            self.end()
            return [WorkerFailure(f"its decoder ended the process (exit code {self._process.exitcode})", ended=True)]
        self._allow(seconds)
        return list(results)

    def give_up(self) -> WorkerFailure:
        """End the process because its task takes too long."""
        self.end()
        return WorkerFailure(f"it did not end within {self.limit:.0f} s")

    def end(self) -> None:
        """End the process, also in the middle of a task."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self.pipe.close()

    def _allow(self, seconds: float) -> None:
        self.limit, self.deadline = seconds, time.monotonic() + seconds


_idle_decoders: list[_Worker] = []  # the process of all `Decoder`s, between two calls


def _serve(pipe: connection.Connection, function: Function[Any, Any]) -> None:
    """The loop of a worker: (task, limit) in; (seconds,) for more time and (0, result) out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where there are no masks
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            task, limit = pipe.recv()
        except EOFError:
            return
        pipe.send((limit,))
        pipe.send((0.0, function(task, lambda seconds: pipe.send((seconds,)))))


def _end_with_parent() -> None:
    """A killed parent cannot end its workers, so they wait for its end."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


@contextmanager
def _without_main() -> Iterator[None]:
    """A process started inside does not import the program's main module, which may train without a guard."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """A process started inside never receives Ctrl-C, for masks are inherited: this one ends it, without tracebacks."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # else started below, which would end the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
