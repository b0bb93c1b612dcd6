"""Whether a group attends to the frames that show the answer: the world's true event frames, unknown to training.

Shape suffixes: G responses of one group, N response tokens (padded), F frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from appo.experiments.compare.held_out import HeldOut, sampled
from appo.method.attention_baseline import FrameShares, relative_attention, video_shares
from appo.method.perception import crucial_frames, looked_at_frames, response_frame_scores
from appo.models.log_probs import score_group
from appo.rewards.functions import score_answer
from appo.types import Group, GroupScores


def attention_on_events(scores: GroupScores, is_winner_G: torch.Tensor, events: Sequence[int]) -> dict[str, float]:
    """``winners`` and ``losers``: the mean share of attention to the video that is on the true frames.

    A group without winners (losers) has no such entry. By chance it is len(events) / F.
    """
    assert scores.frame_attention_GNF is not None
    shares_GNF = video_shares(scores.frame_attention_GNF, scores.mask_GN)
    on_events_GN = shares_GNF[..., list(events)].sum(dim=-1)
    mean_G = on_events_GN.sum(dim=1) / scores.mask_GN.sum(dim=1).clamp(min=1)
    is_winner_G = is_winner_G.to(mean_G.device)
    sides = {"winners": mean_G[is_winner_G], "losers": mean_G[~is_winner_G]}
    return {name: float(side.mean()) for name, side in sides.items() if len(side)}


def recall(crucial_F: torch.Tensor, events: Sequence[int]) -> float:
    """Share of the true frames that are among the crucial ones."""
    return float(crucial_F[list(events)].float().mean())


def averaged(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every name over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: sum(values) / len(values) for name, values in columns.items()}


def group_perception(group: Group, accuracy_column: int, threshold: float) -> dict[str, float]:
    """What a group with weights found: nothing where the row has no true frames.

    Args:
        group: of a training step.
        accuracy_column: which of a sample's rewards splits winners from losers.
        threshold: a response with at least this much of it is a winner.

    Returns:
        ``recall`` of the true frames, ``crucial``: the share of frames that are (what chance would recall), and
        :func:`attention_on_events`.
    """
    events = group.question.event_frames
    if group.scores is None or group.weights is None or not events:
        return {}
    is_winner_G = group.rewards_GR[:, accuracy_column] >= threshold
    found = {
        "recall": recall(group.weights.crucial_F, events),
        "crucial": float(group.weights.crucial_F.float().mean()),
    }
    return {**found, **attention_on_events(group.scores, is_winner_G, events)}


@torch.no_grad()
def perceive(
    model: Any, processor: Any, held_out: HeldOut, responses: int, seed: int, settings: Mapping[str, Any]
) -> dict[str, float]:
    """What a policy looks at while it answers, however it was trained: the same questions, the same random numbers.

    Args:
        model: the policy.
        processor: its processor.
        held_out: each question is answered by a group of sampled responses.
        responses: G.
        seed: of the sampling; the random numbers of whoever calls are left alone.
        settings: ``score_tokens``, ``top_frames``, ``strategy`` and ``threshold`` of the crucial frames.

    Returns:
        means over the questions of :func:`attention_on_events`, and of :func:`recall` among the crucial frames found
        by raw and by relative attention (``recall_raw``, ``recall_relative``), over groups with a winner, with the
        share of frames that are crucial (``crucial_raw``, ``crucial_relative``), which is what chance would recall.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        groups = sampled(model, processor, held_out.prompts, responses=responses, temperature=1.0)
    rows, shares = [], FrameShares()
    scored = [score_group(model, prompt, ids_G) for prompt, ids_G in zip(held_out.prompts, groups, strict=True)]
    shares.update((s.frame_attention_GNF, s.mask_GN) for s in scored if s.frame_attention_GNF is not None)
    for question, ids_G, scores in zip(held_out.questions, groups, scored, strict=True):
        texts = processor.batch_decode(ids_G, skip_special_tokens=True)
        accuracy_G = torch.tensor([score_answer(text, question.answer, question.kind) for text in texts])
        rows.append(_found(scores, accuracy_G, question.event_frames or (), shares, settings))
    return averaged(rows)


def _found(
    scores: GroupScores,
    accuracy_G: torch.Tensor,
    events: Sequence[int],
    shares: FrameShares,
    settings: Mapping[str, Any],
) -> dict[str, float]:
    """What `perceive` averages, of one group."""
    attn_GNF, is_winner_G = scores.frame_attention_GNF, accuracy_G >= settings["threshold"]
    assert attn_GNF is not None
    row = attention_on_events(scores, is_winner_G, events)
    usual_F = shares.mean(attn_GNF.shape[2])
    attentions = {"raw": attn_GNF, "relative": relative_attention(attn_GNF, scores.mask_GN, usual_F)}
    for name, own_GNF in attentions.items() if bool(is_winner_G.any()) else ():
        scores_GF = response_frame_scores(own_GNF, scores.mask_GN, settings["score_tokens"])
        looked_at_GF = looked_at_frames(scores_GF, scores.mask_GN, settings["top_frames"])
        crucial_F = crucial_frames(looked_at_GF, accuracy_G, settings["threshold"], settings["strategy"])
        row |= {f"recall_{name}": recall(crucial_F, events), f"crucial_{name}": float(crucial_F.float().mean())}
    return row
