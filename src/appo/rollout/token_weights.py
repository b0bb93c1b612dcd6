"""Method steps 2-8 for scored groups: the token weights of the policy that sampled them.

Shape suffixes: Q groups of a rollout, G responses, N response tokens (padded), F frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from appo.method.attention_baseline import FrameShares, Sums, relative_attention
from appo.method.perception import token_weights
from appo.models.log_probs import log_probs_at
from appo.types import Group, GroupScores, PerceptionWeights


def weigh(
    model: Any,
    scores: GroupScores,
    accuracy_G: Tensor,
    *,
    temperature: float = 1.0,
    base_weight: float = 1.0,
    **weight_settings: Any,
) -> PerceptionWeights:
    """The token weights of one group; logits are made in tiles, for the tokens that need them. No gradient flows.

    Args:
        model: the policy, for its LM head.
        scores: of the group, with frame attention captured.
        accuracy_G: accuracy reward of each response; NaN (not scored) counts as lost.
        temperature: the sampling temperature.
        base_weight: of tokens that no crucial frame chose (:func:`with_base`).
        weight_settings: of :func:`appo.method.perception.token_weights`.

    Raises:
        ValueError: the scores hold no frame attention, or as ``token_weights`` does.
    """
    if scores.frame_attention_GNF is None:
        raise ValueError("the group was scored without capturing frame attention: set capture_layers to at least 1")
    weights = token_weights(
        scores.frame_attention_GNF,
        scores.mask_GN,
        accuracy_G.nan_to_num(0.0).to(scores.mask_GN.device),
        log_probs_at(model, scores, temperature=temperature),
        **weight_settings,
    )
    return with_base(weights, scores.mask_GN, base_weight)


def with_base(weights: PerceptionWeights, mask_GN: Tensor, base_weight: float) -> PerceptionWeights:
    """The weights with `base_weight` for tokens that no crucial frame chose; 1 is the paper's (others: method.md).

    A group without crucial frames keeps its weights of 1: nothing is known about its tokens. Padding keeps 1.
    """
    if base_weight == 1 or not weights.crucial_F.any():
        return weights
    unchosen_GN = mask_GN & ~weights.chosen_GN
    return replace(weights, weights_GN=weights.weights_GN.masked_fill(unchosen_GN, base_weight))


@dataclass
class Weigher:
    """The weights of a rollout's groups, with what relative attention remembers of the rollouts before."""

    settings: Mapping[str, Any]  # of :func:`weigh`, but for the temperature
    accuracy_column: int = 0  # which of a sample's rewards splits winners from losers
    temperature: float = 1.0  # the sampling temperature
    frame_attention: str = "raw"  # ``raw``, or ``relative`` to the frame's usual share
    shares: FrameShares = field(default_factory=FrameShares)  # the usual shares

    def remember(self, groups_Q: Sequence[Group], over_processes: Callable[[Sums], list[Sums]]) -> None:
        """Take a rollout's attention in, before any of its groups is weighed. All processes must call it.

        Args:
            groups_Q: the groups; those without scores have no frames.
            over_processes: as in :meth:`appo.method.attention_baseline.FrameShares.update`.
        """
        if self.frame_attention == "relative":
            seen = [group.scores for group in groups_Q if group.scores is not None]
            pairs = [(s.frame_attention_GNF, s.mask_GN) for s in seen if s.frame_attention_GNF is not None]
            self.shares.update(pairs, over_processes)

    def attention(self, scores: GroupScores) -> GroupScores:
        """The scores with the attention that the weights are made from."""
        attn_GNF = scores.frame_attention_GNF
        if self.frame_attention == "raw" or attn_GNF is None:
            return scores
        mean_F = self.shares.mean(attn_GNF.shape[2])
        return replace(scores, frame_attention_GNF=relative_attention(attn_GNF, scores.mask_GN, mean_F))

    def __call__(self, model: Any, group: Group) -> Group:
        """The group with its weights, if it has frame attention. Errors are those of :func:`weigh`."""
        if group.scores is None or group.scores.frame_attention_GNF is None:
            return group
        accuracy_G = group.rewards_GR[:, self.accuracy_column]
        scores, settings = self.attention(group.scores), {"temperature": self.temperature, **self.settings}
        return replace(group, weights=weigh(model, scores, accuracy_G, **settings))
