"""What a setting may be on its own: checked before libraries are loaded, and again by :class:`appo.APPOConfig`.

Rules about several settings stand in `config`; TRL's own settings are TRL's to check, but for what it
accepts silently.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

METHODS = ("grpo", "dapo", "appo", "sft")
CHOICES: dict[str, tuple[str, ...]] = {
    "method": METHODS,
    "strategy": ("soft", "hard", "all"),
    "divergence": ("kl", "k3"),
    "frame_attention": ("raw", "relative"),
}
_WORDS = ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0")  # what transformers' parser reads as a switch
SWITCHES = ("normalize_weights", "shared_prefix", "freeze_vision_tower")


def setting(default: Any, help: str) -> Any:
    """A dataclass's field with the help that TRL's parser shows."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Numbers:
    """A range of numbers."""

    least: float  # smallest one
    most: float = math.inf  # largest one
    whole: bool = False  # whole numbers only
    open: bool = False  # `least` itself is excluded
    note: str = ""  # what `least` or `most` is about, for messages
    also: int | None = None  # one number beside the range

    def problem(self, value: Any) -> str:
        """Why the value is none of them, or ""."""
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return f"must be a {'whole ' if self.whole else ''}number"
        number = float(value)
        inside = self.least < number if self.open else self.least <= number
        if number == self.also or (inside and number <= self.most and math.isfinite(number)):
            return ""
        if math.isinf(self.most) and inside:
            return "must be finite"
        least = f"above {self.least:g}" if self.open else f"at least {self.least:g}"
        return f"must be {least if math.isinf(self.most) else f'from {self.least:g} to {self.most:g}'}{self.note}"


_COUNT, _AMOUNT = Numbers(1, whole=True), Numbers(0, whole=True)
RANGES: dict[str, Numbers] = {
    **dict.fromkeys(("score_tokens", "top_frames", "frame_tokens", "attention_layers"), _COUNT),
    **dict.fromkeys(("video_max_frames", "video_min_frames"), _COUNT),
    **dict.fromkeys(("max_resampling_rounds", "overlong_cache", "rollouts_per_step", "rows_per_chunk"), _AMOUNT),
    "max_faulty_videos": _AMOUNT,
    "threshold": Numbers(0, 1, note=" (as an accuracy reward is)"),
    "base_weight": Numbers(0, 1, note=" (1 is the paper)"),
    "max_weight": Numbers(1, note=" (1 is DAPO)"),
    "video_fps": Numbers(0, open=True, note=" frames a second"),
    "decode_timeout": Numbers(0, open=True, note=" seconds"),
    # transformers takes any negative number as -1.
    "max_steps": Numbers(0, whole=True, also=-1, note=", or -1: num_train_epochs counts"),
    # What `appo train` has beside the settings of training.
    **dict.fromkeys(("clips", "limit", "video_min_pixels", "video_max_pixels", "image_max_pixels"), _COUNT),
}


def check_values(values: Mapping[str, Any]) -> None:
    """Refuse the first value that its setting cannot have. Names that no rule is about are passed over.

    Raises:
        ValueError: naming setting, what it may be and what it is.
    """
    for name, value in values.items():
        if problem := _problem(name, value):
            raise ValueError(f"{name} {problem}, got {value!r}")


def check_texts(texts: Mapping[str, Any]) -> None:
    """`check_values` of what a file or the command line holds, where a number may be a text; None is passed over.

    Raises:
        ValueError: as `check_values`.
    """
    check_values({name: _read(name, value) for name, value in texts.items() if value is not None})


def _problem(name: str, value: Any) -> str:
    if name in RANGES:
        return RANGES[name].problem(value)
    if name in CHOICES and value not in CHOICES[name]:
        return f"must be one of {', '.join(CHOICES[name])}"
    if name in SWITCHES and not isinstance(value, bool):
        return "must be true or false"
    return "must be a number" if isinstance(value, float) and math.isnan(value) else ""


def _read(name: str, value: Any) -> Any:
    """A text as the number or switch it stands for, if it stands for one."""
    if name in SWITCHES and str(value).lower() in _WORDS:
        return True
    if name not in RANGES or not isinstance(value, str):
        return value
    try:
        return int(value) if RANGES[name].whole else float(value)
    except ValueError:
        return value
