"""The summary of a study: the score of every cell, gains, what is missing and what it cost.

Questions are the independent units: a resample draws questions, and all cells use the same draw. So all gains are
paired, and a difference of two gains has its own interval.

Shape suffixes: Q questions, P perceivers, R reasoners, both from weak to strong, B bootstrap resamples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appo.evaluation.statistics import RESAMPLES, bootstrap_interval, wilson_interval
from appo.experiments.study.answering import Cell, Line, column, costs, latest_lines
from appo.experiments.study.reasoners import Endpoint
from appo.rewards.answer_parsing import lenient_answer
from appo.rewards.functions import comparison
from appo.types import VideoQA

# --- gains -----------------------------------------------------------------------------------------------------------


Grid = NDArray[np.float64]
PERCEPTION, REASONING = -2, -1  # axes of a grid


@dataclass(frozen=True)
class Gain:
    """A number with its 95 % percentile interval (Efron 1979)."""

    value: float
    low: float
    high: float


def gains(right_QPR: Grid, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Gain]:
    """Every figure of `figures` over questions, with its interval, unless some resample has no such figure.

    Args:
        right_QPR: float (Q, P, R), the score of each answer, 0 to 1.
        resamples: of the bootstrap.
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
    ``perception/step`` the same per step; ``perception/step/1`` that of the first step. ``perception/carried`` is this
    gain divided by the gain with the strongest reasoner. It is a slope, so it does not grow with the range of
    perceivers. The same for ``reasoning``, with perceivers and reasoners exchanged. ``difference`` is perception minus
    reasoning. Undefined figures are left out.
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


# --- the summary -----------------------------------------------------------------------------------------------------


Cells = Mapping[tuple[str, str], Cell]  # by the names of perceiver and reasoner
NONE = float("nan")


def summary_of(
    questions: Sequence[VideoQA],
    perceivers: Sequence[str],
    reasoners: Sequence[str],
    cells: Cells,
    described: Mapping[str, Mapping[str, Line]],
    endpoints: Mapping[str, Endpoint],
) -> dict[str, Any]:
    """Everything that the table reports, as plain values.

    A cell's score is over the questions that it answered; gains are over those answered in all cells.

    Args:
        questions: all.
        perceivers: names, from weak to strong.
        reasoners: names, from weak to strong.
        cells: of all pairs.
        described: the lines of each perceiver's file, by question.
        endpoints: by the reasoner's name.
    """
    lines = {pair: latest_lines(cell.file) for pair, cell in cells.items()}
    right = {pair: _right(questions, cells[pair], lines[pair]) for pair in cells}
    right_QPR = np.array([[right[p, r] for r in reasoners] for p in perceivers]).transpose(2, 0, 1)
    complete = ~np.isnan(right_QPR).any(axis=(1, 2))
    enough = complete.any() and max(len(perceivers), len(reasoners)) > 1
    found = gains(right_QPR[complete]) if enough else {}
    return {
        "questions": len(questions),
        "complete": int(complete.sum()),
        "perceivers": list(perceivers),
        "reasoners": list(reasoners),
        "cells": [_cell(p, r, right[p, r]) for p in perceivers for r in reasoners],
        "gains": {name: vars(gain) for name, gain in found.items()},
        "missing": [*_undescribed(questions, described), *_unanswered(cells, lines)],
        "empty": _empty(reasoners, cells, lines),
        "costs": {name: costs(endpoint, column(cells, name)) for name, endpoint in endpoints.items()},
    }


def score(question: VideoQA, text: str) -> float:
    """The score of an answer, 0 to 1, by the lenient parser of `appo eval`: a reasoner was trained on no format."""
    compare = comparison(question.answer, question.kind, question.options)
    return compare(lenient_answer(text, question).answer)


def _right(questions: Sequence[VideoQA], cell: Cell, lines: Mapping[str, Line]) -> list[float]:
    """One number a question; NaN where there is no answer."""
    answers = cell.answers(lines)
    return [
        score(question, answers[one]["text"]) if (one := question.id) in answers else NONE for question in questions
    ]


def _cell(perceiver: str, reasoner: str, right: Sequence[float]) -> dict[str, Any]:
    known = [value for value in right if value == value]
    mean = sum(known) / len(known) if known else None
    low, high = _interval(known) if known else (None, None)
    return {"perceiver": perceiver, "reasoner": reasoner, "score": mean, "low": low, "high": high,
            "answered": len(known)}  # fmt: skip


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """Of a mean: Wilson's where every answer is right or wrong, else by bootstrap, as `appo eval` has them."""
    if set(values) <= {0.0, 1.0}:
        return wilson_interval(sum(values) / len(values), len(values))
    return bootstrap_interval([values])


def _undescribed(questions: Sequence[VideoQA], described: Mapping[str, Mapping[str, Line]]) -> list[dict[str, Any]]:
    gaps = []
    for name, lines in described.items():
        if missing := [question.id for question in questions if "text" not in lines.get(question.id, {})]:
            why = "; ".join(sorted({lines[i]["error"] for i in missing if i in lines})[:1]) or "not asked yet"
            gaps.append({"what": f"descriptions of {name}", "count": len(missing), "why": why, "ids": missing})
    return gaps


def _unanswered(cells: Cells, lines: Mapping[tuple[str, str], Mapping[str, Line]]) -> list[dict[str, Any]]:
    gaps = []
    for pair, cell in cells.items():
        found, answers = lines[pair], cell.answers(lines[pair])
        if missing := [task for task in cell.tasks if task.id not in answers]:
            errors = [found[task.id]["error"] for task in missing if found.get(task.id, {}).get("error")]
            failed = f"{len(errors)} failed, such as {errors[0]}" if errors else "not asked yet"
            what = f"answers of {pair[1]} to {pair[0]}"
            gaps.append({"what": what, "count": len(missing), "why": failed, "ids": [task.id for task in missing]})
    return gaps


def _empty(
    reasoners: Sequence[str], cells: Cells, lines: Mapping[tuple[str, str], Mapping[str, Line]]
) -> dict[str, int]:
    count: Counter[str] = Counter()
    for pair, cell in cells.items():
        count[pair[1]] += sum(not line["text"].strip() for line in cell.answers(lines[pair]).values())
    return {name: count[name] for name in reasoners if count[name]}
