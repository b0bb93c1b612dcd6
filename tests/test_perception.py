"""The method against an independent float64 reference, against its own properties, and against its documentation."""

from __future__ import annotations

import doctest
import math
import re
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from appo import perception
from appo.perception import kl_to_mean, minmax, perception_tokens, rank_divergence, token_weights
from appo.types import PerceptionWeights
from oracle_perception import Reference, reference

METHOD_PAGE = Path(__file__).parents[1] / "docs" / "method.md"


@dataclass(frozen=True)
class Settings:
    threshold: float = 0.5
    strategy: str = "soft"
    score_tokens: int = 15
    top_frames: int = 3
    frame_tokens: int = 64
    max_weight: float = 1.7
    divergence: str = "kl"


@dataclass(frozen=True)
class Case:
    """One random group and the settings to weigh it with."""

    attn_GNF: Tensor
    mask_GN: Tensor
    rewards_G: Tensor
    log_probs_GNV: Tensor
    settings: Settings

    def weigh(self) -> PerceptionWeights:
        tensors = (self.attn_GNF, self.mask_GN, self.rewards_G, self.log_probs_GNV)
        return token_weights(*tensors, **asdict(self.settings))

    def reference(self) -> Reference:
        tensors = (self.attn_GNF, self.mask_GN, self.rewards_G, self.log_probs_GNV.double())
        return reference(*(t.numpy() for t in tensors), **asdict(self.settings))


def random_log_probs(rng: np.random.Generator, shape: tuple[int, ...], zeros: bool) -> np.ndarray[Any, Any]:
    """Distributions from nearly equal to nearly one-hot, some words impossible if `zeros`."""
    logits = rng.normal(size=shape) * rng.choice([0.1, 1.0, 5.0], size=(*shape[:-1], 1))
    if zeros:
        impossible = rng.random(shape) < 0.4
        impossible[..., 0] &= ~impossible[..., 1:].all(axis=-1)  # never all of them
        logits[impossible] = -np.inf
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


def random_case(rng: np.random.Generator, kind: str = "plain", vocabulary: int | None = None) -> Case:
    """A small group of some kind of difficulty, with garbage in its padded places."""
    G, N, F = int(rng.integers(1, 6)), int(rng.integers(1, 13)), int(rng.integers(1, 6))
    V = vocabulary or int(rng.integers(2, 7))
    length = rng.integers(0 if kind == "empty" else 1, N + 1, size=G)
    attn = rng.integers(0, 4, size=(G, N, F)) / 8 if kind == "ties" else rng.random((G, N, F)) * 0.1
    rewards = {"all high": np.ones(G), "all low": np.zeros(G)}.get(kind, rng.choice([0.0, 0.1, 0.5, 0.9, 1.0], size=G))
    log_probs = random_log_probs(rng, (G, N, V), zeros=kind == "zeros")
    if kind == "same":  # all responses expect the same
        log_probs[:] = log_probs[:1, :1]
    mask = np.arange(N) < length[:, None]
    if kind == "holes":
        mask = rng.random((G, N)) < 0.6
    garbage = rng.choice([np.nan, np.inf, -np.inf, 7.0])
    attn[~mask], log_probs[~mask] = garbage, garbage
    return Case(
        attn_GNF=torch.tensor(attn, dtype=torch.float32),
        mask_GN=torch.tensor(mask),
        rewards_G=torch.tensor(rewards, dtype=torch.float32),
        log_probs_GNV=torch.tensor(log_probs),
        settings=Settings(
            threshold=float(rng.choice([0.0, 0.5, 1.0])),
            strategy=str(rng.choice(["soft", "hard", "all"])),
            score_tokens=int(rng.integers(1, 16)),
            top_frames=int(rng.integers(1, 8)),
            frame_tokens=int(rng.integers(1, 16)),
            max_weight=float(rng.choice([1.0, 1.2, 1.7, 3.0])),
            divergence=str(rng.choice(["kl", "k3"])),
        ),
    )


def long_case(frame_tokens: int) -> Case:
    rng = np.random.default_rng(7)
    mask = np.arange(100) < rng.integers(30, 101, size=8)[:, None]
    log_probs = random_log_probs(rng, (8, 100, 11), zeros=True)
    log_probs[~mask] = np.nan
    return Case(
        attn_GNF=torch.tensor(rng.random((8, 100, 6)), dtype=torch.float32),
        mask_GN=torch.tensor(mask),
        rewards_G=torch.tensor([1.0, 0.0] * 4),
        log_probs_GNV=torch.tensor(log_probs),
        settings=Settings(frame_tokens=frame_tokens),
    )


KINDS = ("plain", "ties", "zeros", "same", "all high", "all low", "empty", "holes")
seeds = st.integers(0, 2**32 - 1)
kinds = st.sampled_from(KINDS)


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


# --- properties ------------------------------------------------------------------------------------------------


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


# --- documentation -----------------------------------------------------------------------------------------------


def test_the_worked_example_of_the_method_page_holds() -> None:
    blocks = re.findall(r"```python\n(.*?)```", METHOD_PAGE.read_text(encoding="utf-8"), re.DOTALL)
    example = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, METHOD_PAGE.name, METHOD_PAGE.name, 0)
    results = doctest.DocTestRunner().run(example)
    assert results.failed == 0
    assert results.attempted >= 14


def test_the_worked_example_by_hand() -> None:
    """The page's numbers once more from fractions and logarithms, without the library."""
    log = math.log
    q_pair = (log(3 / 2) + 2 * (log(3 / 4) + log(3 / 2)) / 2) / 3  # 1, 1/2, 1/2 to their mean 2/3
    q_parted = 2 * log(2) / 3  # 1/2, 1, 0 to their mean 1/2
    level = q_pair / q_parted
    expected = [[1 + 0.7 * level, 1.35, 1.7, 1.0], [1 + 0.35 * level, 1.7, 1.0, 1.0]]
    assert [[round(w, 4) for w in row] for row in expected] == [[1.2642, 1.35, 1.7, 1.0], [1.1321, 1.7, 1.0, 1.0]]

    first_GN = torch.tensor([[1, 1 / 2, 1, 1 / 4], [1 / 2, 1, 0, 0], [1 / 2, 0, 0, 0]], dtype=torch.float64)
    frame_0 = [[0.30, 0.20, 0.05, 0.10], [0.10, 0.15, 0, 0], [0.05, 0.15, 0, 0]]
    frame_1 = [[0.05, 0.10, 0.20, 0.15], [0.30, 0.20, 0, 0], [0.20, 0.10, 0, 0]]
    frame_2 = [[0.05] * 4, [0.05] * 4, [0.10] * 4]
    group = token_weights(
        torch.tensor([frame_0, frame_1, frame_2]).permute(1, 2, 0),
        torch.arange(4) < torch.tensor([4, 2, 2])[:, None],
        torch.tensor([1.0, 0.9, 0.1]),
        torch.stack([first_GN, 1 - first_GN], dim=2).log(),
        score_tokens=2,
        top_frames=1,
        frame_tokens=3,
    )
    torch.testing.assert_close(group.weights_GN, torch.tensor([*expected, expected[1]]), rtol=0, atol=1e-6)


def test_every_function_the_method_page_names_exists() -> None:
    table = METHOD_PAGE.read_text(encoding="utf-8").split("## Equations and functions")[1].split("## Decisions")[0]
    rows = [line for line in table.splitlines() if re.match(r"\| [2-8]\. ", line)]
    names = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[3])}
    assert len(names) >= 10
    assert all(callable(getattr(perception, name)) for name in names)
