"""A reward function that raises or returns infinity, named with the row and the completion at which it does."""

from __future__ import annotations

import functools
import inspect
import math
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

SEARCH_SECONDS = 30.0  # for the row at fault: a function may ask a slow service
SHOWN_CHARACTERS = 160  # of a completion, and of an error


class RewardError(ValueError):
    """A reward function raised, or a reward is infinite. One line: which function, what, and for which row."""


def watched(function: Any, name: str) -> Any:
    """The same reward function, with one line for what it raises; models are left as they are."""
    if isinstance(function, nn.Module):
        return function
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None)):  # noqa: B004

        @functools.wraps(function)
        async def call_later(**arguments: Any) -> Any:
            try:
                rewards = await function(**arguments)
            except Exception as error:
                raise RewardError(_line(name, error, arguments, None)) from error
            return _finite(name, rewards, arguments)

        return call_later

    @functools.wraps(function)
    def call(**arguments: Any) -> Any:
        try:
            rewards = function(**arguments)
        except Exception as error:
            raise RewardError(_line(name, error, arguments, _row_at_fault(function, arguments))) from error
        return _finite(name, rewards, arguments)

    return call


def _finite(name: str, rewards: Any, arguments: Mapping[str, Any]) -> Any:
    """The rewards. In silence TRL would make all advantages of a group with an infinite one 0."""
    rewards = list(rewards)
    for row, reward in enumerate(rewards):
        if reward is not None and math.isinf(reward):
            about = f"{_shown(arguments, row)}, completion {_short(arguments['completions'][row])}"
            raise RewardError(f"reward function {name} returns {float(reward)} for {about}; rewards must be finite")
    return rewards


def _shown(arguments: Mapping[str, Any], row: int) -> str:
    ids = arguments.get("id")
    return f"row {ids[row]}" if isinstance(ids, list) else f"row {row} of the call"


def _row_at_fault(function: Callable[..., Any], arguments: Mapping[str, Any]) -> int | None:
    """The first row at which the function raises when it is asked about that row alone."""
    deadline = time.monotonic() + SEARCH_SECONDS
    rows = len(arguments["completions"])
    silent = {name: lambda *_: None for name in ("log_extra", "log_metric") if name in arguments}
    for row in range(rows):
        alone = {
            name: [value[row]] if isinstance(value, list) and len(value) == rows else value
            for name, value in arguments.items()
        }
        if time.monotonic() > deadline:
            return None
        try:
            function(**{**alone, **silent})
        except Exception:
            return row
    return None


def _line(name: str, error: Exception, arguments: Mapping[str, Any], row: int | None) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    # The error may quote the completion, which may hold anything.
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(str(error).split())[:SHOWN_CHARACTERS])
    what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    completions, at = arguments["completions"], row or 0
    shown = _shown(arguments, at)
    about = shown if row is not None else f"one of {len(completions)} rows, the first is {shown}"
    place = f"{Path(last.filename).name}, line {last.lineno}"
    return (
        f"reward function {name} raises {what} ({place}) for {about}, completion "
        f"{_short(completions[at])}; correct it, then resume from the last checkpoint"
    )


def _short(completion: Any) -> str:
    """The text of a completion on one line: cut, control characters escaped."""
    text = completion
    if isinstance(completion, list):
        text = " ".join(str(message.get("content", "")) for message in completion)
    text = str(text)
    return repr(text[:SHOWN_CHARACTERS]) + ("..." if len(text) > SHOWN_CHARACTERS else "")
