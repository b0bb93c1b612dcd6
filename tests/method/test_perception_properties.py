"""What must hold for every group: bounds, symmetries, limits, ties."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from appo.method.perception import kl_to_mean, token_weights
from tests.method.perception_cases import Settings, kinds, random_case, random_log_probs, seeds


@settings(max_examples=300, deadline=None)
@given(seeds, kinds)
def test_weights_are_float32_and_lie_between_one_and_max_weight(seed: int, kind: str) -> None:
    case = random_case(np.random.default_rng(seed), kind)
    weights_GN = case.weigh().weights_GN
    assert weights_GN.dtype == torch.float32
    assert weights_GN.shape == case.mask_GN.shape
    assert ((weights_GN >= 1) & (weights_GN <= case.settings.max_weight)).all()
    assert (weights_GN[~case.mask_GN] == 1).all()


@settings(max_examples=200, deadline=None)
@given(seeds, kinds, st.integers(1, 9))
def test_more_padding_changes_nothing(seed: int, kind: str, extra: int) -> None:
    case = random_case(np.random.default_rng(seed), kind)
    G, N, F = case.attn_GNF.shape
    nan = torch.full((G, extra, F), math.nan), torch.full((G, extra, case.log_probs_GNV.shape[2]), math.nan).double()
    padded = replace(
        case,
        attn_GNF=torch.cat([case.attn_GNF, nan[0]], dim=1),
        mask_GN=torch.cat([case.mask_GN, torch.zeros(G, extra, dtype=torch.bool)], dim=1),
        log_probs_GNV=torch.cat([case.log_probs_GNV, nan[1]], dim=1),
    )
    ours, theirs = case.weigh(), padded.weigh()
    torch.testing.assert_close(theirs.weights_GN[:, :N], ours.weights_GN, rtol=0, atol=1e-6)
    assert (theirs.weights_GN[:, N:] == 1).all()
    assert torch.equal(theirs.chosen_GN[:, :N], ours.chosen_GN)
    assert torch.equal(theirs.scores_GF, ours.scores_GF)


@settings(max_examples=200, deadline=None)
@given(seeds, kinds)
def test_reordering_the_responses_reorders_the_weights(seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    case = random_case(rng, kind)
    order_G = torch.tensor(rng.permutation(len(case.rewards_G)))
    names = ("attn_GNF", "mask_GN", "rewards_G", "log_probs_GNV")
    shuffled = replace(case, **{name: getattr(case, name)[order_G] for name in names})
    ours, theirs = case.weigh(), shuffled.weigh()
    torch.testing.assert_close(theirs.weights_GN, ours.weights_GN[order_G], rtol=0, atol=1e-6)
    assert torch.equal(theirs.crucial_F, ours.crucial_F)


@settings(max_examples=100, deadline=None)
@given(seeds, kinds)
def test_max_weight_one_gives_exactly_ones(seed: int, kind: str) -> None:
    case = random_case(np.random.default_rng(seed), kind)
    plain = replace(case, settings=replace(case.settings, max_weight=1.0))
    assert torch.equal(plain.weigh().weights_GN, torch.ones(case.mask_GN.shape))


@settings(max_examples=200, deadline=None)
@given(seeds, st.integers(1, 8), st.integers(2, 40), st.booleans(), st.sampled_from([torch.float32, torch.float64]))
def test_kl_lies_between_zero_and_log_of_the_responses(
    seed: int, responses: int, vocabulary: int, zeros: bool, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(seed)
    log_probs = torch.tensor(random_log_probs(rng, (5, responses, vocabulary), zeros)).to(dtype)
    present = torch.tensor(rng.random((5, responses)) < 0.8)
    divergence_R = kl_to_mean(log_probs, present)
    assert divergence_R.dtype == dtype
    assert (divergence_R >= 0).all()
    assert (divergence_R <= present.sum(dim=1).clamp(min=1).log() + 1e-6).all()


@pytest.mark.parametrize("responses", [2, 3, 8])
def test_kl_of_disjoint_certainties_is_the_log_of_their_number(responses: int) -> None:
    log_probs = torch.eye(responses).log()[None]
    present = torch.ones(1, responses, dtype=torch.bool)
    assert kl_to_mean(log_probs, present).item() == pytest.approx(math.log(responses), rel=1e-6)


@pytest.mark.parametrize("divergence", ["kl", "k3"])
@pytest.mark.parametrize("responses", [3, 8])
def test_equal_distributions_give_exactly_ones_in_float32(divergence: str, responses: int) -> None:
    generator = torch.Generator().manual_seed(0)
    row_V = torch.randn(20_000, generator=generator).mul(3).log_softmax(-1)
    attn_GNF = torch.rand(responses, 6, 2, generator=generator)
    mask_GN = torch.ones(responses, 6, dtype=torch.bool)
    log_probs = row_V.expand(responses, 6, -1)
    group = token_weights(attn_GNF, mask_GN, torch.ones(responses), log_probs, divergence=divergence)
    assert group.chosen_GN.all()
    assert (group.weights_GN == 1).all()


def test_k3_of_impossible_words_is_finite_in_float32() -> None:
    log_probs = torch.full((8, 3, 2_000), -math.inf)
    log_probs[torch.arange(8), :, torch.arange(8)] = 0.0
    attn_GNF = torch.rand(8, 3, 2, generator=torch.Generator().manual_seed(0))
    mask_GN = torch.arange(3) < torch.tensor([3, 3, 2, 2, 1, 1, 3, 3])[:, None]
    group = token_weights(attn_GNF, mask_GN, torch.ones(8), log_probs, divergence="k3")
    assert group.weights_GN.isfinite().all()
    assert group.weights_GN.max() == pytest.approx(1.7)


@pytest.mark.parametrize(("responses", "length", "frames"), [(2, 0, 3), (2, 3, 0), (1, 4, 2), (3, 1, 1)])
def test_degenerate_shapes_give_ones(responses: int, length: int, frames: int) -> None:
    attn_GNF = torch.rand(responses, length, frames)
    mask_GN = torch.ones(responses, length, dtype=torch.bool)
    log_probs = torch.rand(responses, length, 5).log_softmax(-1)
    group = token_weights(attn_GNF, mask_GN, torch.ones(responses), log_probs)
    assert torch.equal(group.weights_GN, torch.ones(responses, length))
    assert group.crucial_F.shape == (frames,)


@pytest.mark.parametrize("strategy", ["soft", "hard"])
def test_without_a_high_response_nothing_is_chosen(strategy: str) -> None:
    case = random_case(np.random.default_rng(1), "all low")
    group = replace(case, settings=Settings(strategy=strategy)).weigh()
    assert not group.crucial_F.any()
    assert not group.chosen_GN.any()
    assert (group.weights_GN == 1).all()


def test_ties_go_to_the_earlier_frame_and_the_earlier_token() -> None:
    attn_GNF = torch.full((2, 300, 40), 0.25)  # long enough for an unstable sort to show itself
    mask_GN = torch.ones(2, 300, dtype=torch.bool)
    log_probs = torch.rand(2, 300, 3).log_softmax(-1)
    group = token_weights(attn_GNF, mask_GN, torch.ones(2), log_probs, top_frames=3, frame_tokens=50)
    assert group.crucial_F.nonzero().flatten().tolist() == [0, 1, 2]
    assert group.chosen_GN.sum(dim=1).tolist() == [50, 50]
    assert group.chosen_GN[:, :50].all()
