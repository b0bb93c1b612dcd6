"""Intervals of shares and means, tests of differences between two models, pass@k.

Questions are the independent units: what is drawn, tested or resampled is a question, never a response.

Shape suffixes: Q questions, R bootstrap resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
_DRAWN_AT_ONCE = 1 << 16  # indices: what a cache holds


def wilson_interval(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % confidence interval of a share of ``n`` independent trials (Wilson 1927)."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_interval(
    cells: Sequence[Sequence[float]], weights: Sequence[float] = (1.0,), *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval (Efron 1979) of a weighted sum of means, each resampled within its own questions.

    The same for every order of the values. It has no width where the values of each cell are all equal, and is too
    narrow for a handful of questions.

    Args:
        cells: the values of each mean, one per question; a plain mean is one cell.
        weights: of the means in the sum.
        resamples: of the bootstrap.
        seed: of the random generator.

    Raises:
        ValueError: no cell, a cell without values, or not one weight a cell.
    """
    if len(cells) != len(weights) or not cells or not all(map(len, cells)):
        raise ValueError(f"{len(cells)} cells, {len(weights)} weights: give each cell a weight and at least one value")
    rng = np.random.default_rng(seed)
    total_R = np.zeros(resamples)
    for values, weight in zip(cells, weights, strict=True):
        total_R += weight * _resampled_means(np.sort(np.asarray(values, dtype=np.float64)), resamples, rng)
    low, high = np.quantile(total_R, [0.025, 0.975])
    return float(low), float(high)


def _resampled_means(values_Q: NDArray[np.float64], resamples: int, rng: Any) -> NDArray[np.float64]:
    """(R,) means of Q values drawn with replacement; a few resamples at once, so that memory stays bounded."""
    n = len(values_Q)
    rows = max(1, _DRAWN_AT_ONCE // n)
    sizes = [min(rows, resamples - done) for done in range(0, resamples, rows)]
    means = [values_Q[rng.integers(n, size=(size, n), dtype=np.int32)].mean(axis=1) for size in sizes]
    return np.concatenate(means)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value that two models are right equally often (McNemar 1947, binomial form).

    Questions that both or neither answer do not count. The others fall on either side like a fair coin: twice the
    smaller tail, at most 1.

    `only_first`, `only_second`: the number of questions that only this model answers.
    """
    from scipy.special import bdtr  # at first use: it takes half a second

    tail = bdtr(min(only_first, only_second), only_first + only_second, 0.5)
    return min(1.0, 2 * float(tail))


def sign_flip(differences: Sequence[float]) -> float:
    """Two-sided p-value that paired differences are symmetric about zero (Fisher's randomisation test).

    The share of all assignments of signs whose mean is at least as far from zero as the one found: exact for up to 16
    pairs, from 65536 random assignments beyond. It cannot be below 2 / 2^n, which is 0.008 for eight pairs.

    Raises:
        ValueError: there are no differences.
    """
    if not len(differences):
        raise ValueError("there are no differences to flip: give at least one pair")
    values_Q = np.asarray(differences, dtype=np.float64)
    n = len(values_Q)
    if n <= 16:
        signs_RQ = 1 - 2 * (np.arange(1 << n)[:, None] >> np.arange(n) & 1)
    else:
        signs_RQ = np.random.default_rng(0).choice([-1, 1], size=(1 << 16, n))
    means_R = np.abs(signs_RQ @ values_Q)
    # What is equal but for rounding counts as equal.
    return float((means_R >= abs(values_Q.sum()) - 1e-12 * np.abs(values_Q).sum()).mean())


def pass_at_k(right: int, samples: int, k: int) -> float:
    """Unbiased estimate that at least one of ``k`` responses is right (Chen et al. 2021, eq. 1).

    Args:
        right: the number of right responses among ``samples``.
        samples: the number of responses.
        k: the number of tries, at most ``samples``.

    Raises:
        ValueError: not ``1 <= k <= samples`` or not ``0 <= right <= samples``.
    """
    if not 1 <= k <= samples or not 0 <= right <= samples:
        raise ValueError(f"pass@{k} of {right} right among {samples}: k must be 1 to {samples}, right 0 to {samples}")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)
