"""Controls: each is checked against what it claims to be."""

from __future__ import annotations

import itertools
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from appo.experiments.compare.measurements import averaged, group_perception
from appo.experiments.compare.methods import (
    World,
    decisive_tokens,
    random_frames,
    same_position,
    shuffled,
    true_frames,
)
from appo.rollout.token_weights import with_base
from appo.types import Group, GroupScores, Sample, VideoQA
from tests.method.oracle_perception import kl, minmax
from tests.method.perception_cases import Case, kinds, random_case, seeds


class Words:
    """A tokenizer whose token n is word n of a sentence."""

    text = (
        "<think>",
        "i",
        "look",
        "at",
        "the",
        "star",
        "at",
        "5",
        ".",
        "it",
        "is",
        "red",
        ".",
        "</think>",
        "<answer>",
        "red",
    )

    def decode(self, ids: list[int]) -> str:
        return f" {self.text[ids[0] % len(self.text)]}"


class PlainWeigher:
    """What controls need of a weigher: settings, and attention as it is."""

    def __init__(self, case: Case, base: float) -> None:
        self.settings = asdict(case.settings) | {"base_weight": base}

    def attention(self, scores: GroupScores) -> GroupScores:
        return scores


def made(case: Case, events: list[int], base: float = 1.0) -> tuple[Group, World]:
    G, N, _ = case.attn_GNF.shape
    nothing = torch.zeros(G, N)
    scores = GroupScores(nothing, case.mask_GN, nothing[..., None], nothing, case.attn_GNF)
    weights = with_base(case.weigh(), case.mask_GN, base)
    lengths = enumerate(case.mask_GN.sum(dim=1).tolist())
    samples = [Sample(list(range(n)), "", case.rewards_G[i : i + 1]) for i, n in lengths]
    world = World(PlainWeigher(case, base), lambda _: case.log_probs_GNV, Words(), torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    question = VideoQA("", None, "", "", event_frames=tuple(events))
    return Group({}, question, samples=samples, scores=scores, weights=weights), world


@settings(max_examples=100, deadline=None)
@given(seeds, kinds)
def test_shuffled_weights_are_the_same_weights_on_other_tokens(seed: int, kind: str) -> None:
    case = random_case(np.random.default_rng(seed), kind)
    group, world = made(case, [0], base=0.2)
    dealt = shuffled(group, world)
    for i, mask_N in enumerate(case.mask_GN):
        own, new = group.weights.weights_GN[i], dealt.weights_GN[i]
        assert torch.equal(new[mask_N].sort().values, own[mask_N].sort().values)
        assert torch.equal(new[~mask_N], own[~mask_N])
    pairs = zip(group.weights.chosen_GN[case.mask_GN], group.weights.weights_GN[case.mask_GN], strict=True)
    moved = zip(dealt.chosen_GN[case.mask_GN], dealt.weights_GN[case.mask_GN], strict=True)
    assert sorted((bool(c), float(w)) for c, w in pairs) == sorted((bool(c), float(w)) for c, w in moved)


def test_every_order_of_three_tokens_is_dealt_equally_often() -> None:
    case = random_case(np.random.default_rng(0))
    group, world = made(case, [0])
    three = torch.tensor([[1.0, 1.2, 1.4, 1.0]])
    mask_GN = torch.tensor([[True, True, True, False]])
    group = replace(group, scores=replace(group.scores, mask_GN=mask_GN),
                    weights=replace(group.weights, weights_GN=three, chosen_GN=mask_GN))  # fmt: skip
    counts = dict.fromkeys(itertools.permutations((1.0, 1.2, 1.4)), 0)
    before = torch.get_rng_state()
    for _ in range(1200):
        counts[tuple(round(w, 1) for w in shuffled(group, world).weights_GN[0, :3].tolist())] += 1
    assert min(counts.values()) > 150
    assert max(counts.values()) < 250
    assert torch.equal(torch.get_rng_state(), before), "the random numbers of training stay what they are"


@settings(max_examples=150, deadline=None)
@given(seeds, kinds, st.sampled_from([1.0, 0.2]))
def test_true_frames_are_the_method_where_it_finds_them_itself(seed: int, kind: str, base: float) -> None:
    case = random_case(np.random.default_rng(seed), kind)
    group, world = made(case, case.weigh().crucial_F.nonzero()[:, 0].tolist(), base)
    if not group.weights.crucial_F.any():
        return
    oracle = true_frames(group, world)
    torch.testing.assert_close(oracle.weights_GN, group.weights.weights_GN)
    assert torch.equal(oracle.chosen_GN, group.weights.chosen_GN)
    assert torch.equal(oracle.crucial_F, group.weights.crucial_F)


@settings(max_examples=100, deadline=None)
@given(seeds, kinds)
def test_random_frames_are_as_many_and_weighted_as_if_they_were_true(seed: int, kind: str) -> None:
    case = random_case(np.random.default_rng(seed), kind)
    group, world = made(case, [0], base=0.2)
    drawn = random_frames(group, world)
    frames = drawn.crucial_F.nonzero()[:, 0].tolist()
    assert len(frames) == int(group.weights.crucial_F.sum())
    if frames:
        same, world = made(case, frames, base=0.2)
        torch.testing.assert_close(drawn.weights_GN, true_frames(same, world).weights_GN)


def test_every_frame_is_drawn_equally_often() -> None:
    case = random_case(np.random.default_rng(7))
    group, world = made(case, [0])
    F = case.attn_GNF.shape[2]
    one_F = torch.arange(F) == 0
    group = replace(group, weights=replace(group.weights, crucial_F=one_F))
    drawn = torch.stack([random_frames(group, world).crucial_F for _ in range(100 * F)]).sum(dim=0)
    assert drawn.sum() == 100 * F
    assert drawn.min() > 60
    assert drawn.max() < 150


def test_true_frames_are_those_of_the_row() -> None:
    case = random_case(np.random.default_rng(7))
    last = case.attn_GNF.shape[2] - 1
    group, world = made(case, [last])
    assert true_frames(group, world).crucial_F.nonzero()[:, 0].tolist() == [last]


@settings(max_examples=100, deadline=None)
@given(seeds, st.sampled_from(["plain", "zeros", "same", "empty", "all low"]))
def test_weights_by_position_agree_with_a_slow_version(seed: int, kind: str) -> None:
    case = random_case(np.random.default_rng(seed), kind)
    case = replace(case, settings=replace(case.settings, divergence="kl"))
    group, world = made(case, [0])
    ours = same_position(group, world).weights_GN
    length = [int(n) for n in case.mask_GN.sum(dim=1)]
    rows = case.log_probs_GNV.numpy()
    divergence = []
    for j in range(max(length)):
        present = [rows[i][j].tolist() for i, n in enumerate(length) if j < n]
        divergence.append(kl(present) if len(present) > 1 else 0.0)
    level = minmax(divergence)
    for i, n in enumerate(length):
        expected = [1 + (case.settings.max_weight - 1) * level[j] for j in range(n)]
        assert ours[i, :n].tolist() == pytest.approx(expected, abs=1e-5)


def test_decisive_tokens_weigh_one_and_all_others_nothing() -> None:
    case = random_case(np.random.default_rng(11))
    n = len(Words.text)
    group, world = made(case, [0])
    sample = replace(group.samples[0], ids=list(range(n)))
    mask_GN = torch.ones(1, n + 2).bool()
    mask_GN[0, n:] = False
    group = replace(group, samples=[sample], scores=replace(group.scores, mask_GN=mask_GN))
    weights_GN = decisive_tokens(group, world).weights_GN
    assert [Words.text[j] for j in weights_GN[0].nonzero()[:, 0]] == ["star", "5", "red", "red"]
    assert weights_GN.unique().tolist() == [0.0, 1.0]


def test_perception_of_a_group_by_hand() -> None:
    """Two frames, the second is true. The winner gives it 3/4 and 1/2 of its attention, the loser 1/4 once."""
    attn_GNF = torch.tensor([[[0.1, 0.3], [0.2, 0.2]], [[0.3, 0.1], [9.0, 9.0]]])
    mask_GN = torch.tensor([[True, True], [True, False]])
    log_probs = torch.full((2, 2, 2), 0.5).log()
    case = replace(random_case(np.random.default_rng(0)), attn_GNF=attn_GNF, mask_GN=mask_GN, log_probs_GNV=log_probs,
                   rewards_G=torch.tensor([1.0, 0.0]))  # fmt: skip
    settings_ = replace(case.settings, score_tokens=1, top_frames=1, strategy="soft", threshold=0.5)
    group, _ = made(replace(case, settings=settings_), [1])
    found = group_perception(group, 0, 0.5)
    assert found == pytest.approx({"recall": 1.0, "crucial": 0.5, "winners": 0.625, "losers": 0.25})
    assert group_perception(replace(group, weights=None), 0, 0.5) == {}
    assert averaged([found, {"recall": 0.0}, {}]) == pytest.approx(found | {"recall": 0.5})
