"""Relative frame attention against an independent float64 version, and what must hold of it."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from appo.method.attention_baseline import DECAY, FrameShares, relative_attention, video_shares
from appo.method.perception import token_weights
from appo.training.trainer_state import as_saved, plain
from tests.method.perception_cases import kinds, random_case, seeds


def slow_shares(attn, mask):
    """[i][j][f], in plain loops; padded places are never read."""
    shares = []
    for row, valid in zip(attn, mask, strict=True):
        shares.append([])
        for values, real in zip(row, valid, strict=True):
            total = math.fsum(values) if real else 0.0
            shares[-1].append([float(v) / total if total > 0 else 0.0 for v in values])
    return shares


def slow_mean(rollouts, frames):
    """The mean over prompts of their mean shares, a rollout n rollouts back counting DECAY ** n."""
    top, count = [0.0] * frames, 0.0
    # Only rollouts that hold such prompts make older ones fade.
    own = [groups for groups in rollouts if any(len(a[0][0]) == frames for a, _ in groups)]
    for age, groups in enumerate(reversed(own)):
        for attn, mask in groups:
            if len(attn[0][0]) != frames:
                continue
            rows = [share for row in slow_shares(attn, mask) for share in row]
            column = [math.fsum(row[f] for row in rows) for f in range(frames)]
            total = math.fsum(column)
            if total > 0:
                top = [t + DECAY**age * c / total for t, c in zip(top, column, strict=True)]
                count += DECAY**age
    return [t / count for t in top] if count else [1 / frames] * frames


@settings(max_examples=100, deadline=None)
@given(seeds, kinds)
def test_agrees_with_a_slow_version(seed: int, kind: str) -> None:
    case = random_case(np.random.default_rng(seed), kind)
    mean_F = torch.rand(case.attn_GNF.shape[2], generator=torch.Generator().manual_seed(seed % 1000)) + 0.1
    ours = relative_attention(case.attn_GNF, case.mask_GN, mean_F)
    shares = slow_shares(case.attn_GNF.double().tolist(), case.mask_GN.tolist())
    expected = torch.tensor(shares, dtype=torch.float64) / mean_F.double()
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)
    sums = video_shares(case.attn_GNF, case.mask_GN).sum(dim=-1)
    assert ((sums - 1).abs().lt(1e-5) | sums.eq(0)).all(), "shares sum to 1, or the token saw nothing"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(seeds, max_size=4), min_size=1, max_size=5), kinds)
def test_the_running_mean_is_that_of_all_prompts_so_far(rollouts: list[list[int]], kind: str) -> None:
    memory, seen = FrameShares(), []
    for rollout in rollouts:
        cases = [random_case(np.random.default_rng(seed), kind) for seed in rollout]
        memory.update((case.attn_GNF, case.mask_GN) for case in cases)
        seen.append([(case.attn_GNF.double().tolist(), case.mask_GN.tolist()) for case in cases])
    for frames in range(1, 6):
        # Groups that saw nothing count for nothing, not even as a rollout.
        own = [[g for g in groups if any(v > 0 for r in slow_shares(*g) for s in r for v in s)] for groups in seen]
        assert memory.mean(frames).tolist() == pytest.approx(slow_mean(own, frames), rel=1e-9)
        assert float(memory.mean(frames).sum()) == pytest.approx(1.0)


def test_numbers_worked_by_hand() -> None:
    """Two frames; the first draws three quarters of all attention. A token that gives it half looks at the other."""
    attn_GNF = torch.tensor([[[0.3, 0.1], [0.4, 0.0], [0.1, 0.1]]])
    mask_GN = torch.ones(1, 3, dtype=torch.bool)
    memory = FrameShares()
    memory.update([(attn_GNF, mask_GN)])
    assert memory.mean(2).tolist() == pytest.approx([0.75, 0.25])  # (0.75 + 1 + 0.5) / 3
    relative = relative_attention(attn_GNF, mask_GN, memory.mean(2))[0]
    assert relative.tolist() == [pytest.approx(row) for row in ([1, 1], [4 / 3, 0], [2 / 3, 2])]
    memory.update([(torch.tensor([[[0.0, 0.2]]]), torch.ones(1, 1, dtype=torch.bool))])
    assert memory.mean(2).tolist() == pytest.approx([0.9 * 0.75 / 1.9, (0.9 * 0.25 + 1) / 1.9])


@settings(max_examples=100, deadline=None)
@given(seeds, st.sampled_from(["plain", "zeros", "all high", "empty", "holes"]), st.floats(0.01, 1.0))
def test_a_flat_mean_gives_raw_weights_where_all_tokens_look_equally_much(seed: int, kind: str, total: float) -> None:
    case = random_case(np.random.default_rng(seed), kind)
    even = replace(case, attn_GNF=video_shares(case.attn_GNF.double(), case.mask_GN) * total)
    frames = even.attn_GNF.shape[2]
    relative = relative_attention(even.attn_GNF, even.mask_GN, FrameShares().mean(frames))
    torch.testing.assert_close(relative, even.attn_GNF * (frames / total))
    ours, theirs = replace(even, attn_GNF=relative).weigh(), even.weigh()
    if frames > 1:  # with one frame every token ties
        torch.testing.assert_close(ours.weights_GN, theirs.weights_GN, rtol=0, atol=1e-6)
        assert torch.equal(ours.crucial_F, theirs.crucial_F)


def test_frames_that_all_look_at_are_no_longer_chosen() -> None:
    """A sink takes most of every token's attention; one token of the winner looks at frame 2 more than is usual."""
    attn_GNF = torch.full((2, 6, 4), 0.02)
    attn_GNF[..., 0] = 0.5
    attn_GNF[0, 3, 2] = 0.1
    mask_GN, rewards_G = torch.ones(2, 6, dtype=torch.bool), torch.tensor([1.0, 0.0])
    log_probs = torch.rand(2, 6, 3).log_softmax(-1)
    chosen = {"score_tokens": 1, "top_frames": 1}
    assert token_weights(attn_GNF, mask_GN, rewards_G, log_probs, **chosen).crucial_F.tolist() == [True, *[False] * 3]
    memory = FrameShares()
    memory.update([(attn_GNF, mask_GN)])
    relative = relative_attention(attn_GNF, mask_GN, memory.mean(4))
    crucial_F = token_weights(relative, mask_GN, rewards_G, log_probs, **chosen).crucial_F
    assert crucial_F.tolist() == [False, False, True, False]


def _tell(told: list, own: Any) -> list:
    told.append(own)
    return [own]


def _told(told: list, own: Any) -> list:
    return told


def test_processes_share_one_mean_and_checkpoints_keep_it() -> None:
    rng = np.random.default_rng(3)
    cases = [random_case(rng) for _ in range(8)]
    pairs = [(case.attn_GNF, case.mask_GN) for case in cases]
    whole, parts = FrameShares(), [FrameShares(), FrameShares()]
    for start in (0, 4):
        whole.update(pairs[start : start + 4])
        told: list = []  # what both processes send
        for part in range(2):
            FrameShares().update(pairs[start + 2 * part : start + 2 * part + 2], partial(_tell, told))
        for memory in parts:
            memory.update([], partial(_told, told))
    restored = FrameShares()
    restored.restore(as_saved(plain(whole.state())))
    for frames in range(1, 6):
        assert torch.equal(restored.mean(frames), whole.mean(frames))
        assert torch.equal(parts[0].mean(frames), parts[1].mean(frames))
        torch.testing.assert_close(parts[0].mean(frames), whole.mean(frames))
    restored.update(pairs[:1])
    whole.update(pairs[:1])
    frames = pairs[0][0].shape[2]
    assert torch.equal(restored.mean(frames), whole.mean(frames)), "and it goes on from there"


def test_half_precision_is_widened() -> None:
    case = random_case(np.random.default_rng(5))
    halved = case.attn_GNF.bfloat16()
    mean_F = torch.full((case.attn_GNF.shape[2],), 0.5)
    wide = relative_attention(halved.float(), case.mask_GN, mean_F)
    assert torch.equal(relative_attention(halved, case.mask_GN, mean_F), wide)
    assert wide.dtype == torch.float32
