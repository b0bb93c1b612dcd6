"""What only one of a run's processes does, while the others wait: run folders, generated clips, lines on the screen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

Result = TypeVar("Result")


class ToldElsewhere(SystemExit):
    """The main process stops with an error, which it alone reports; this one stops with the same exit code."""

    def __init__(self) -> None:
        super().__init__(2)


def is_main() -> bool:
    """Whether this is the process that speaks for all."""
    return bool(PartialState().is_main_process)


def on_main(work: Callable[[], Result]) -> Result:
    """Do `work` in the main process only; every process gets its result.

    Args:
        work: its result must be picklable. Every process must call this, at the same point.

    Raises:
        Exception: whatever `work` raises, in the main process.
        ToldElsewhere: in the others, if it raises.
    """
    if PartialState().num_processes == 1:
        return work()
    outcome: list[Any] = [None, True]
    error: Exception | None = None
    if is_main():
        try:
            outcome = [work(), False]
        except Exception as raised:
            error = raised
    broadcast_object_list(outcome)
    if error is not None:
        raise error
    result, failed = outcome
    if failed:
        raise ToldElsewhere
    done: Result = result
    return done


def any_process(flag: bool) -> bool:
    """Whether it is so in one of the processes at least. Every process must call this, at the same point."""
    return any(gather_object([flag]))


def most_of_all(count: int) -> int:
    """The largest of the processes' numbers. Every process must call this, at the same point."""
    return int(max(gather_object([count])))
