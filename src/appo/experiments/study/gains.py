"""The grid of a study -> what a better perceiver and what a better reasoner adds to the score, with intervals.

Questions are the independent units: a resample draws questions, and all cells see the same draw. So everything here is
paired, and a difference of two gains has its own interval.

Shape suffixes: Q questions, P perceivers, R reasoners, both from weak to strong, B bootstrap resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appo.evaluation.statistics import RESAMPLES

Grid = NDArray[np.float64]
PERCEPTION, REASONING = -2, -1  # axes of a grid


@dataclass(frozen=True)
class Gain:
    """A number with its 95 % percentile interval (Efron 1979)."""

    value: float
    low: float
    high: float


def gains(right_QPR: Grid, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Gain]:
    """Every figure of `figures` over questions, with its interval; what some resample cannot say is left out.

    Args:
        right_QPR: float (Q, P, R), how right each answer is, 0 to 1.
        resamples: how often the questions are drawn anew.
        seed: of the random generator.

    Raises:
        ValueError: there is no question, or not at least two perceivers or two reasoners.
    """
    questions, perceivers, reasoners = right_QPR.shape
    if not questions or max(perceivers, reasoners) < 2:
        raise ValueError(f"{questions} questions, {perceivers} perceivers, {reasoners} reasoners: there is no gain")
    draws_BQ = np.random.default_rng(seed).multinomial(questions, np.full(questions, 1 / questions), size=resamples)
    means_BPR = (draws_BQ @ right_QPR.reshape(questions, -1) / questions).reshape(-1, perceivers, reasoners)
    found, drawn = figures(right_QPR.mean(axis=0)), figures(means_BPR)
    return {name: _gain(found[name], drawn[name]) for name in found if np.isfinite([found[name], *drawn[name]]).all()}


def figures(grid_PR: Grid) -> dict[str, Any]:
    """All figures of a grid of mean scores, or of many: (..., P, R) -> name -> (...).

    ``perception`` is the gain from the weakest to the strongest perceiver, averaged over reasoners;
    ``perception/step`` the same a step; ``perception/step/1`` that of the first step. ``perception/carried``: of each
    point by which the two perceivers differ before the strongest reasoner, how much remains on average over all
    reasoners. This is a slope, so it does not grow with the range of perceivers. The same for ``reasoning``, with
    perceivers and reasoners exchanged. ``difference`` is perception minus reasoning. What cannot be said is left out.
    """
    named: dict[str, Any] = {}
    for name, axis in (("perception", PERCEPTION), ("reasoning", REASONING)):
        if grid_PR.shape[axis] > 1:
            named |= _along(name, grid_PR, axis)
    if grid_PR.shape[PERCEPTION] > 1 and grid_PR.shape[REASONING] > 1:
        for part in ("", "/step", "/carried"):
            named[f"difference{part}"] = named[f"perception{part}"] - named[f"reasoning{part}"]
    return named


def _along(name: str, grid_PR: Grid, axis: int) -> dict[str, Any]:
    other = PERCEPTION + REASONING - axis
    steps = np.diff(grid_PR, axis=axis)
    whole = steps.sum(axis=axis)  # for each member of the other axis, which is now the last
    mean = whole.mean(axis=-1)
    count = steps.shape[axis]
    each = steps.mean(axis=other)
    with np.errstate(divide="ignore", invalid="ignore"):
        carried = np.where(whole[..., -1] > 0, mean / whole[..., -1], np.nan)
    single = {f"{name}/step/{place + 1}": each[..., place] for place in range(count)}
    return {name: mean, f"{name}/step": mean / count, **single, f"{name}/carried": carried}


def _gain(value: Any, drawn_B: Grid) -> Gain:
    low, high = np.quantile(drawn_B, [0.025, 0.975])
    return Gain(float(value), float(low), float(high))
