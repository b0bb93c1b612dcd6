"""The run folder: what a run was, what it measured and what its policy said; all plain text, all append-only.

    config.json      settings, versions, commit, command line, start: enough to run it again
    metrics.jsonl    one JSON object a logging step
    rollouts.jsonl   one JSON object a group: see `RolloutRecord`
    faults.jsonl     one JSON object a row whose video could not be shown: see `appo.training.faults`
    resumes.jsonl    one JSON object each time the run was resumed: from where, and how
    frames/          the frames of recorded groups, one WebP picture (`appo.video.thumbnails`) a video

A run may be killed at any moment, so every line is written at once, a torn last line is tolerated, and anything else
that is not as written raises `RecordError` naming file and line. N response tokens, F frames as the model sees them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, fields, is_dataclass
from datetime import UTC, datetime
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

from appo.files import atomic_write
from appo.reports.jsonl import (
    RecordError,
    append_line,
    check_unused,
    cut,
    damaged,
    read_lines,
    reason,
    sync,
    unwritable,
)

CONFIG, METRICS, ROLLOUTS, FRAMES = "config.json", "metrics.jsonl", "rollouts.jsonl", "frames"
RESUMES = "resumes.jsonl"
FAULTS = "faults.jsonl"
PAGE = "spotlight.html"  # where `appo spotlight RUN` writes
ROLLOUT_DIGITS = 6  # significant digits of the numbers in rollouts.jsonl («ours»: a third of the size)
PACKAGES = ("appo", "torch", "transformers", "trl", "accelerate", "av")


@dataclass(frozen=True)
class ResponseRecord:
    """One response of a group.

    Attributes:
        text: the whole response.
        tokens: (N,) its tokens as text.
        weights: (N,) the token weights of the method's step 8.
        chosen: (N,) which tokens are perception tokens (step 5).
        frame_attention: (N, F) attention of each token to each frame (step 1); empty if not captured.
        rewards: reward by the name of its function; NaN where it did not apply.
        advantage: of the response, before the weights.
    """

    text: str
    tokens: list[str]
    weights: list[float]
    chosen: list[bool]
    frame_attention: list[list[float]]
    rewards: dict[str, float]
    advantage: float

    def __post_init__(self) -> None:
        lengths = {len(self.tokens), len(self.weights), len(self.chosen)}
        lengths |= {len(self.frame_attention)} if len(self.frame_attention) else set()
        if len(lengths) > 1:
            raise ValueError(f"tokens, weights, chosen and frame_attention differ in length: {sorted(lengths)}")

    def to_json(self) -> dict[str, Any]:
        """Plain values, rounded; what is not finite becomes null."""
        return dict(as_json(self, ROLLOUT_DIGITS))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ResponseRecord:
        """Inverse of `to_json`, but for rounding; null becomes NaN. Raises ValueError for anything else."""
        return cls(
            text=_get(data, "text", str),
            tokens=_get(data, "tokens", list, each=str),
            weights=[_number(value) for value in _get(data, "weights", list)],
            chosen=_get(data, "chosen", list, each=bool),
            frame_attention=[
                [_number(value) for value in row] for row in _get(data, "frame_attention", list, each=list)
            ],
            rewards={name: _number(value) for name, value in _get(data, "rewards", dict).items()},
            advantage=_number(data["advantage"]),
        )


@dataclass(frozen=True)
class RolloutRecord:
    """One group: a question and all responses to it.

    Attributes:
        step: optimizer step the group was sampled for.
        id: of the question, unique within its dataset.
        video: path of the video.
        question: as asked.
        answer: the gold answer.
        kind: how answers are scored.
        timestamps: (F,) seconds of each frame as the language model sees it.
        crucial_frames: indices of the crucial frames (step 4).
        responses: the G responses.
        event_frames: indices of the frames that show the answer, where the dataset knows them.
        film: name of the picture of the frames in the folder ``frames/``; empty if there is none.
    """

    step: int
    id: str
    video: str
    question: str
    answer: str
    kind: str
    timestamps: list[float]
    crucial_frames: list[int]
    responses: list[ResponseRecord]
    event_frames: list[int] | None = None
    film: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values, rounded; what is not finite becomes null."""
        return dict(as_json(self, ROLLOUT_DIGITS))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RolloutRecord:
        """Inverse of `to_json`, but for rounding; null becomes NaN. Raises ValueError for anything else."""
        try:
            event_frames = data.get("event_frames")
            return cls(
                step=_get(data, "step", int),
                **{name: _get(data, name, str) for name in ("id", "video", "question", "answer", "kind")},
                timestamps=[_number(value) for value in _get(data, "timestamps", list)],
                crucial_frames=_get(data, "crucial_frames", list, each=int),
                responses=[ResponseRecord.from_json(one) for one in _get(data, "responses", list, each=dict)],
                event_frames=None if event_frames is None else _get(data, "event_frames", list, each=int),
                film=_get(data, "film", str) if "film" in data else "",
            )
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"a field is missing or of the wrong type: {error}") from None


@dataclass(frozen=True)
class RunFolder:
    """A run's folder; get one by `RunFolder.create` or `RunFolder.open`."""

    path: Path

    @classmethod
    def create(cls, path: str | os.PathLike[str], config: Mapping[str, Any]) -> RunFolder:
        """Start a run in a new or empty folder and write down what it is.

        Raises:
            RecordError: the folder holds something already, or cannot be written.
        """
        folder = cls(Path(path))
        check_unused(folder.path)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            text = json.dumps(as_json(describe_run(config)), indent=2, allow_nan=False) + "\n"
            folder.frames.mkdir()
            atomic_write(folder.path / CONFIG, text)
        except OSError as error:
            raise unwritable(folder.path, error) from error
        return folder

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunFolder:
        """A run that `create` started. Raises RecordError if its config.json is missing or damaged."""
        folder = cls(Path(path))
        folder.describe()
        return folder

    @classmethod
    def resume(
        cls, path: str | os.PathLike[str], config: Mapping[str, Any], may_differ: Set[str] = frozenset()
    ) -> RunFolder:
        """A run that `create` started, to go on with it.

        Args:
            path: the folder.
            config: the settings now.
            may_differ: names of settings that do not change the run's numbers.

        Raises:
            RecordError: there is no run, or another setting is not what it was; each is named.
        """
        folder = cls.open(path)
        changed = list(_differences(folder.config, as_json(config), may_differ))
        if changed:
            problem = "; ".join(changed)
            raise RecordError(f"{folder.path}: {problem}; a resumed run keeps its settings: give the old ones")
        return folder

    @property
    def frames(self) -> Path:
        """The folder of pictures."""
        return self.path / FRAMES

    @property
    def config(self) -> dict[str, Any]:
        """The settings given to `create`."""
        return dict(self.describe()["config"])

    def describe(self) -> dict[str, Any]:
        """All of config.json: ``config, versions, git_commit, argv, started, platform``."""
        file = self.path / CONFIG
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(data["config"], dict):
                raise ValueError("no settings")
        except OSError as error:
            problem = f"no run folder ({CONFIG}: {reason(error)})"
            raise RecordError(f"{self.path}: {problem}; give the folder that a run wrote") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RecordError(f"{file}: damaged ({error}); restore it from a copy") from error
        return dict(data)

    def append_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Write one line of metrics.jsonl; what is not finite becomes null. Raises RecordError."""
        append_line(self.path / METRICS, as_json(metrics))

    def append_rollout(self, record: RolloutRecord) -> None:
        """Write one line of rollouts.jsonl. Raises RecordError."""
        append_line(self.path / ROLLOUTS, record.to_json())

    def keep_film(self, picture: bytes) -> str:
        """Put a picture into ``frames/``, once however often it comes; returns its name there, "" for no picture.

        Raises:
            RecordError: it cannot be written.
        """
        if not picture:
            return ""
        file = self.frames / f"{hashlib.sha256(picture).hexdigest()[:16]}.webp"
        try:
            if not file.exists():
                self.frames.mkdir(exist_ok=True)
                atomic_write(file, picture)
        except OSError as error:
            raise unwritable(file, error) from error
        return file.name

    def append_resume(self, config: Mapping[str, Any], start: str | None) -> None:
        """Write one line of resumes.jsonl: what `create` writes of a run, and the checkpoint it goes on from."""
        append_line(self.path / RESUMES, {"from": start, **as_json(describe_run(config))})

    def sizes(self) -> dict[str, int]:
        """Bytes of the records, once they are on the disk: with a checkpoint, they say what belongs to it."""
        return {name: sync(self.path / name) for name in (METRICS, ROLLOUTS, FAULTS)}

    def rewind(self, sizes: Mapping[str, int]) -> None:
        """Take back what was recorded since `sizes`; {} takes back everything. Raises RecordError."""
        for name in (METRICS, ROLLOUTS, FAULTS):
            cut(self.path / name, sizes.get(name, 0))

    def read_metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl, [] before the first. A torn last line is a `TornLineWarning`."""
        return [data for _, data in read_lines(self.path / METRICS)]

    def read_rollouts(self) -> Iterator[RolloutRecord]:
        """The groups of rollouts.jsonl one by one. A torn last line is a `TornLineWarning`."""
        file = self.path / ROLLOUTS
        for number, data in read_lines(file):
            try:
                record = RolloutRecord.from_json(data)
            except ValueError as error:
                raise damaged(file, number, str(error)) from error
            yield record


def describe_run(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings and what else decides a run's result."""
    return {
        "config": config,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "git_commit": _git_commit(),
        "argv": sys.argv,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "platform": platform.platform(),
    }


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], may_differ: Set[str]) -> Iterator[str]:
    """What is another value now, among settings that both sides have (others come and go with versions)."""
    for name in old:
        if name in may_differ or name not in new:
            continue
        if isinstance(old[name], Mapping) and isinstance(new[name], Mapping):
            yield from _differences(old[name], new[name], may_differ)
        elif old[name] != new[name]:
            yield f"{name} was {old[name]!r} and is {new[name]!r}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit checked out in the current directory, None outside of git."""
    try:
        return subprocess.check_output(
            ["git", "rev-parse", "--verify", "HEAD"], stderr=subprocess.DEVNULL, text=True, timeout=10
        ).strip()
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def as_json(value: Any, digits: int = 0) -> Any:
    """The value as JSON can hold it: arrays as lists, not finite as None, unknown as its text; floats rounded."""
    if isinstance(value, Enum):
        return as_json(value.value, digits)
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        rounded = float(f"{value:.{digits}g}") if digits else float(value)
        return rounded if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): as_json(item, digits) for key, item in value.items()}
    if isinstance(value, Sequence | Set) and not isinstance(value, bytes):
        return [as_json(item, digits) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_json(getattr(value, field.name), digits) for field in fields(value)}
    if callable(to_list := getattr(value, "tolist", None)):  # numpy and torch, without importing either
        return as_json(to_list(), digits)
    return str(value)


def _get(data: Mapping[str, Any], name: str, kind: type[Any], *, each: type | None = None) -> Any:
    """A field of exactly this type, and its elements of exactly that one. Raises ValueError."""
    value: Any = data[name]
    if type(value) is not kind or (each and not all(type(item) is each for item in value)):
        raise ValueError(f"`{name}` is no {kind.__name__}{f' of {each.__name__}' if each else ''}")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool | str):
        raise ValueError(f"{value!r:.40} is no number")
    return math.nan if value is None else float(value)
