"""What is compared: the methods, baselines of the field, variants that are not in the paper, and controls, by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from appo.experiments.compare.controls import (
    Control,
    decisive_tokens,
    random_frames,
    same_position,
    shuffled,
    true_frames,
)
from appo.training.config import APPOConfig

RELATIVE: dict[str, Any] = {"frame_attention": "relative", "base_weight": 0.2, "normalize_weights": True}
RAW_BASE = RELATIVE | {"frame_attention": "raw"}
ORACLES = ("oracle-tokens", "oracle-frames")


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
        method: of :class:`appo.APPOConfig`; empty: no training at all.
        settings: of the same, where they differ from the demo's.
        control: what makes the weights in the place of attention.
        reasoning: sft only: whether the teacher's reasoning is shown as well.
        needs: the variant whose mean weight multiplies the learning rate, and which must be done before.
        meaning: a line for the reader of the table.
    """

    method: str
    meaning: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    control: Control | None = None
    reasoning: bool = False
    needs: str | None = None


VARIANTS: dict[str, Variant] = {
    "start": Variant("", "the policy all others start from"),
    "grpo": Variant("grpo", "GRPO"),
    "dapo": Variant("dapo", "DAPO"),
    "appo": Variant("appo", "APPO as published: soft, kl, weights 1 to 1.7"),
    "appo-hard": Variant("appo", "APPO, frames of winners only", {"strategy": "hard"}),
    "appo-all": Variant("appo", "APPO, frames of anyone", {"strategy": "all"}),
    "appo-k3": Variant("appo", "APPO, the released code's divergence", {"divergence": "k3"}),
    "appo-relative": Variant("appo", "relative attention, base weight 0.2, mean one", RELATIVE),
    "relative-only": Variant("appo", "APPO with relative attention, weights 1 to 1.7", {"frame_attention": "relative"}),
    "relative-one": Variant("appo", "the same with a mean of one", RELATIVE | {"base_weight": 1.0}),
    "relative-base": Variant("appo", "relative attention, base weight 0.2", RELATIVE | {"normalize_weights": False}),
    "raw-base": Variant("appo", "raw attention, base weight 0.2, mean one", RAW_BASE),
    "raw-select": Variant(
        "appo",
        "raw attention, 1 for chosen tokens, 0.2 for others, mean one",
        RAW_BASE | {"max_weight": 1.0},
    ),
    "shuffled": Variant("appo", "appo-relative, weights shuffled within each response", RELATIVE, shuffled),
    "appo-shuffled": Variant("appo", "appo, weights shuffled within each response", {}, shuffled),
    "random-frames": Variant("appo", "raw-base with random frames as crucial ones", RAW_BASE, random_frames),
    "oracle-frames": Variant("appo", "appo-relative with the true frames as crucial ones", RELATIVE, true_frames),
    "oracle-tokens": Variant(
        "appo", "weight on the words that decide only, mean one", {"normalize_weights": True}, decisive_tokens
    ),
    "lr-control": Variant("dapo", "DAPO, learning rate times appo's mean weight", needs="appo"),
    "tw-grpo": Variant("appo", "DAPO with TW-GRPO's weights by position", {}, same_position),
    "entropy": Variant("dapo", "DAPO on the fifth of tokens with the highest entropy", {"top_entropy_quantile": 0.2}),
    "sft": Variant("sft", "supervised, the answers of the same rows"),
    "sft-reasoning": Variant("sft", "supervised, with a teacher's reasoning", reasoning=True),
}


def variant_of(name: str) -> Variant:
    """One of `VARIANTS`, or one with settings of :class:`appo.APPOConfig` changed: ``appo+frame_tokens=16``.

    Raises:
        ValueError: there is no such variant, or it has no such setting; one line with the fix.
    """
    base, *changes = name.split("+")
    if base not in VARIANTS:
        raise ValueError(f"unknown method {base!r}: choose from {', '.join(VARIANTS)}")
    settings = dict(_setting(name, change) for change in changes)
    variant = VARIANTS[base]
    if settings and variant.method == "":
        raise ValueError(f"method {name}: {base} is not trained and has no settings")
    if not settings:
        return variant
    meaning = ", ".join([base, *(f"{key} {value}" for key, value in settings.items())])
    return replace(variant, settings={**variant.settings, **settings}, meaning=meaning)


def variants_of(names: list[str]) -> list[str]:
    """The names, checked.

    Raises:
        ValueError: one is unknown, given twice, or needs another that is not there; one line with the fix.
    """
    for name in names:
        needed = variant_of(name).needs
        if names.count(name) > 1:
            raise ValueError(f"method {name} is given twice: name it once")
        if needed and needed not in names:
            raise ValueError(f"method {name} needs the mean weight of {needed}: add {needed} to --methods")
    return names


def in_order(names: Iterable[str]) -> list[str]:
    """Names in the order of `VARIANTS`, each followed by those with settings changed."""
    places = {name: place for place, name in enumerate(VARIANTS)}
    return sorted(names, key=lambda name: (places[name.partition("+")[0]], name))


def _setting(name: str, change: str) -> tuple[str, Any]:
    """``key=value`` as a setting; the value is read as YAML reads it, as in a recipe."""
    key, given, text = change.partition("=")
    if not given or key not in APPOConfig.__dataclass_fields__:
        raise ValueError(f"method {name}: {change!r} is no setting=value of APPOConfig")
    value = yaml.safe_load(text)
    # YAML 1.1 takes 1e-4 for a word.
    with contextlib.suppress(TypeError, ValueError):
        value = float(value) if isinstance(value, str) else value
    return key, value
