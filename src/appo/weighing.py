"""Method steps 2-8 for a scored group: the token weights of the policy that sampled it.

Shape suffixes: G responses.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from appo.perception import token_weights
from appo.scoring import log_probs_at
from appo.types import GroupScores, PerceptionWeights


def weigh(
    model: Any, scores: GroupScores, accuracy_G: Tensor, *, temperature: float = 1.0, **weight_settings: Any
) -> PerceptionWeights:
    """The token weights of one group; logits are made in tiles, for the tokens that need them. No gradient flows.

    Args:
        model: the policy, for its LM head.
        scores: of the group, with frame attention captured.
        accuracy_G: accuracy reward of each response; NaN (not scored) counts as lost.
        temperature: the sampling temperature.
        weight_settings: of :func:`appo.perception.token_weights`.

    Raises:
        ValueError: the scores hold no frame attention, or as ``token_weights`` does.
    """
    if scores.frame_attention_GNF is None:
        raise ValueError("the group was scored without capturing frame attention: set capture_layers to at least 1")
    return token_weights(
        scores.frame_attention_GNF,
        scores.mask_GN,
        accuracy_G.nan_to_num(0.0).to(scores.mask_GN.device),
        log_probs_at(model, scores, temperature=temperature),
        **weight_settings,
    )
