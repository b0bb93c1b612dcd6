"""Faults while a run goes on: videos that cannot be read, and reward functions that raise.

All processes of a run learn of all faulty videos, so that they agree on what follows.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from appo.reports.jsonl import append_line
from appo.reports.run_folder import FAULTS
from appo.rollout.generation import PromptError, check_text, has_video, open_image, pictures, video_sources
from appo.video.reader import VideoError

SHOWN_CHARACTERS = 160  # of a completion, and of an error
PATIENCE = 8  # faults in a row, beyond those that are allowed, after which no good video is looked for any more


class FaultyVideosError(ValueError):
    """Too many videos of a run cannot be shown. One line with the last of them and the fix."""


class _NoneLeftError(Exception):
    """One row after the other could not be shown."""


@dataclass(frozen=True)
class VideoFault:
    """A row that could not be shown."""

    step: int  # optimiser steps done before
    file: str  # its video or picture; empty: its text cannot be used
    id: str  # of the row; empty if it has none
    reason: str  # one line


class Reader(Protocol):
    """Reads a video, or raises VideoError: :class:`appo.rollout.generation.VideoCache`."""

    def read(self, source: Any, /) -> Any:
        """The video."""


class VideoFaults:
    """What a run knows of videos that cannot be shown.

    Attributes:
        files: those that could not be shown when they were last asked for.
        count: rows that could not be shown and were replaced, in all processes.
        stop: why the run has to stop; empty: it need not.
    """

    def __init__(self, folder: Path, limit: int, is_main: bool = True) -> None:
        """``folder``: of the log; ``limit``: files that may be faulty; ``tells``: this process logs and prints."""
        self._log, self._limit, self._is_main = folder / FAULTS, limit, is_main
        self.files: set[str] = set()
        self.count = 0
        self.stop = ""
        self._new: list[VideoFault] = []
        self._healed: set[str] = set()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"files": sorted(self.files), "count": self.count}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Know what was known when `state` was taken."""
        self.files, self.count = set(state["files"]), state["count"]

    def can_read(self, row: Mapping[str, Any], videos: Reader, step: int, forbidden: Sequence[str] = ()) -> bool:
        """Whether a row can be shown now. Else it is noted why not.

        Args:
            row: of the dataset. Its videos are read, its picture files opened.
            videos: reads them.
            step: optimiser steps done before.
            forbidden: texts that no question may hold (:func:`appo.rollout.generation.placeholders`).
        """
        prompt, file = row["prompt"], ""
        try:
            if isinstance(prompt, list):
                check_text(prompt, forbidden)
            for source in video_sources(prompt) if has_video(prompt) else ():
                file = source.path
                videos.read(source)
                self._healed |= {file} & self.files
            for picture in pictures(prompt):
                file = picture if isinstance(picture, str) else ""
                open_image(picture)
                self._healed |= {file} & self.files
        except (VideoError, PromptError) as error:
            reason, path = " ".join(str(error).split()), getattr(error, "path", "")
            self._new.append(VideoFault(step, file or path, str(row.get("id", "")), reason))
            return False
        return True

    def patient(self, can_read: Callable[[Any], bool]) -> Callable[[Any], bool]:
        """The same check for rows that are drawn until one can be shown; `attempt` ends if none comes."""
        failed = 0

        def check(row: Any) -> bool:
            nonlocal failed
            if can_read(row):
                failed = 0
                return True
            failed += 1
            if failed > self._limit + PATIENCE:
                raise _NoneLeftError
            return False

        return check

    def attempt(self, draw: Callable[[], list[Any]], gather: Callable[[Any], Sequence[Any]]) -> list[Any] | None:
        """Rows that can be shown, or None in all processes if one of them finds none.

        Args:
            draw: finds them.
            gather: what each process says, in all of them.
        """
        rows: list[Any] | None
        try:
            rows = draw()
        except _NoneLeftError:
            rows = None
        said = gather((self._new, sorted(self._healed), rows is None))
        self._new, self._healed = [], set()
        found = [fault for faults, _, _ in said for fault in faults]
        self.files -= {file for _, healed, _ in said for file in healed}
        self.files |= {fault.file for fault in found} - {""}
        self.count += len(found)
        if found and len(self.files) > self._limit:
            self.stop = (
                f"{len(self.files)} videos cannot be shown, {self._limit} are allowed (max_faulty_videos); the last: "
                f"{found[-1].reason}"
            )
        for fault in found if self._is_main else ():
            print(f"appo: step {fault.step}, row {fault.id or '?'} is replaced: {fault.reason}", file=sys.stderr)
            append_line(self._log, asdict(fault))
        if any(none_left for _, _, none_left in said):
            self.stop = self.stop or f"no video that can be shown was found; the last: {found[-1].reason}"
            return None
        return rows


# -- reward functions ----------------------------------------------------------------------------------------------


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
