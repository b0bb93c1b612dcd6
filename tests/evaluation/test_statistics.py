"""Intervals, tests and pass@k against published values, definitions and full enumeration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appo.evaluation.statistics import bootstrap_interval, mcnemar, pass_at_k, sign_flip, wilson_interval


@pytest.mark.parametrize(
    ("share", "n", "low", "high"),
    # Agresti & Coull 1998 and R's prop.test(..., correct = FALSE)
    [(0.5, 10, 0.2366, 0.7634), (0.0, 10, 0.0, 0.2775), (1.0, 20, 0.8389, 1.0), (0.81, 263, 0.7583, 0.8528)],
)
def test_wilson_interval_equals_published_values(share: float, n: int, low: float, high: float) -> None:
    assert wilson_interval(share, n) == (pytest.approx(low, abs=2e-4), pytest.approx(high, abs=2e-4))


@given(st.integers(1, 5000), st.data())
def test_wilson_ends_where_the_share_is_z_standard_errors_away(n: int, data: st.DataObject) -> None:
    """Its definition: the ends are the shares p with (share - p)^2 = z^2 p (1 - p) / n."""
    right = data.draw(st.integers(0, n))
    share, z = right / n, 1.959964
    low, high = wilson_interval(share, n)
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1
    for end in (low, high):
        assert (share - end) ** 2 == pytest.approx(z * z * end * (1 - end) / n, abs=1e-12)


# --- bootstrap ---------------------------------------------------------------------------------------------------


def every_resample(cells: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    """The whole bootstrap distribution: each cell drawn in every possible way."""
    means = [[sum(drawn) / len(cell) for drawn in product(cell, repeat=len(cell))] for cell in cells]
    return [sum(weight * mean for weight, mean in zip(weights, one, strict=True)) for one in product(*means)]


@pytest.mark.parametrize(
    ("cells", "weights"),
    [
        ([[0.0, 1.0, 1.0, 0.0, 1.0]], [1.0]),
        ([[0.1, 0.2, 0.7, 0.9, 1.0]], [1.0]),
        ([[0.0, 0.3, 1.0], [0.5, 0.9, 0.2, 0.4]], [0.5, 0.5]),
        ([[0.0, 1.0], [0.2, 0.4, 0.9], [0.3]], [1 / 2, 1 / 4, 1 / 4]),
        ([[-1.0, 0.0, 1.0, 1.0, 0.0]], [1.0]),
    ],
)
def test_the_bootstrap_finds_the_percentiles_of_all_resamples(cells: list[list[float]], weights: list[float]) -> None:
    everything = np.array(every_resample(cells, weights))
    for end, share in zip(bootstrap_interval(cells, weights, resamples=40_000), (0.025, 0.975), strict=True):
        below, up_to = (everything < end - 1e-9).mean(), (everything <= end + 1e-9).mean()
        assert below - 0.005 <= share <= up_to + 0.005


def test_the_bootstrap_of_many_questions_is_the_normal_interval() -> None:
    values = np.random.default_rng(1).random(3000) ** 2
    low, high = bootstrap_interval([list(values)])
    error = values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_a_bootstrap_is_the_same_in_any_order_and_within_its_values(values: list[float], rng: object) -> None:
    shuffled = list(values)
    rng.shuffle(shuffled)
    low, high = bootstrap_interval([values], resamples=200)
    assert bootstrap_interval([shuffled], resamples=200) == (low, high), "order"
    assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12
    moved = bootstrap_interval([[3 * value + 1 for value in values]], resamples=200)
    assert moved == (pytest.approx(3 * low + 1), pytest.approx(3 * high + 1)), "unit"


def test_a_seed_is_another_draw_and_pieces_are_no_other_draw() -> None:
    values = [0.1 * (place % 7) for place in range(50)]
    assert bootstrap_interval([values], seed=1) != bootstrap_interval([values], seed=2)
    assert bootstrap_interval([values], seed=1) == bootstrap_interval([values], seed=1)
    assert bootstrap_interval([[0.25] * 9]) == (0.25, 0.25)
    many = [0.0, 1.0] * 50_000  # more than are drawn at once
    low, high = bootstrap_interval([many], resamples=300)
    assert (low, high) == (pytest.approx(0.5 - 1.96 * 0.5 / 316.2, abs=6e-4), pytest.approx(0.5 + 0.0031, abs=6e-4))


@pytest.mark.parametrize(("cells", "weights"), [([], []), ([[]], [1.0]), ([[1.0], []], [0.5, 0.5]), ([[1.0]], [1, 1])])
def test_what_cannot_be_bootstrapped_is_refused(cells: list[list[float]], weights: list[float]) -> None:
    with pytest.raises(ValueError, match="give each cell a weight and at least one value"):
        bootstrap_interval(cells, weights)


# --- McNemar -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("only_first", "only_second", "p_value", "remark"),
    [
        (0, 0, 1.0, "the two never differ"),
        (1, 0, 1.0, "2 * 1/2"),
        (5, 0, 0.0625, "2 / 32"),
        (6, 16, 2 * 110056 / 2**22, "2 * (1 + 22 + 231 + 1540 + 7315 + 26334 + 74613) / 2^22 = 0.0525"),
        (3, 3, 1.0, "evenly: twice the tail is more than 1"),
    ],
)
def test_mcnemar_by_hand(only_first: int, only_second: int, p_value: float, remark: str) -> None:
    assert mcnemar(only_first, only_second) == pytest.approx(p_value, rel=1e-12), remark
    assert mcnemar(only_second, only_first) == mcnemar(only_first, only_second)


@pytest.mark.parametrize("n", range(1, 11))
def test_mcnemar_counts_all_falls_of_a_fair_coin(n: int) -> None:
    heads = [sum(coins) for coins in product((0, 1), repeat=n)]
    for seen in range(n + 1):
        as_far_out = sum(abs(2 * one - n) >= abs(2 * seen - n) for one in heads)
        assert mcnemar(seen, n - seen) == pytest.approx(as_far_out / 2**n, rel=1e-12)


def test_mcnemar_of_thousands_is_exact_and_quick() -> None:
    for only_first, only_second in ((480, 520), (900, 1100), (10, 1500)):
        n = only_first + only_second
        tail = sum(math.comb(n, k) for k in range(only_first + 1))
        assert mcnemar(only_first, only_second) == pytest.approx(float(Fraction(2 * tail, 2**n)), rel=1e-10)
    assert mcnemar(100_000, 100_100) == pytest.approx(math.erfc(99 / math.sqrt(2 * 200_100)), rel=1e-3), "normal"
    assert mcnemar(0, 200_000) == 0.0


# --- pass@k ------------------------------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_choices_with_a_right_one() -> None:
    for samples in range(1, 9):
        for right in range(samples + 1):
            marks = [True] * right + [False] * (samples - right)
            for k in range(1, samples + 1):
                choices = [any(choice) for choice in combinations(marks, k)]
                assert pass_at_k(right, samples, k) == pytest.approx(sum(choices) / len(choices), abs=1e-12)


def test_pass_at_k_is_the_product_of_its_paper() -> None:
    for right, samples, k in ((3, 200, 100), (1, 200, 10), (150, 200, 60), (0, 64, 8), (64, 64, 8)):
        factors = np.prod(1.0 - k / np.arange(samples - right + 1, samples + 1)) if samples - right >= k else 0.0
        assert pass_at_k(right, samples, k) == pytest.approx(1.0 - factors, abs=1e-12)


@pytest.mark.parametrize(("right", "samples", "k"), [(1, 4, 0), (1, 4, 5), (5, 4, 2), (-1, 4, 2), (0, 0, 1)])
def test_an_impossible_pass_at_k_is_refused(right: int, samples: int, k: int) -> None:
    with pytest.raises(ValueError, match="k must be 1 to"):
        pass_at_k(right, samples, k)


def test_flipping_signs_agrees_with_counting_and_with_the_sign_test() -> None:
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 9):
        values = rng.normal(0.3, 1, n).tolist()
        means = [abs(sum(sign * value for sign, value in zip(signs, values, strict=True)))
                 for signs in product((-1, 1), repeat=n)]  # fmt: skip
        assert sign_flip(values) == sum(mean >= abs(sum(values)) - 1e-12 for mean in means) / 2**n
    for right in range(9):  # differences of one size: nothing but their signs counts
        assert sign_flip([0.1] * right + [-0.1] * (8 - right)) == pytest.approx(mcnemar(right, 8 - right))
    assert sign_flip([0.0, 0.0]) == 1.0
    many = sign_flip(rng.normal(0, 1, 40).tolist())
    assert 0 < many <= 1
    assert sign_flip([1.0] * 40) < 1e-3
    with pytest.raises(ValueError, match="no differences"):
        sign_flip([])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=8))
def test_a_flipped_comparison_is_as_sure(values: list[float]) -> None:
    assert sign_flip(values) == pytest.approx(sign_flip([-value for value in values]))
    assert 2 / 2 ** len(values) <= sign_flip(values) <= 1
