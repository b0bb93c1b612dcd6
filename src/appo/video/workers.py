"""Tasks in processes of their own: one that hangs is given up, one that dies is reported, and none outlives its parent.

Decoders of damaged videos do hang and crash. `concurrent.futures` can do neither: it breaks as a whole when one of its
processes dies, and cannot end a task that has begun.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from types import ModuleType
from typing import Any, Generic, TypeVar

START_SECONDS = 120.0  # for a new process to import what it needs

Task = TypeVar("Task")
Result = TypeVar("Result")
# A task is done with its limit in hand: the call says how many more seconds it may take from now on.
Function = Callable[[Task, Callable[[float], None]], Result]


@dataclass(frozen=True)
class Lost:
    """What became of a task that has no result. ``ended``: its process did, by itself or by a signal."""

    reason: str
    ended: bool = False


def run_tasks(
    function: Function[Task, Result], tasks: Iterable[Task], workers: int, limit: float
) -> Iterator[tuple[Task, Result | Lost]]:
    """The result of each task, as they come.

    Args:
        function: a function of a module, for the processes import it; it must not raise.
        tasks: what to do; asked for as workers come free. Tasks and results are pickled.
        workers: processes at the same time.
        limit: seconds for a task, unless it asks for more while it runs.
    """
    waiting = iter(tasks)
    busy: dict[connection.Connection, _Worker[Task, Result]] = {}
    idle: list[_Worker[Task, Result]] = []
    try:
        while True:
            while len(busy) < workers and (task := next(waiting, None)) is not None:
                worker = idle.pop() if idle else _Worker(function)
                worker.give(task, limit)
                busy[worker.pipe] = worker
            if not busy:
                return
            soonest = min(worker.deadline for worker in busy.values())
            for pipe in connection.wait(list(busy), max(0.0, soonest - time.monotonic())):
                worker = busy[pipe]  # type: ignore[index]
                if (answer := worker.answer()) is not None:
                    del busy[worker.pipe]
                    if not isinstance(answer[0], Lost):
                        idle.append(worker)
                    yield worker.task, answer[0]
            for worker in [worker for worker in busy.values() if worker.deadline <= time.monotonic()]:
                del busy[worker.pipe]
                yield worker.task, worker.give_up()
    finally:
        for worker in (*busy.values(), *idle):
            worker.end()


class Helper(Generic[Task, Result]):
    """One process, begun when it is first needed, that does one task after another.

    It is given up with a task that does not end; the next task begins another.
    """

    def __init__(self, function: Function[Task, Result]) -> None:
        self._function = function
        self._worker: _Worker[Task, Result] | None = None

    def do(self, task: Task, limit: float) -> Result | Lost:
        """The result of a task, as `run_tasks` has it."""
        worker = self._worker or _Worker(self._function)
        self._worker = None
        worker.give(task, limit)
        while connection.wait([worker.pipe], max(0.0, worker.deadline - time.monotonic())):
            if (answer := worker.answer()) is not None:
                self._worker = None if isinstance(answer[0], Lost) else worker
                return answer[0]
        return worker.give_up()


class _Worker(Generic[Task, Result]):
    """A process, and the task it is at."""

    task: Task

    def __init__(self, function: Function[Task, Result]) -> None:
        # A fresh process: a copy of this one (fork) could inherit a lock of its libraries that nobody will open.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        with _interrupts_held(), _without_main():
            self._process.start()
        theirs.close()
        self.limit, self.deadline = START_SECONDS, 0.0

    def give(self, task: Task, limit: float) -> None:
        """Begin a task. A process that is no longer there shows when it is asked for its answer."""
        self.task = task
        self._allow(START_SECONDS)
        with suppress(OSError):
            self.pipe.send((task, limit))

    def answer(self) -> tuple[Result | Lost] | None:
        """The result, or how it was lost; None if the worker only asked for more time."""
        try:
            seconds, *result = self.pipe.recv()
        except (EOFError, OSError):
            self.end()
            return (Lost(f"its decoder ended the process (exit code {self._process.exitcode})", ended=True),)
        self._allow(seconds)
        return (result[0],) if result else None

    def give_up(self) -> Lost:
        """End the process with its task."""
        self.end()
        return Lost(f"it did not end within {self.limit:.0f} s")

    def end(self) -> None:
        """End the process, whatever it is at."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self.pipe.close()

    def _allow(self, seconds: float) -> None:
        self.limit, self.deadline = seconds, time.monotonic() + seconds


def _serve(pipe: connection.Connection, function: Function[Any, Any]) -> None:
    """A worker's life: (task, limit) in; (seconds,) for more time and (0, result) out."""
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
    """A parent that is killed can end nobody: its workers see to that themselves."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


@contextmanager
def _without_main() -> Iterator[None]:
    """What is started inside does not import the program's main module, which may train without a guard."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """What is started inside never sees Ctrl-C, for masks are inherited: this process ends it, without tracebacks."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # else started below, which would end the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
