"""The method: attention to frames becomes one weight per token, in the paper's order (docs/method.md, 2-8).

Pure functions of tensors; one group (a prompt and its responses) goes through

  attn_GNF -> scores_GF -> looked_at_GF -> crucial_F -> tokens_CGK -> divergence_CK -> level_CK -> weights_GN

and `token_weights` is that line written out. No gradient flows through any of it.

Shape suffixes: G responses of one group, N response tokens (padded), F frames as the language model sees
them, V vocabulary, C crucial frames in ascending order, K ranks of a frame (the k-th token of each response's
choice), R ranks of several frames, U distinct tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from appo.types import PerceptionWeights

LogProbs = Callable[[Tensor, Tensor], Tensor]
"""``(i_n, j_n) -> (n, V)``: next-token log-probabilities that emitted token ``j`` of response ``i``.

If it also has ``tiles(i_n, j_n)``, which yields the same in pieces along V, no (n, V) is ever asked for."""

TILE_ROWS = 128
"""Most log-probability rows asked for and compared at once; 128 over 152k words are 78 MB in float32."""

LOG_PROB_FLOOR = -70.0
"""``k3`` reads log-probabilities no lower: exp(70) summed over 152k words is still finite in float32."""

SPREAD_TOLERANCE = 1e-6
"""Divergences of a frame no further apart (relative above 1) are equal: the rest is float32 round-off."""


@torch.no_grad()
def token_weights(
    attn_GNF: Tensor,
    mask_GN: Tensor,
    rewards_G: Tensor,
    log_probs_GNV: Tensor | LogProbs,
    *,
    threshold: float = 0.5,
    strategy: str = "soft",
    score_tokens: int = 15,
    top_frames: int = 3,
    frame_tokens: int = 64,
    max_weight: float = 1.7,
    divergence: str = "kl",
) -> PerceptionWeights:
    """Weight each token of a group by how differently its responses go on after looking at the same frame.

    Args:
        attn_GNF: floating (G, N, F), attention from the query that emits a token to each frame.
        mask_GN: bool (G, N), True on real response tokens; anything may stand in the padded places.
        rewards_G: (G,), accuracy rewards.
        log_probs_GNV: floating (G, N, V), the old policy's log-probabilities at the sampling temperature, or
            a callable ``(i_n, j_n) -> (n, V)`` giving those of the tokens asked for. -inf means impossible.
        threshold: a response with at least this reward is high (step 4).
        strategy: ``soft``, ``hard`` or ``all``: which responses name the crucial frames (step 4).
        score_tokens: K1, tokens averaged into a response's score for a frame (step 2).
        top_frames: K2, frames a response looked at (step 3).
        frame_tokens: K3, tokens each response contributes to a crucial frame (step 5).
        max_weight: the weight of the most divergent rank; 1 gives exactly ones (step 8).
        divergence: ``kl``, the paper's formula, or ``k3``, the released code's without its padding (step 6).

    Returns:
        Weights, crucial frames, scores, chosen tokens. All weights are 1 if no frame is crucial or G = 1.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value; the message names it.

    Source: method.md steps 2-8.
    """
    _check_settings(threshold, score_tokens, top_frames, frame_tokens, max_weight)
    _check_tensors(attn_GNF, mask_GN, rewards_G, log_probs_GNV)
    scores_GF = response_frame_scores(attn_GNF, mask_GN, score_tokens)
    looked_at_GF = looked_at_frames(scores_GF, mask_GN, top_frames)
    crucial_F = crucial_frames(looked_at_GF, rewards_G, threshold, strategy)
    tokens_CGK = perception_tokens(attn_GNF, mask_GN, crucial_F, frame_tokens)
    divergence_CK = rank_divergence(log_probs_GNV, tokens_CGK, divergence)
    level_CK = minmax(divergence_CK, exists_CK=(tokens_CGK >= 0).any(dim=1))
    return PerceptionWeights(
        weights_GN=combined_weights(level_CK, tokens_CGK, mask_GN.shape[1], max_weight),
        crucial_F=crucial_F,
        scores_GF=scores_GF.float(),
        chosen_GN=chosen_tokens(tokens_CGK, mask_GN.shape[1]),
    )


def response_frame_scores(attn_GNF: Tensor, mask_GN: Tensor, score_tokens: int = 15) -> Tensor:
    """Mean of each response's `score_tokens` largest attentions to each frame (step 2).

    Returns:
        scores_GF, (G, F) in float32, or float64 for float64 attention. A response with fewer tokens averages
        those it has; one with none scores 0.
    """
    attn_GNF = _only_valid(attn_GNF, mask_GN)
    length_G = mask_GN.sum(dim=1)
    # topk may take any of equal values: their sum is the same.
    best_GKF = attn_GNF.topk(min(score_tokens, attn_GNF.shape[1]), dim=1).values
    is_taken_GK = torch.arange(best_GKF.shape[1], device=length_G.device) < length_G[:, None]
    # Added one by one, best first: how sum() rounds depends on the shape, which could part frames that are tied.
    total_GF = attn_GNF.new_zeros(attn_GNF.shape[0], attn_GNF.shape[2])
    for best_GF in best_GKF.masked_fill(~is_taken_GK[..., None], 0.0).unbind(dim=1):
        total_GF = total_GF + best_GF
    return total_GF / length_G.clamp(min=1, max=score_tokens)[:, None]


def looked_at_frames(scores_GF: Tensor, mask_GN: Tensor, top_frames: int = 3) -> Tensor:
    """Each response's `top_frames` highest scoring frames (step 3); of equal scores the earlier frame.

    Returns:
        looked_at_GF, bool (G, F); all False for a response without tokens.
    """
    # topk promises no order among equals; a stable sort does.
    order_GF = scores_GF.sort(dim=1, descending=True, stable=True).indices
    looked_at_GF = torch.zeros_like(scores_GF, dtype=torch.bool).scatter_(1, order_GF[:, :top_frames], True)
    return looked_at_GF & mask_GN.any(dim=1, keepdim=True)


def crucial_frames(looked_at_GF: Tensor, rewards_G: Tensor, threshold: float = 0.5, strategy: str = "soft") -> Tensor:
    """Frames worth comparing (step 4): what winners looked at, only winners did, or anyone did.

    Returns:
        crucial_F, bool (F,).

    Raises:
        ValueError: `strategy` is none of ``soft``, ``hard``, ``all``.
    """
    is_high_G = rewards_G.to(looked_at_GF.device) >= threshold
    winners_F = looked_at_GF[is_high_G].any(dim=0)
    losers_F = looked_at_GF[~is_high_G].any(dim=0)
    crucial_of = {"soft": winners_F, "hard": winners_F & ~losers_F, "all": winners_F | losers_F}
    if strategy not in crucial_of:
        raise ValueError(f"strategy must be one of {', '.join(crucial_of)}, not {strategy!r}")
    return crucial_of[strategy]


def perception_tokens(attn_GNF: Tensor, mask_GN: Tensor, crucial_F: Tensor, frame_tokens: int = 64) -> Tensor:
    """Each response's `frame_tokens` tokens with the highest attention to each crucial frame (step 5).

    Sorted by position, so that index k (the rank) aligns tokens of different responses. Of equal attentions
    the earlier token is chosen. A response with fewer tokens gives all it has.

    Returns:
        tokens_CGK, int64 (C, G, K) positions, K = min(frame_tokens, N); -1 where a response has no rank k.
    """
    N = attn_GNF.shape[1]
    attn_CGN = _only_valid(attn_GNF[..., crucial_F], mask_GN).permute(2, 0, 1)
    order_CGN = attn_CGN.sort(dim=2, descending=True, stable=True).indices
    best_CGK = order_CGN[..., : min(frame_tokens, N)]
    is_absent_GK = torch.arange(best_CGK.shape[2], device=best_CGK.device) >= mask_GN.sum(dim=1)[:, None]
    # N is past every position: absent tokens sort to the end.
    tokens_CGK = best_CGK.masked_fill(is_absent_GK, N).sort(dim=2).values
    return tokens_CGK.masked_fill(tokens_CGK == N, -1)


def rank_divergence(log_probs_GNV: Tensor | LogProbs, tokens_CGK: Tensor, divergence: str = "kl") -> Tensor:
    """How far the responses disagree about what follows, at each rank of each crucial frame (step 6).

    A rank that fewer than two responses have gets 0, and its tokens are not asked for. Equal ranks of several
    frames (the rule when responses are shorter than `frame_tokens`) are computed once. The rest goes in tiles
    of at most `TILE_ROWS` tokens (or one rank), each token asked for once a tile. A rank needs its responses
    together, so asking once over all tiles would mean keeping nearly G*N rows. Ranks are sorted by position,
    which puts those that share tokens into the same tile.

    Returns:
        divergence_CK, (C, K) in float32, or float64 for float64 log-probabilities.

    Raises:
        ValueError: unknown `divergence`, or log-probabilities asked for are NaN, +inf or misshapen.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, not {divergence!r}")
    C, G, K = tokens_CGK.shape
    tokens_RG = tokens_CGK.transpose(1, 2).reshape(C * K, G)
    is_shared_R = (tokens_RG >= 0).sum(dim=1) >= 2
    if not is_shared_R.any():
        return torch.zeros(C, K, device=tokens_CGK.device)
    distinct_RG, index_R = torch.unique(tokens_RG[is_shared_R], dim=0, return_inverse=True)
    tiles = []
    for tile_RG in distinct_RG.split(max(1, TILE_ROWS // G)):
        # Both divergences are sums over the vocabulary, so they add up over pieces of it.
        pieces = [DIVERGENCES[divergence](piece, tile_RG >= 0) for piece in _fetch(log_probs_GNV, tile_RG)]
        tiles.append(torch.stack(pieces).sum(dim=0).clamp(min=0.0))
    values_R = torch.cat(tiles)
    divergence_R = values_R.new_zeros(C * K)
    divergence_R[is_shared_R] = values_R[index_R]
    return divergence_R.view(C, K)


def kl_to_mean(log_probs_RGV: Tensor, present_RG: Tensor) -> Tensor:
    """Mean over the responses present of KL(p_i || m), m the arithmetic mean of the p_i (step 6).

    Lies in [0, log G] up to rounding, summed over V (a piece alone can be negative). Exact for p = 0.

    Returns:
        (R,), in the dtype of `log_probs_RGV`.
    """
    log_probs_RGV = log_probs_RGV.masked_fill(~present_RG[..., None], -torch.inf)
    count_R = present_RG.sum(dim=1).clamp(min=1)
    # Relative to the largest, equal distributions have a mean of exactly 1 and a divergence of exactly 0.
    top_R1V = log_probs_RGV.amax(dim=1, keepdim=True)
    shifted_RGV = log_probs_RGV - top_R1V.masked_fill(top_R1V == -torch.inf, 0.0)
    log_mean_R1V = (shifted_RGV.exp().sum(dim=1, keepdim=True) / count_R[:, None, None]).log()
    p_RGV = log_probs_RGV.exp()
    terms_RGV = torch.where(p_RGV > 0, p_RGV * (shifted_RGV - log_mean_R1V), 0.0)
    return terms_RGV.sum(dim=(1, 2)) / count_R


def k3_to_mean(log_probs_RGV: Tensor, present_RG: Tensor) -> Tensor:
    """The released code's divergence, over the responses present only (step 6, Decision).

    With m the mean of the log-probabilities and d = m - log p_i: the mean over responses of the sum over the
    vocabulary of exp(d) - d - 1. Log-probabilities below `LOG_PROB_FLOOR`, such as -inf, count as that floor.

    Returns:
        (R,), in the dtype of `log_probs_RGV`; not bounded by log G.
    """
    is_absent_RG1 = ~present_RG[..., None]
    log_probs_RGV = log_probs_RGV.clamp(min=LOG_PROB_FLOOR).masked_fill(is_absent_RG1, 0.0)
    count_R = present_RG.sum(dim=1).clamp(min=1)
    d_RGV = log_probs_RGV.sum(dim=1, keepdim=True) / count_R[:, None, None] - log_probs_RGV
    terms_RGV = (d_RGV.expm1() - d_RGV).masked_fill(is_absent_RG1, 0.0)
    return terms_RGV.sum(dim=(1, 2)) / count_R


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"kl": kl_to_mean, "k3": k3_to_mean}


def minmax(divergence_CK: Tensor, exists_CK: Tensor) -> Tensor:
    """Scale the divergences of each frame to [0, 1] over the ranks that exist (step 7); all equal gives 0.

    A rank that one response has exists, with divergence 0. Equal means: within `SPREAD_TOLERANCE`.

    Returns:
        level_CK, (C, K); 0 where the rank does not exist.
    """
    if divergence_CK.shape[1] == 0:
        return divergence_CK
    low_C1 = divergence_CK.masked_fill(~exists_CK, torch.inf).amin(dim=1, keepdim=True)
    high_C1 = divergence_CK.masked_fill(~exists_CK, -torch.inf).amax(dim=1, keepdim=True)
    spread_C1 = high_C1 - low_C1
    is_apart_C1 = spread_C1 > SPREAD_TOLERANCE * high_C1.clamp(min=1.0)
    level_CK = (divergence_CK - low_C1) / spread_C1
    return torch.where(exists_CK & is_apart_C1, level_CK, 0.0)


def chosen_tokens(tokens_CGK: Tensor, length: int) -> Tensor:
    """Which tokens any crucial frame chose: the intra-group perception tokens (step 5).

    Returns:
        chosen_GN, bool (G, length).
    """
    return _at_positions(torch.ones_like(tokens_CGK[:, 0], dtype=torch.bool), tokens_CGK, length).any(dim=0)


def combined_weights(level_CK: Tensor, tokens_CGK: Tensor, length: int, max_weight: float = 1.7) -> Tensor:
    """1 + (max_weight - 1) * mean of the levels over the crucial frames that chose the token (step 8).

    Returns:
        weights_GN, float32 (G, length) in [1, max_weight]; exactly 1 where no frame chose the token.
    """
    # Summed over a dense (C, G, N), not scatter-added, so that the order of summation is fixed.
    total_GN = _at_positions(level_CK, tokens_CGK, length).sum(dim=0)
    count_GN = _at_positions(torch.ones_like(level_CK), tokens_CGK, length).sum(dim=0)
    mean_GN = total_GN / count_GN.clamp(min=1)
    return (1.0 + (max_weight - 1.0) * mean_GN).float().clamp(max=max_weight)


def _at_positions(values_CK: Tensor, tokens_CGK: Tensor, length: int) -> Tensor:
    """(C, G, length): the value of the rank a token has in a frame; 0 where the frame did not choose it."""
    C, G, _ = tokens_CGK.shape
    # Absent ranks are written to a column past the end, which is cut off.
    column_CGK = tokens_CGK.masked_fill(tokens_CGK < 0, length)
    table_CGN = values_CK.new_zeros(C, G, length + 1)
    return table_CGN.scatter_(2, column_CGK, values_CK[:, None].expand_as(column_CGK))[..., :length]


def _only_valid(attn_GNF: Tensor, mask_GN: Tensor) -> Tensor:
    """Attention in float32 or wider, -inf in padded places whatever stood there."""
    return _at_least_float32(attn_GNF).masked_fill(~mask_GN[..., None], -torch.inf)


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _fetch(log_probs_GNV: Tensor | LogProbs, tokens_RG: Tensor) -> Iterator[Tensor]:
    """Pieces (R, G, v) of some ranks' log-probabilities, each distinct token read once; arbitrary where absent."""
    present_RG = tokens_RG >= 0
    i_n, j_n = present_RG.nonzero()[:, 1], tokens_RG[present_RG]
    pairs_U2, index_n = torch.unique(torch.stack([i_n, j_n], dim=1), dim=0, return_inverse=True)
    index_RG = torch.zeros_like(tokens_RG).masked_scatter_(present_RG, index_n)
    for rows_Uv in _read(log_probs_GNV, *pairs_U2.unbind(dim=1)):
        if rows_Uv.ndim != 2 or rows_Uv.shape[0] != len(pairs_U2):
            raise ValueError(f"log_probs_GNV must give ({len(pairs_U2)}, V), not {tuple(rows_Uv.shape)}")
        if not (rows_Uv < torch.inf).all():
            raise ValueError("log_probs_GNV has NaN or +inf at a token that mask_GN calls real")
        yield _at_least_float32(rows_Uv)[index_RG]


def _read(log_probs_GNV: Tensor | LogProbs, i_U: Tensor, j_U: Tensor) -> Iterable[Tensor]:
    if isinstance(log_probs_GNV, Tensor):
        return [log_probs_GNV[i_U, j_U]]
    return log_probs_GNV.tiles(i_U, j_U) if hasattr(log_probs_GNV, "tiles") else [log_probs_GNV(i_U, j_U)]


def _check_settings(threshold: float, score_tokens: int, top_frames: int, frame_tokens: int, max_weight: float) -> None:
    """Raise ValueError, naming the argument, unless every number makes sense."""
    counts = {"score_tokens": score_tokens, "top_frames": top_frames, "frame_tokens": frame_tokens}
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    if math.isnan(threshold):
        raise ValueError("threshold must be a number, not NaN")
    if not 1.0 <= max_weight < math.inf:
        raise ValueError(f"max_weight must be finite and at least 1, not {max_weight!r}")


def _check_tensors(attn_GNF: Tensor, mask_GN: Tensor, rewards_G: Tensor, log_probs_GNV: Tensor | LogProbs) -> None:
    """Raise ValueError, naming the argument, unless the tensors describe one group."""
    if attn_GNF.ndim != 3 or len(attn_GNF) == 0 or not attn_GNF.is_floating_point():
        raise ValueError(f"attn_GNF must be floating (G, N, F), G >= 1, not {_described(attn_GNF)}")
    G, N, _ = attn_GNF.shape
    if mask_GN.shape != (G, N) or mask_GN.dtype != torch.bool or mask_GN.device != attn_GNF.device:
        raise ValueError(f"mask_GN must be bool ({G}, {N}) on {attn_GNF.device}, not {_described(mask_GN)}")
    if not attn_GNF.isfinite()[mask_GN].all():
        raise ValueError("attn_GNF must be finite where mask_GN is True")
    if rewards_G.shape != (G,) or not rewards_G.isfinite().all():
        raise ValueError(f"rewards_G must be {G} finite numbers, not {rewards_G.tolist()}")
    if not isinstance(log_probs_GNV, Tensor):
        if not callable(log_probs_GNV):
            raise ValueError("log_probs_GNV must be a tensor (G, N, V) or a callable (i_n, j_n) -> (n, V)")
    elif (
        log_probs_GNV.ndim != 3
        or log_probs_GNV.shape[:2] != (G, N)
        or not log_probs_GNV.is_floating_point()
        or log_probs_GNV.device != attn_GNF.device
    ):
        need = f"floating ({G}, {N}, V) on {attn_GNF.device}"
        raise ValueError(f"log_probs_GNV must be {need}, not {_described(log_probs_GNV)}")


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
