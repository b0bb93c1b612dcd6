"""What is compared, by name: the paper's methods, baselines of the field, variants not in the paper, and controls.

A control gives a scored group weights that attention did not make. `shuffled` rules out a gain without attention (the
same weights on other tokens); `true_frames` and `decisive_tokens` bound what attention could gain.

Shape suffixes: G responses of one group, N response tokens (padded), F frames, C crucial frames, K ranks of a frame.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import yaml
from torch import Tensor

from appo.experiments.compare.measurements import decisive_words
from appo.method.perception import (
    LogProbs,
    chosen_tokens,
    combined_weights,
    minmax,
    perception_tokens,
    rank_divergence,
)
from appo.rollout.token_weights import Weigher, with_base
from appo.training.config import APPOConfig
from appo.types import Group, GroupScores, PerceptionWeights

# --- controls --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """What a control may use besides the group."""

    weigher: Weigher  # of the trainer: settings, and attention as the method takes it
    # of a group's scores, as `appo.method.perception.token_weights` takes them
    log_probs: Callable[[GroupScores], LogProbs]
    tokenizer: Any  # token ids -> words
    generator: torch.Generator  # random numbers of its own, so that those of training stay what they are


Control = Callable[[Group, World], PerceptionWeights]


def shuffled(group: Group, world: World) -> PerceptionWeights:
    """The method's weights, permuted within each response: the same step, other tokens."""
    scores, weights = _parts(group)
    order_GN = torch.arange(scores.mask_GN.shape[1]).repeat(len(scores.mask_GN), 1)
    for row_N, mask_N in zip(order_GN, scores.mask_GN.cpu(), strict=True):
        real = mask_N.nonzero()[:, 0]
        row_N[real] = real[torch.randperm(len(real), generator=world.generator)]
    order_GN = order_GN.to(weights.weights_GN.device)
    dealt = {name: getattr(weights, name).gather(1, order_GN) for name in ("weights_GN", "chosen_GN")}
    return replace(weights, **dealt)


def true_frames(group: Group, world: World) -> PerceptionWeights:
    """Steps 5-8 with the frames that truly show the answer as the crucial ones."""
    scores, weights = _parts(group)
    crucial_F = torch.zeros_like(weights.crucial_F)
    crucial_F[torch.tensor(group.question.event_frames, device=crucial_F.device)] = True
    return _with_frames(crucial_F, scores, weights, world)


def random_frames(group: Group, world: World) -> PerceptionWeights:
    """Steps 5-8 with random frames as crucial ones, as many as the method found: the same attention, other frames."""
    scores, weights = _parts(group)
    order_F = torch.randperm(len(weights.crucial_F), generator=world.generator).to(weights.crucial_F.device)
    return _with_frames(weights.crucial_F[order_F], scores, weights, world)


def _with_frames(crucial_F: Tensor, scores: GroupScores, weights: PerceptionWeights, world: World) -> PerceptionWeights:
    settings = world.weigher.settings
    attn_GNF = world.weigher.attention(scores).frame_attention_GNF
    assert attn_GNF is not None
    tokens_CGK = perception_tokens(attn_GNF, scores.mask_GN, crucial_F, settings["frame_tokens"])
    found = replace(_weights_of(tokens_CGK, scores, world), crucial_F=crucial_F, scores_GF=weights.scores_GF)
    return with_base(found, scores.mask_GN, settings["base_weight"])


def decisive_tokens(group: Group, world: World) -> PerceptionWeights:
    """1 for the words that decide the answer (:func:`decisive_words`), 0 for all others."""
    scores, weights = _parts(group)
    chosen_GN = torch.zeros_like(scores.mask_GN)
    for row_N, sample in zip(chosen_GN, group.samples, strict=True):
        words = [world.tokenizer.decode([token]).strip() for token in sample.ids]
        row_N[: len(words)] = torch.tensor(decisive_words(words), device=row_N.device)
    return replace(weights, weights_GN=chosen_GN.float(), chosen_GN=chosen_GN)


def same_position(group: Group, world: World) -> PerceptionWeights:
    """TW-GRPO's weights (arXiv 2505.24718): tokens are aligned by position, not by attention.

    D_j = mean over the responses that have a token j of KL(p_ij || their mean), min-max over positions, weight
    1 + (max_weight - 1) * D_j; its authors' script has the same 1.7. These are steps 6-8 with one «frame» whose rank j
    is position j. Its other changes (soft rewards for several answers, inverted questions) have no counterpart here.
    """
    scores, weights = _parts(group)
    position_GN = torch.arange(scores.mask_GN.shape[1], device=scores.mask_GN.device).expand(scores.mask_GN.shape)
    found = _weights_of(position_GN.masked_fill(~scores.mask_GN, -1)[None], scores, world)
    return replace(found, crucial_F=weights.crucial_F, scores_GF=weights.scores_GF)


def _weights_of(tokens_CGK: Tensor, scores: GroupScores, world: World) -> PerceptionWeights:
    """Steps 6-8 of the method for given tokens."""
    settings, length = world.weigher.settings, scores.mask_GN.shape[1]
    divergence_CK = rank_divergence(world.log_probs(scores), tokens_CGK, settings["divergence"])
    level_CK = minmax(divergence_CK, exists_CK=(tokens_CGK >= 0).any(dim=1))
    return PerceptionWeights(
        weights_GN=combined_weights(level_CK, tokens_CGK, length, settings["max_weight"]),
        crucial_F=torch.ones(len(tokens_CGK), dtype=torch.bool),
        scores_GF=torch.zeros(len(scores.mask_GN), len(tokens_CGK)),
        chosen_GN=chosen_tokens(tokens_CGK, length),
    )


def _parts(group: Group) -> tuple[GroupScores, PerceptionWeights]:
    assert group.scores is not None
    assert group.weights is not None
    return group.scores, group.weights


# --- variants --------------------------------------------------------------------------------------------------------


RELATIVE: dict[str, Any] = {"frame_attention": "relative", "base_weight": 0.2, "normalize_weights": True}
RAW_BASE = RELATIVE | {"frame_attention": "raw"}
ORACLES = ("oracle-tokens", "oracle-frames")


@dataclass(frozen=True)
class Variant:
    """A training method with its settings."""

    method: str  # of :class:`appo.APPOConfig`; empty: no training
    meaning: str  # a line for the reader of the table
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the config, where they differ from the demo's
    control: Control | None = None  # makes the weights instead of attention
    reasoning: bool = False  # sft only: whether the targets include the teacher's reasoning
    # the variant that runs before, and whose mean weight multiplies the learning rate
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
    """The names. Raises ValueError if one is unknown, given twice, or needs another that is missing."""
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
