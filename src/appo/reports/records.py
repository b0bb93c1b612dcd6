"""The lines of rollouts.jsonl: one group a line, typed; and values as JSON holds them.

N response tokens, F frames of the language model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any

ROLLOUT_DIGITS = 6  # significant digits of the numbers in rollouts.jsonl (not in the paper: a third of the size)


@dataclass(frozen=True)
class ResponseRecord:
    """One response of a group."""

    text: str  # the whole response
    tokens: list[str]  # (N,) its tokens as text
    weights: list[float]  # (N,) the token weights of the method's step 8
    chosen: list[bool]  # (N,) which tokens are perception tokens (step 5)
    frame_attention: list[list[float]]  # (N, F) attention of each token to each frame (step 1); empty if not captured
    rewards: dict[str, float]  # reward by the name of its function; NaN where it did not apply
    advantage: float  # of the response, before the weights

    def __post_init__(self) -> None:
        lengths = {len(self.tokens), len(self.weights), len(self.chosen)}
        lengths |= {len(self.frame_attention)} if len(self.frame_attention) else set()
        if len(lengths) > 1:
            raise ValueError(f"tokens, weights, chosen and frame_attention differ in length: {sorted(lengths)}")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ResponseRecord:
        """Inverse of `as_json`, but for rounding; null becomes NaN. Raises ValueError for anything else."""
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
    """One group: a question and all responses to it."""

    step: int  # optimizer step the group was sampled for
    id: str  # of the question, unique within its dataset
    video: str  # path of the video
    question: str
    answer: str  # the gold answer
    kind: str  # how answers are scored
    timestamps: list[float]  # (F,) seconds of each frame of the language model
    crucial_frames: list[int]  # indices of the crucial frames (step 4)
    responses: list[ResponseRecord]  # the G responses
    event_frames: list[int] | None = None  # indices of the frames that show the answer, where the dataset knows them
    film: str = ""  # name of the picture of the frames in the folder ``frames/``; empty if there is none

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
