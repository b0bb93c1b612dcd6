"""Weights that attention did not make: the controls of a comparison. Only comparisons use them.

Each takes a scored group and gives weights in the place of the method's. What could explain a gain without attention is
ruled out (`shuffled`: the same weights, other tokens), and what attention could gain at most is measured with what only
the world knows (`true_frames`, `decisive_tokens`).

Shape suffixes: G responses of one group, N response tokens (padded), F frames, C crucial frames, K ranks of a frame.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from appo.experiments.compare.descriptions import decisive_words
from appo.method.perception import (
    LogProbs,
    chosen_tokens,
    combined_weights,
    minmax,
    perception_tokens,
    rank_divergence,
)
from appo.rollout.token_weights import Weigher, with_base
from appo.types import Group, GroupScores, PerceptionWeights


@dataclass(frozen=True)
class World:
    """What a control may look at, besides the group.

    Attributes:
        weigher: of the trainer: settings, and attention as the method takes it.
        log_probs: of a group's scores, as :func:`appo.method.perception.token_weights` takes them.
        tokenizer: token ids -> words.
        generator: random numbers of its own, so that those of training stay what they are.
    """

    weigher: Weigher
    log_probs: Callable[[GroupScores], LogProbs]
    tokenizer: Any
    generator: torch.Generator


Control = Callable[[Group, World], PerceptionWeights]


def shuffled(group: Group, world: World) -> PerceptionWeights:
    """The method's own weights, dealt out anew among the tokens of each response: the same step, other tokens."""
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
    """Steps 5-8 with as many frames as the method found crucial, drawn at random: the same attention, other frames."""
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
    """TW-GRPO's weights (arXiv 2505.24718): tokens are aligned by their position, not by what they look at.

    D_j = mean over the responses that have a token j of KL(p_ij || their mean), min-max over positions, weight
    1 + (max_weight - 1) * D_j; its authors' script has the same 1.7. It is our steps 6-8 with one «frame» whose rank j
    is position j. Its other changes (soft rewards for several answers, inverted questions) have no counterpart here.
    """
    scores, weights = _parts(group)
    position_GN = torch.arange(scores.mask_GN.shape[1], device=scores.mask_GN.device).expand(scores.mask_GN.shape)
    found = _weights_of(position_GN.masked_fill(~scores.mask_GN, -1)[None], scores, world)
    return replace(found, crucial_F=weights.crucial_F, scores_GF=weights.scores_GF)


def _weights_of(tokens_CGK: Tensor, scores: GroupScores, world: World) -> PerceptionWeights:
    """Steps 6-8 of the method for tokens that are chosen already."""
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
