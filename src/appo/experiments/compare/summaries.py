"""Finished cells -> means, paired differences with intervals, and what share of an oracle's gain is recovered.

Seeds are the independent units: two methods are compared by their runs with the same seed, which have the same prompts
in the same order. Intervals are 95 % percentile bootstraps over these differences, too narrow for eight of them; the
p-value of flipping their signs is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from appo.evaluation.statistics import bootstrap_interval, sign_flip
from appo.experiments.compare.methods import ORACLES

Cell = Mapping[str, Any]
Cells = Mapping[tuple[str, int], Cell]  # by method and seed
BASELINES = ("dapo", "grpo")
NONE = float("nan")  # where a method has no such number
LEVELS = ("L1", "L2", "L3")


def late_reward(cell: Cell) -> float:
    """Sampled accuracy on fresh prompts, first round, over the last third of the steps. NaN without any."""
    values = _accuracies(cell)
    return _average(values[-max(1, len(values) // 3) :])


def whole_reward(cell: Cell) -> float:
    """The same over all steps: the area under the learning curve, which measures speed as well as gain."""
    return _average(_accuracies(cell))


def _accuracies(cell: Cell) -> list[float]:
    return [step["accuracy"] for step in cell["curve"] if "accuracy" in step]


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else NONE


def share(bits: str) -> float:
    """Share of ones."""
    return bits.count("1") / len(bits)


def _level(level: str, name: str) -> Callable[[Cell], float]:
    return lambda cell: share(cell["levels"][level][name])


def _described(name: str) -> Callable[[Cell], float]:
    """The share of questions whose *what* (*when*) is described rightly, over all levels."""
    return lambda cell: share("".join(cell["levels"][level][name] for level in LEVELS))


# Everything that is compared: all are shares of one.
MEASURES: dict[str, Callable[[Cell], float]] = {
    "learning": whole_reward,
    "reward": late_reward,
    **{level: _level(level, "right") for level in LEVELS},
    "what": _described("what"),
    "when": _described("when"),
}


def paired_seeds(cells: Cells, methods: Sequence[str]) -> list[int]:
    """The seeds that all of these methods have finished; the start counts for all."""
    trained = [method for method in methods if method != "start"]
    seeds = [{seed for method, seed in cells if method == name} for name in trained]
    return sorted(set.intersection(*seeds)) if seeds else []


def difference(cells: Cells, method: str, baseline: str, measure: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Mean of ``method`` minus ``baseline`` over the seeds, its interval and p (None if unknown), and each seed's."""
    read = MEASURES[measure]
    each = [read(cells[method, seed]) - read(cells[baseline, seed]) for seed in seeds]
    known = len(each) > 1 and not any(map(math.isnan, each))
    low, high = bootstrap_interval([each]) if known else (None, None)
    p = sign_flip(each) if known else None
    return {"mean": sum(each) / len(each), "low": low, "high": high, "p": p, "each": each}


def summary(cells: Cells, methods: Sequence[str]) -> dict[str, Any]:
    """Everything that the table reports. Two methods are compared over all seeds that both have finished.

    Returns:
        ``seeds``: method -> its finished seeds; ``means``: method -> measure -> mean over them, and tokens generated,
        mean weight, entropy, gradient norm and perception; ``differences``: baseline -> method -> measure ->
        :func:`difference`;
        ``recovered``: oracle -> method -> measure -> share of the oracle's gain over DAPO, over the seeds of all three,
        if the interval of the oracle's gain is above 0.
    """
    seeds = {name: paired_seeds(cells, [name]) for name in methods if name != "start"}
    seeds = {name: own for name, own in seeds.items() if own}
    means = {name: _means([cells[name, seed] for seed in own]) for name, own in seeds.items()}
    if ("start", 0) in cells and "start" in methods:
        means = {"start": _means([cells["start", 0]]), **means}
    differences = {
        baseline: {
            name: {measure: difference(cells, name, baseline, measure, both) for measure in MEASURES}
            for name in seeds
            if name != baseline and (both := paired_seeds(cells, [name, baseline]))
        }
        for baseline in BASELINES
        if baseline in seeds
    }
    recovered = {
        oracle: _recovered(cells, [name for name in seeds if name not in ("dapo", oracle)], oracle)
        for oracle in ORACLES
        if oracle in seeds and "dapo" in seeds
    }
    return {"seeds": seeds, "means": means, "differences": differences, "recovered": recovered}


def _means(cells: Sequence[Cell]) -> dict[str, float | None]:
    """The mean of every measure over cells; None where none of them has it."""
    rows = {name: [read(cell) for cell in cells] for name, read in MEASURES.items()}
    rows["tokens"] = [max((step.get("generated", NONE) for step in cell["curve"]), default=NONE) for cell in cells]
    for name in ("mean_weight", "entropy", "grad_norm", "recall", "crucial"):
        steps = [[step[name] for step in cell["curve"] if name in step] for cell in cells]
        rows[name] = [sum(values) / len(values) if values else NONE for values in steps]
    for name in ("winners", "losers", "recall_raw", "crucial_raw", "recall_relative", "crucial_relative"):
        rows[name] = [cell["perception"].get(name, NONE) for cell in cells]
    means = {name: sum(values) / len(values) for name, values in rows.items()}
    return {name: None if math.isnan(mean) else mean for name, mean in means.items()}


def _recovered(cells: Cells, methods: Sequence[str], oracle: str) -> dict[str, dict[str, float]]:
    shares: dict[str, dict[str, float]] = {}
    for name in methods:
        seeds = paired_seeds(cells, [name, oracle, "dapo"])
        for measure in MEASURES if seeds else ():
            own, best = (difference(cells, one, "dapo", measure, seeds) for one in (name, oracle))
            if best["low"] is not None and best["low"] > 0:
                shares.setdefault(name, {})[measure] = own["mean"] / best["mean"]
    return shares
