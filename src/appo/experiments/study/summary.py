"""What a study's folder says: the score of every cell, the gains, what is missing and what it cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from appo.evaluation.statistics import bootstrap_interval, wilson_interval
from appo.experiments.study.answering import Cell, answers, column, costs
from appo.experiments.study.endpoints import Endpoint
from appo.experiments.study.folder import Line, said
from appo.experiments.study.gains import gains
from appo.rewards.answer_parsing import lenient_answer
from appo.rewards.functions import comparison
from appo.types import VideoQA

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
    """Everything that the table shows, as plain values.

    A cell's score is over the questions that it answered; gains are over those answered in all cells.

    Args:
        questions: all.
        perceivers: names, from weak to strong.
        reasoners: names, from weak to strong.
        cells: of all pairs.
        described: the lines of each perceiver's file, by question.
        endpoints: by the reasoner's name.
    """
    lines = {pair: said(cell.file) for pair, cell in cells.items()}
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
    """How right an answer is, 0 to 1, read as `appo eval` reads leniently: a reasoner was trained on no format."""
    compare = comparison(question.answer, question.kind, question.options)
    return compare(lenient_answer(text, question).answer)


def _right(questions: Sequence[VideoQA], cell: Cell, lines: Mapping[str, Line]) -> list[float]:
    """One number a question; NaN where there is no answer."""
    there = cell.among(lines)
    return [score(question, there[question.id]["text"]) if question.id in there else NONE for question in questions]


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
        found = lines[pair]
        missing = [task for task in cell.tasks if not answers(found.get(task.id, {}), task)]
        if missing:
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
        count[pair[1]] += sum(not line["text"].strip() for line in cell.among(lines[pair]).values())
    return {name: count[name] for name in reasoners if count[name]}
