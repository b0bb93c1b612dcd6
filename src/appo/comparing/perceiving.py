"""Whether a group looked where the answer is: with the world's true event frames, which training never sees.

Shape suffixes: G responses of one group, N response tokens (padded), F frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from appo.evaluate import Asking
from appo.groups import ScoredGroup
from appo.inspection import ask_group
from appo.perception import crucial_frames, looked_at_frames, response_frame_scores
from appo.relative import FrameShares, relative_attention, video_shares
from appo.rewards import score_answer
from appo.scoring import score_group
from appo.types import GroupScores, VideoQA


def looked(scores: GroupScores, accuracy_G: torch.Tensor, events: Sequence[int]) -> dict[str, float]:
    """``winners`` and ``losers``: the mean share of attention to the video that is on the true frames.

    A response without winners (losers) has no such entry. By chance it is len(events) / F.
    """
    assert scores.frame_attention_GNF is not None
    shares_GNF = video_shares(scores.frame_attention_GNF, scores.mask_GN)
    on_events_GN = shares_GNF[..., list(events)].sum(dim=-1)
    mean_G = on_events_GN.sum(dim=1) / scores.mask_GN.sum(dim=1).clamp(min=1)
    is_winner_G = accuracy_G.to(mean_G.device) >= 0.5
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


def group_perception(group: ScoredGroup) -> dict[str, float]:
    """Of a group with weights: ``recall`` of the true frames, ``crucial``: share of frames that are, :func:`looked`.

    A recall equal to the share of crucial frames is what chance gives.
    """
    events = group.samples[0].row.get("event_frames")
    if group.scores is None or group.weights is None or not events:
        return {}
    accuracy_G = torch.stack([sample.rewards[0] for sample in group.samples])
    found = {
        "recall": recall(group.weights.crucial_F, events),
        "crucial": float(group.weights.crucial_F.float().mean()),
    }
    return {**found, **looked(group.scores, accuracy_G, events)}


@torch.no_grad()
def perceive(
    model: Any, processor: Any, questions: Sequence[VideoQA], asking: Asking, settings: Mapping[str, Any]
) -> dict[str, float]:
    """What a policy looks at while it answers, however it was trained: the same questions, the same random numbers.

    Args:
        model: the policy.
        processor: its processor.
        questions: each is answered by a group of ``asking.samples`` sampled responses.
        asking: how.
        settings: ``score_tokens``, ``top_frames``, ``strategy`` and ``threshold`` of the crucial frames.

    Returns:
        means over the questions of :func:`looked`, and of :func:`recall` among the crucial frames found by raw and by
        relative attention (``recall_raw``, ``recall_relative``), over groups with a winner, with the share of frames
        that are crucial (``crucial_raw``, ``crucial_relative``), which is what chance would recall.
    """
    groups = []
    with torch.random.fork_rng([]):
        torch.manual_seed(asking.seed)
        for question in questions:
            groups.append(_scored(model, processor, question, asking))
    shares = FrameShares()
    shares.update((s.frame_attention_GNF, s.mask_GN) for s, _ in groups if s.frame_attention_GNF is not None)
    rows = []
    for question, (scores, accuracy_G) in zip(questions, groups, strict=True):
        events, attn_GNF = question.metadata["event_frames"], scores.frame_attention_GNF
        assert attn_GNF is not None
        row = looked(scores, accuracy_G, events)
        usual_F = shares.mean(attn_GNF.shape[2])
        ways = {"raw": attn_GNF, "relative": relative_attention(attn_GNF, scores.mask_GN, usual_F)}
        for name, way_GNF in ways.items() if bool((accuracy_G >= 0.5).any()) else ():
            scores_GF = response_frame_scores(way_GNF, scores.mask_GN, settings["score_tokens"])
            looked_at_GF = looked_at_frames(scores_GF, scores.mask_GN, settings["top_frames"])
            crucial_F = crucial_frames(looked_at_GF, accuracy_G, settings["threshold"], settings["strategy"])
            row |= {f"recall_{name}": recall(crucial_F, events), f"crucial_{name}": float(crucial_F.float().mean())}
        rows.append(row)
    return averaged(rows)


def _scored(model: Any, processor: Any, question: VideoQA, asking: Asking) -> tuple[GroupScores, torch.Tensor]:
    asked = ask_group(
        model,
        processor,
        question,
        asking.sampling,
        max_new_tokens=asking.max_new_tokens,
        responses=asking.samples,
        instruction=asking.instruction,
    )
    right = [score_answer(text, question.answer, question.kind, question.options) for text in asked.texts_G]
    return score_group(model, asked.prompt, asked.ids_G), torch.tensor(right)
