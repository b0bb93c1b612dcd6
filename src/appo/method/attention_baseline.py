"""Frame attention relative to what is usual for the frame (not in the paper, see docs/method.md).

Some frames, often the first and the last, draw attention from every token whatever is asked. Averaged over many tokens
(step 2) they win. Here a token's attention is read as its *share* of what it spends on the video, divided by the mean
share that this frame had over many prompts: 1 is usual, 2 is twice the usual.

Shape suffixes: G responses of one group, N response tokens (padded), F frames of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

DECAY = 0.9
"""What a rollout's prompts count for after each later rollout: about the last ten make the mean. Not tuned."""

Sums = dict[int, tuple[Tensor, float]]
"""Number of frames F -> sum over prompts of their mean shares (F,) in float64, and how many prompts those are."""


def video_shares(attn_GNF: Tensor, mask_GN: Tensor) -> Tensor:
    """Each token's attention to each frame as a share of its attention to the whole video.

    Returns:
        shares_GNF, (G, N, F) in float32, or float64 for float64 attention; they sum to 1 over F. All 0 for a token that
        does not attend to the video and where padded, whatever stands there.
    """
    attn_GNF = attn_GNF if attn_GNF.dtype == torch.float64 else attn_GNF.float()
    attn_GNF = attn_GNF.masked_fill(~mask_GN[..., None], 0.0)
    total_GN1 = attn_GNF.sum(dim=-1, keepdim=True)
    return torch.where(total_GN1 > 0, attn_GNF / total_GN1, 0.0)


def relative_attention(attn_GNF: Tensor, mask_GN: Tensor, mean_share_F: Tensor) -> Tensor:
    """Each token's share of attention to each frame over the mean share of that frame.

    With a flat mean (1 / F each) and tokens that all attend to the video equally much, this is `attn_GNF` times a
    constant, and steps 2-8 of the method, which only compare, give the same weights.

    Args:
        attn_GNF: (G, N, F), attention from the query that emits a token to each frame, at least 0.
        mask_GN: bool (G, N), True on real response tokens.
        mean_share_F: (F,), what each frame gets on average; 0 only where `attn_GNF` is 0 too.

    Returns:
        (G, N, F), in the dtype of `video_shares`; 0 where padded.
    """
    shares_GNF = video_shares(attn_GNF, mask_GN)
    mean_share_F = mean_share_F.to(shares_GNF)
    return torch.where(mean_share_F > 0, shares_GNF / mean_share_F, 0.0)


class FrameShares:
    """The mean share of attention that each frame gets, over many prompts, for every number of frames apart.

    A prompt counts once, however many tokens its responses have. Older rollouts fade by `DECAY`; sum and count fade
    alike, so that the mean is one of what was seen from the first rollout on.
    """

    def __init__(self) -> None:
        self._sums: Sums = {}

    def update(
        self,
        groups: Iterable[tuple[Tensor, Tensor]],
        over_processes: Callable[[Sums], list[Sums]] = lambda own: [own],
    ) -> None:
        """Take a rollout's groups in.

        Args:
            groups: (attn_GNF, mask_GN) of each; one whose tokens do not attend to the video at all counts for nothing.
            over_processes: turns this process's sums into those of all processes, which must all call it: the mean is
                then the same everywhere.
        """
        fresh: Sums = {}
        for sums in over_processes(_sums(groups)):
            _add(fresh, sums)
        for frames in fresh:
            if frames in self._sums:
                sum_F, count = self._sums[frames]
                self._sums[frames] = (DECAY * sum_F, DECAY * count)
        _add(self._sums, fresh)

    def mean(self, frames: int) -> Tensor:
        """float64 (frames,), summing to 1: the mean share over prompts with so many frames; flat without any."""
        sum_F, count = self._sums.get(frames, (torch.ones(frames, dtype=torch.float64), float(frames)))
        return sum_F / count

    def state(self) -> dict[str, Any]:
        """Everything, for a checkpoint."""
        return {"frames": list(self._sums), "sums": [s for s, _ in self._sums.values()],
                "counts": [n for _, n in self._sums.values()]}  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Load what `state` returned."""
        rows = zip(state["frames"], state["sums"], state["counts"], strict=True)
        self._sums = {frames: (sum_F, count) for frames, sum_F, count in rows}


def _sums(groups: Iterable[tuple[Tensor, Tensor]]) -> Sums:
    sums: Sums = {}
    for attn_GNF, mask_GN in groups:
        total_F = video_shares(attn_GNF.double(), mask_GN).sum(dim=(0, 1)).cpu()
        if total_F.sum() > 0:
            _add(sums, {len(total_F): (total_F / total_F.sum(), 1.0)})
    return sums


def _add(sums: Sums, more: Sums) -> None:
    for frames, (sum_F, count) in more.items():
        old_F, old_count = sums.get(frames, (torch.zeros(frames, dtype=torch.float64), 0.0))
        sums[frames] = (old_F + sum_F, old_count + count)
