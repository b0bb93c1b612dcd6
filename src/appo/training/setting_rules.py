"""What a setting may be on its own, and how the settings of `appo train` are called.

Values are checked before libraries are loaded, and again by :class:`appo.APPOConfig`. Rules about several settings are
in `config`; TRL's own settings are TRL's to check, but for what it accepts silently. Names are read from the source of
the installed transformers and TRL (importing TRL takes twenty seconds), so they are theirs in any version;
`tests/training/test_setting_names.py` compares them with the parser that is made of the classes themselves.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.util import find_spec
from numbers import Integral, Real
from pathlib import Path
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


# -- names ----------------------------------------------------------------------------------------------------------

# Each class's package, file, name and base. Where a version of a library has them otherwise, nothing is known.
_CLASSES = (
    ("transformers", "training_args.py", "TrainingArguments", None),
    ("trl", "trainer/base_config.py", "_BaseConfig", "TrainingArguments"),
    ("trl", "trainer/grpo_config.py", "GRPOConfig", "_BaseConfig"),
    ("appo", "training/config.py", "APPOConfig", "GRPOConfig"),
    ("appo", "training/lora.py", "AdapterSettings", None),
    ("appo", "training/arguments.py", "TrainScript", "AdapterSettings"),
)


def setting_flags() -> dict[str, str] | None:
    """Every flag of a setting -> the setting's name; None if the source is not as it is known to be.

    A setting has the flags that transformers' parser gives it: ``--max_weight``, ``--max-weight``, and for a switch
    that is on by default ``--no_shared_prefix`` and ``--no-shared-prefix``.
    """
    off_by: dict[str, bool] = {}
    for package, file, name, base in _CLASSES:
        found = _class(package, file, name)
        if found is None or [ast.unparse(one) for one in found.bases] != ([] if base is None else [base]):
            return None
        off_by.update(_fields(found))
    flags: dict[str, str] = {}
    for name, has_no in off_by.items():
        for flag in (f"--{name}", f"--no_{name}") if has_no else (f"--{name}",):
            flags |= {flag: name, f"--{flag[2:].replace('_', '-')}": name}
    return flags


def meant(word: str, known: Collection[str]) -> str:
    """The known name that a misspelt or shortened one stands for, "" if none is near."""
    alike = word.replace("-", "_")
    longer = sorted((name for name in known if name.replace("-", "_").startswith(alike)), key=len)
    return next(iter([*longer[:1], *get_close_matches(word, known, 1, 0.75)]), "")


def _class(package: str, file: str, name: str) -> ast.ClassDef | None:
    spec = find_spec(package)  # of a package itself: nothing is imported
    path = Path(spec.origin).parent / file if spec and spec.origin else None
    if path is None or not path.is_file():
        return None
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return next((node for node in body if isinstance(node, ast.ClassDef) and node.name == name), None)


def _fields(found: ast.ClassDef) -> Iterator[tuple[str, bool]]:
    """The names of a dataclass's settings, each with whether it is a switch that is on by default."""
    for node in found.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        kind = ast.unparse(node.annotation)
        options = {one.arg: one.value for one in node.value.keywords} if isinstance(node.value, ast.Call) else {}
        if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "setting":
            options["default"] = node.value.args[0]
        if kind.startswith("ClassVar") or _is(options.get("init"), False):
            continue
        yield node.target.id, kind in ("bool", "bool | None") and _is(options.get("default", node.value), True)


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value
