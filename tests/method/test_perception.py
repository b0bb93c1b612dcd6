"""The method against an independent float64 reference; log-probabilities on demand; errors that name their cause."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from appo.method import perception
from appo.method.perception import minmax, perception_tokens, rank_divergence, token_weights
from tests.method.perception_cases import KINDS, Case, kinds, long_case, random_case, seeds


def assert_agrees(case: Case) -> None:
    """Every step, not only the last: a wrong frame can hide behind an equal weight."""
    ours, theirs = case.weigh(), case.reference()
    torch.testing.assert_close(ours.scores_GF, torch.tensor(theirs.scores), rtol=1e-5, atol=1e-7)
    assert ours.crucial_F.nonzero().flatten().tolist() == theirs.crucial
    tokens_CGK = perception_tokens(case.attn_GNF, case.mask_GN, ours.crucial_F, case.settings.frame_tokens)
    divergence_CK = rank_divergence(case.log_probs_GNV, tokens_CGK, case.settings.divergence)
    for c, f in enumerate(theirs.crucial):
        assert [[t for t in row if t >= 0] for row in tokens_CGK[c].tolist()] == theirs.tokens[f]
        expected = theirs.divergence[f] + [0.0] * (divergence_CK.shape[1] - len(theirs.divergence[f]))
        assert divergence_CK[c].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert ours.chosen_GN.tolist() == theirs.chosen
    torch.testing.assert_close(ours.weights_GN, torch.tensor(theirs.weights), rtol=0, atol=1e-6)
    assert (ours.weights_GN[~ours.chosen_GN] == 1).all()


# --- against the reference -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_reference_on_random_groups(kind: str) -> None:
    rng = np.random.default_rng(KINDS.index(kind))
    for _ in range(400):
        assert_agrees(random_case(rng, kind))


@pytest.mark.parametrize(("vocabulary", "kind"), [(1_000, "plain"), (1_000, "zeros"), (50_000, "plain")])
def test_agrees_with_the_reference_on_large_vocabularies(vocabulary: int, kind: str) -> None:
    rng = np.random.default_rng(vocabulary)
    few = {"strategy": "all", "top_frames": 1, "frame_tokens": 2, "max_weight": 1.7}
    largest = []
    for divergence in ("kl", "k3", "kl"):
        case = random_case(rng, kind, vocabulary)
        case = replace(case, settings=replace(case.settings, **few, divergence=divergence))
        assert_agrees(case)
        largest.append(case.weigh().weights_GN.max().item())
    assert max(largest) == pytest.approx(1.7)  # not three groups of one response


def test_float32_log_probabilities_lose_no_more_than_round_off() -> None:
    rng = np.random.default_rng(3)
    compared = 0
    for _ in range(200):
        case = random_case(rng, "zeros", vocabulary=200)
        case = replace(case, settings=replace(case.settings, divergence="kl"))
        single = replace(case, log_probs_GNV=case.log_probs_GNV.float())
        spreads = [max(d) - min(d) for d in case.reference().divergence.values()]
        if spreads and min(spreads) > 1e-3:  # below it the min-max magnifies round-off, as it must
            torch.testing.assert_close(single.weigh().weights_GN, case.weigh().weights_GN, rtol=0, atol=2e-3)
            compared += 1
    assert compared > 50


def test_half_precision_inputs_are_widened_not_computed_in() -> None:
    case = long_case(frame_tokens=40)
    halved = replace(case, attn_GNF=case.attn_GNF.bfloat16(), log_probs_GNV=case.log_probs_GNV.bfloat16())
    widened = replace(halved, attn_GNF=halved.attn_GNF.float(), log_probs_GNV=halved.log_probs_GNV.float())
    assert halved.weigh().weights_GN.unique().numel() > 10
    assert torch.equal(halved.weigh().weights_GN, widened.weigh().weights_GN)
    assert torch.equal(halved.weigh().scores_GF, widened.weigh().scores_GF)


def test_minmax_runs_over_the_ranks_that_exist_and_leaves_the_others_zero() -> None:
    divergence_CK = torch.tensor([[0.2, 0.6, 0.4, 9.0], [0.3, 0.3, 0.3, 0.0], [0.5, 0.5 + 1e-7, 0.5, 0.5]])
    exists_CK = torch.tensor([[True, True, True, False], [True, True, True, False], [True] * 4])
    expected = torch.tensor([[0.0, 1.0, 0.5, 0.0], [0.0] * 4, [0.0] * 4])
    torch.testing.assert_close(minmax(divergence_CK, exists_CK), expected)


# --- log-probabilities on demand, gradients ----------------------------------------------------------------------


class Asked:
    """A callable that answers from a tensor and keeps what it was asked."""

    def __init__(self, log_probs_GNV: Tensor) -> None:
        self.log_probs_GNV = log_probs_GNV
        self.calls: list[list[tuple[int, int]]] = []

    def __call__(self, i_n: Tensor, j_n: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert i_n.dtype == j_n.dtype == torch.int64
        self.calls.append(list(zip(i_n.tolist(), j_n.tolist(), strict=True)))
        return self.log_probs_GNV[i_n, j_n]


@settings(max_examples=100, deadline=None)
@given(seeds, kinds)
def test_a_callable_gives_what_the_tensor_gives(seed: int, kind: str) -> None:
    case = random_case(np.random.default_rng(seed), kind)
    asked = Asked(case.log_probs_GNV)
    assert torch.equal(replace(case, log_probs_GNV=asked).weigh().weights_GN, case.weigh().weights_GN)  # type: ignore[arg-type]
    assert all(case.mask_GN[i, j] for call in asked.calls for i, j in call)


def test_a_callable_is_asked_in_bounded_tiles_for_shared_ranks_only() -> None:
    case = long_case(frame_tokens=40)
    asked = Asked(case.log_probs_GNV)
    group = replace(case, log_probs_GNV=asked).weigh()  # type: ignore[arg-type]
    assert torch.equal(group.weights_GN, case.weigh().weights_GN)
    tokens_CGK = perception_tokens(case.attn_GNF, case.mask_GN, group.crucial_F, 40)
    shared = {
        (i, j)
        for ranks_KG in tokens_CGK.transpose(1, 2).tolist()
        for rank in ranks_KG
        for i, j in enumerate(rank)
        if j >= 0 and sum(t >= 0 for t in rank) > 1
    }
    assert {pair for call in asked.calls for pair in call} == shared
    assert max(map(len, asked.calls)) <= perception.TILE_ROWS
    assert all(len(set(call)) == len(call) for call in asked.calls)


def test_a_callable_is_asked_once_a_token_when_frames_align_tokens_alike() -> None:
    case = long_case(frame_tokens=100)
    asked = Asked(case.log_probs_GNV)
    group = replace(case, log_probs_GNV=asked).weigh()  # type: ignore[arg-type]
    assert group.crucial_F.sum() > 1
    times = Counter(pair for call in asked.calls for pair in call)
    assert set(times.values()) == {1}
    assert len(times) == int(case.mask_GN.sum()) - max(0, int(np.diff(np.sort(case.mask_GN.sum(1).numpy()))[-1]))


@pytest.mark.parametrize("tile", [1, 8, 33, 10_000])
def test_the_tile_size_does_not_matter(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = long_case(frame_tokens=40)
    expected = case.weigh().weights_GN
    monkeypatch.setattr(perception, "TILE_ROWS", tile)
    torch.testing.assert_close(case.weigh().weights_GN, expected, rtol=0, atol=1e-6)


def test_no_gradient_flows() -> None:
    case = random_case(np.random.default_rng(2), "plain")
    case = replace(
        case,
        attn_GNF=case.attn_GNF.nan_to_num(0, 0, 0).requires_grad_(),
        log_probs_GNV=case.log_probs_GNV.nan_to_num(0, 0, 0).requires_grad_(),
    )
    group = case.weigh()
    assert group.chosen_GN.any()
    assert not group.weights_GN.requires_grad
    assert not group.scores_GF.requires_grad


def test_inputs_are_left_as_they_were() -> None:
    case = random_case(np.random.default_rng(4), "plain")
    names = ("attn_GNF", "mask_GN", "rewards_G", "log_probs_GNV")
    before = {name: getattr(case, name).clone() for name in names}
    case.weigh()
    for name in names:
        torch.testing.assert_close(getattr(case, name), before[name], rtol=0, atol=0, equal_nan=True)


# --- errors ------------------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "attn_GNF": torch.rand(2, 3, 4),
    "mask_GN": torch.ones(2, 3, dtype=torch.bool),
    "rewards_G": torch.ones(2),
    "log_probs_GNV": torch.zeros(2, 3, 5).log_softmax(-1),
}
BAD = [
    ("attn_GNF", torch.rand(2, 3)),
    ("attn_GNF", torch.rand(0, 3, 4)),
    ("attn_GNF", torch.ones(2, 3, 4, dtype=torch.int64)),
    ("attn_GNF", torch.full((2, 3, 4), math.nan)),
    ("attn_GNF", torch.full((2, 3, 4), math.inf)),
    ("mask_GN", torch.ones(2, 4, dtype=torch.bool)),
    ("mask_GN", torch.ones(2, 3)),
    ("mask_GN", torch.ones(2, 3, dtype=torch.bool, device="meta")),
    ("rewards_G", torch.ones(3)),
    ("rewards_G", torch.ones(2, 1)),
    ("rewards_G", torch.tensor([1.0, math.nan])),
    ("log_probs_GNV", torch.zeros(2, 3)),
    ("log_probs_GNV", torch.zeros(2, 4, 5)),
    ("log_probs_GNV", torch.zeros(2, 3, 5, dtype=torch.int64)),
    ("log_probs_GNV", torch.zeros(2, 3, 5, device="meta")),
    ("log_probs_GNV", torch.full((2, 3, 5), math.nan)),
    ("log_probs_GNV", torch.full((2, 3, 5), math.inf)),
    ("log_probs_GNV", [[0.0]]),
    ("log_probs_GNV", lambda i_n, j_n: torch.zeros(len(i_n))),
    ("log_probs_GNV", lambda i_n, j_n: torch.zeros(len(i_n) + 1, 5)),
    ("threshold", math.nan),
    ("strategy", "easy"),
    ("score_tokens", 0),
    ("top_frames", -1),
    ("frame_tokens", 0),
    ("frame_tokens", 2.5),
    ("max_weight", 0.9),
    ("max_weight", math.nan),
    ("max_weight", math.inf),
    ("divergence", "k2"),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{name}-{i}" for i, (name, _) in enumerate(BAD)])
def test_bad_arguments_are_named(name: str, value: Any) -> None:
    arguments = GOOD | {name: value}
    tensors = [arguments.pop(key) for key in GOOD]
    with pytest.raises(ValueError, match=rf"^{name} "):
        token_weights(*tensors, **arguments)


def test_a_bad_divergence_is_an_error_even_where_no_frame_is_crucial() -> None:
    with pytest.raises(ValueError, match="divergence"):
        token_weights(*(GOOD | {"rewards_G": torch.zeros(2)}).values(), divergence="k2")
