"""Everything that the processes of a run do together. Every process must make the same calls, in the same order.

No other module calls a collective operation of accelerate or torch; sharded weights (`appo.models.sharding`) and the
gathers inside of TRL's own methods are apart from this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather, gather_object
from torch import Tensor

Result = TypeVar("Result")


class MainProcessFailed(SystemExit):
    """The main process stops with an error, which it alone reports; this one stops with the same exit code."""

    def __init__(self) -> None:
        super().__init__(2)


def is_main_process() -> bool:
    """Whether this is the process that writes the run folder and prints."""
    return bool(PartialState().is_main_process)


def process_slice(length: int) -> slice:
    """Where this process's `length` rows are in what `gather_tensor` returns."""
    index = PartialState().process_index
    return slice(index * length, (index + 1) * length)


def barrier() -> None:
    """Wait for all processes."""
    PartialState().wait_for_everyone()


def gather_values(value: Any) -> list[Any]:
    """One picklable value of each process, in the order of processes."""
    values: list[Any] = gather_object([value])
    return values


def gather_list(values: list[Any]) -> list[Any]:
    """The lists of all processes, one after another."""
    gathered: list[Any] = gather_object(values)
    return gathered


def gather_tensor(tensor: Tensor) -> Tensor:
    """The tensors of all processes, of the same shape, concatenated along their first dimension."""
    gathered: Tensor = gather(tensor)
    return gathered


def any_process(flag: bool) -> bool:
    """Whether it is so in one of the processes at least."""
    return any(gather_values(flag))


def max_over_processes(count: int) -> int:
    """The largest of the processes' numbers."""
    return int(max(gather_values(count)))


def run_on_main_process(work: Callable[[], Result]) -> Result:
    """Do `work` in the main process only; every process gets its result.

    Args:
        work: its result must be picklable.

    Raises:
        Exception: whatever `work` raises, in the main process.
        MainProcessFailed: in the others, if it raises.
    """
    if PartialState().num_processes == 1:
        return work()
    outcome: list[Any] = [None, True]
    error: Exception | None = None
    if is_main_process():
        try:
            outcome = [work(), False]
        except Exception as raised:
            error = raised
    broadcast_object_list(outcome)
    if error is not None:
        raise error
    result, failed = outcome
    if failed:
        raise MainProcessFailed
    done: Result = result
    return done
