"""A reward function that raises or returns infinity is named in one line. It is never called again to learn more."""

from __future__ import annotations

import functools
import inspect
import math
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

SHOWN_CHARACTERS = 160  # of a completion, and of an error


class RewardError(ValueError):
    """A reward function raised, or a reward is infinite. One line: which function, what, in which step, which rows."""


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
                raise RewardError(_line(name, error, arguments)) from error
            return _finite(name, rewards, arguments)

        return call_later

    @functools.wraps(function)
    def call(**arguments: Any) -> Any:
        try:
            rewards = function(**arguments)
        except Exception as error:
            raise RewardError(_line(name, error, arguments)) from error
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


def _line(name: str, error: Exception, arguments: Mapping[str, Any]) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    # The error may quote the completion, which may hold anything.
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(str(error).split())[:SHOWN_CHARACTERS])
    what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    place = f"{Path(last.filename).name}, line {last.lineno}"
    done = getattr(arguments.get("trainer_state"), "global_step", None)
    step = "" if done is None else f" in step {done + 1}"
    count, first = len(arguments["completions"]), _shown(arguments, 0)
    rows = first if count == 1 else f"one of {count} rows, the first is {first}"
    return (
        f"reward function {name} raises {what} ({place}){step} for {rows}, completion "
        f"{_short(arguments['completions'][0])}; correct it, then resume from the last checkpoint"
    )


def _short(completion: Any) -> str:
    """The text of a completion on one line: cut, control characters escaped."""
    text = completion
    if isinstance(completion, list):
        text = " ".join(str(message.get("content", "")) for message in completion)
    text = str(text)
    return repr(text[:SHOWN_CHARACTERS]) + ("..." if len(text) > SHOWN_CHARACTERS else "")
