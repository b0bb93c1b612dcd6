"""Method steps 1-8 for one group: a scoring pass that captures frame attention, then the token weights.

Shape suffixes: G responses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from appo.perception import token_weights
from appo.scoring import log_probs_at, score_group
from appo.stopwatch import Stopwatch
from appo.types import GroupScores, PerceptionWeights


@torch.no_grad()
def weigh_group(
    model: Any,
    prompt: Mapping[str, Any],
    responses: Sequence[Tensor],
    accuracy_G: Tensor,
    *,
    capture_layers: int = 3,
    temperature: float = 1.0,
    shared_prefix: bool = True,
    watch: Stopwatch | None = None,
    **weight_settings: Any,
) -> tuple[GroupScores, PerceptionWeights]:
    """Score a group of the old policy and make its weights. No gradient flows through either.

    Args:
        model: the policy.
        prompt: encoded prompt of one video question.
        responses: G int64 tensors.
        accuracy_G: accuracy reward of each response; NaN (not scored) counts as lost.
        capture_layers, temperature, shared_prefix: of :func:`appo.scoring.score_group`.
        watch: measures the parts ``score`` and ``weights``.
        weight_settings: of :func:`appo.perception.token_weights`.
    """
    watch = watch or Stopwatch()
    with watch("score"):
        scores = score_group(
            model,
            prompt,
            responses,
            capture_layers=capture_layers,
            temperature=temperature,
            shared_prefix=shared_prefix,
        )
    assert scores.frame_attention_GNF is not None
    with watch("weights"):
        weights = token_weights(
            scores.frame_attention_GNF,
            scores.mask_GN,
            accuracy_G.nan_to_num(0.0).to(scores.mask_GN.device),
            log_probs_at(model, scores.hidden_GNH, temperature=temperature),
            **weight_settings,
        )
    return scores, weights
