"""Each benchmark's scores by its authors' formulas, with intervals, for any number of responses to a question.

What a benchmark measures in a response, its sub-scores and its averages are its own (:mod:`appo.data.benchmark`).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from appo.data import Benchmark, Mark, Measure, get_benchmark
from appo.evaluation.statistics import bootstrap_interval, mcnemar, pass_at_k, wilson_interval
from appo.rewards.answer_parsing import strict_answer
from appo.rewards.scorers import GRADED

if TYPE_CHECKING:
    from appo.types import VideoQA

RIGHT = 0.5  # from where a response counts as right in pass@k


@dataclass(frozen=True)
class Answered:
    """One question and the K responses to it; no texts: the prediction is missing."""

    question: VideoQA
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Score:
    """One figure.

    Attributes:
        name: such as ``accuracy``, ``C``, ``mIoU``, ``area/memory``, ``pass@4``, ``majority``.
        value: 0 to 1; a missing prediction counts as wrong.
        low: lower end of the 95 % interval.
        high: its upper end.
        questions: how many the figure is about.
        interval: ``wilson`` where each question is right or wrong, else ``bootstrap`` over questions.
        answered_only: what a script shows that skips missing predictions; None where none is missing (or all are).
    """

    name: str
    value: float
    low: float
    high: float
    questions: int
    interval: str
    answered_only: float | None


@dataclass(frozen=True)
class Difference:
    """How much better a second model does the same questions, in one figure.

    Attributes:
        name: as in `Score`.
        first: the first model's figure.
        second: the second's.
        low: lower end of the 95 % interval of second - first, by a bootstrap that draws questions as pairs.
        high: its upper end.
        p_value: that both are right equally often (McNemar, exact); None where the figure is no plain share.
        questions: how many the figure is about.
    """

    name: str
    first: float
    second: float
    low: float
    high: float
    p_value: float | None
    questions: int


def official_scores(dataset: str | Benchmark, answered: Sequence[Answered], *, lenient: bool = False) -> list[Score]:
    """All figures of a dataset: the headline, its other measures, sub-scores, and for K > 1 pass@k and majority.

    With K responses to a question its value is their mean; those that a question lacks count as wrong, as does a
    question without any. A sub-score without questions is left out. pass@k counts a response as right from `RIGHT`;
    the majority is the answer that most responses give, the first seen among equals.

    Args:
        dataset: a name of :data:`appo.data.DATASETS`, or a benchmark of your own.
        answered: every question that was asked, in any order, with the responses.
        lenient: read responses as a forgiving reader would (:func:`appo.rewards.answer_parsing.lenient_answer`).

    Raises:
        ValueError: there is no such dataset, no question, or a gold answer that cannot be scored.
    """
    return [_score(row) for row in _rows(dataset, answered, lenient)]


def score_differences(
    dataset: str | Benchmark, first: Sequence[Answered], second: Sequence[Answered], *, lenient: bool = False
) -> list[Difference]:
    """Every figure of `official_scores` for two models that answered the same questions, compared in pairs.

    Figures that only one of the two has (pass@k for more responses) are left out.

    Raises:
        ValueError: as `official_scores`, or the questions differ.
    """
    place_of = {one.question.id: place for place, one in enumerate(second)}
    if len(first) != len(second) or any(one.question.id not in place_of for one in first):
        lonely = {one.question.id for one in first} ^ set(place_of)
        raise ValueError(f"the two answered different questions ({min(lonely, default='some twice')}): give the same")
    aligned = [second[place_of[one.question.id]] for one in first]
    others = {row.name: row for row in _rows(dataset, aligned, lenient)}
    return [_difference(row, others[row.name]) for row in _rows(dataset, first, lenient) if row.name in others]


def unparsable_share(dataset: str | Benchmark, answered: Sequence[Answered]) -> float:
    """Share of the responses that are not of the format asked for; 0 where there are none.

    Raises:
        ValueError: there is no such dataset.
    """
    texts = [text for one in answered for text in one.texts]
    asked = get_benchmark(dataset).response_format
    bad = sum(strict_answer(text, asked) is None for text in texts)
    return bad / len(texts) if texts else 0.0


@dataclass(frozen=True)
class _Row:
    """One figure before it is averaged; all lists have one entry a question.

    Attributes:
        values: what the question counts, a missing prediction as wrong.
        skipping: the same without missing predictions; None where nothing is left.
        binary: whether the value can only be 0 or 1.
        paths: the groups whose means are averaged (`appo.data.Benchmark.path`).
    """

    name: str
    values: list[float]
    skipping: list[float | None]
    binary: list[bool]
    paths: list[tuple[str, ...]]

    @property
    def is_share(self) -> bool:
        """Whether the figure is a share of right questions: neither graded nor a mean of several means."""
        return all(self.binary) and len(set(self.paths)) == 1

    def part(self, name: str, places: Sequence[int]) -> _Row:
        """The same figure of some of the questions."""
        return _Row(
            name,
            [self.values[place] for place in places],
            [self.skipping[place] for place in places],
            [self.binary[place] for place in places],
            [self.paths[place] for place in places],
        )


def _rows(dataset: str | Benchmark, answered: Sequence[Answered], lenient: bool) -> list[_Row]:
    """Every figure of `official_scores`, in its order."""
    if not answered:
        raise ValueError("there is no question to score: give at least one")
    how, questions = get_benchmark(dataset), [one.question for one in answered]
    marks = [list(map(how.marker(one.question, lenient=lenient), one.texts)) for one in answered]
    samples = max(1, *map(len, marks))
    paths = [how.path(question) for question in questions]
    rows = []
    for measure in how.measures:
        binary = [samples == 1 and not measure.graded and question.kind not in GRADED for question in questions]
        rows.append(_row(measure.name, [_mean_of(_said(measure, group), samples) for group in marks], binary, paths))
    parts = [how.parts(question) for question in questions]
    for name in _in_order({name for names in parts for name in names}, how.part_order):
        rows.append(rows[0].part(name, [place for place, names in enumerate(parts) if name in names]))
    return rows + (_sampled_rows(how.measures[0], questions, marks, paths) if samples > 1 else [])


def _sampled_rows(
    measure: Measure, questions: Sequence[VideoQA], marks: Sequence[list[Mark]], paths: list[tuple[str, ...]]
) -> list[_Row]:
    """pass@k for powers of two, and the majority's score."""
    samples, rows = max(map(len, marks)), []
    for k in (1 << power for power in range(samples.bit_length())):
        passed = [_passed(_said(measure, group), samples, k) for group in marks]
        rows.append(_row(f"pass@{k}", passed, [k == samples] * len(marks), paths))
    binary = [not measure.graded and question.kind not in GRADED for question in questions]
    return [*rows, _row("majority", [_majority(measure, group) for group in marks], binary, paths)]


def _row(
    name: str, tallies: Sequence[tuple[float, float | None]], binary: list[bool], paths: list[tuple[str, ...]]
) -> _Row:
    return _Row(name, [value for value, _ in tallies], [skipping for _, skipping in tallies], binary, paths)


def _said(measure: Measure, marks: Sequence[Mark]) -> list[float]:
    """The measure of those responses that are a prediction at all."""
    return [value for value in map(measure.of, marks) if value is not None]


def _mean_of(said: list[float], samples: int) -> tuple[float, float | None]:
    """One question's mean over its responses: those missing as wrong, and without them."""
    return math.fsum(said) / samples, math.fsum(said) / len(said) if said else None


def _passed(said: list[float], samples: int, k: int) -> tuple[float, float | None]:
    value = pass_at_k(sum(one >= RIGHT for one in said), samples, k)
    return value, value if said else None


def _majority(measure: Measure, marks: Sequence[Mark]) -> tuple[float, float | None]:
    """What the first response counts that gives the most frequent answer."""
    votes = Counter(mark.vote for mark in marks if mark.vote is not None)
    if not votes:
        return 0.0, 0.0 if marks else None
    winner = votes.most_common(1)[0][0]  # among equals the one counted first
    value = measure.of(next(mark for mark in marks if mark.vote == winner))
    return value or 0.0, value


def _in_order(names: set[str], order: Sequence[str]) -> list[str]:
    """The names that an order has in it, then the others by name."""
    return [*(name for name in order if name in names), *sorted(names - set(order))]


def _score(row: _Row) -> Score:
    n, cells, weights = len(row.values), *_cells(row.values, row.paths)
    value = _mean(cells, weights)
    low, high = wilson_interval(value, n) if row.is_share else bootstrap_interval(cells, weights)
    answered = [place for place, value in enumerate(row.skipping) if value is not None]
    answered_only = None
    if answered and row.skipping != row.values:
        there = [row.skipping[place] or 0.0 for place in answered]
        answered_only = _mean(*_cells(there, [row.paths[place] for place in answered]))
    return Score(row.name, value, low, high, n, "wilson" if row.is_share else "bootstrap", answered_only)


def _difference(first: _Row, second: _Row) -> Difference:
    better = [b - a for a, b in zip(first.values, second.values, strict=True)]
    low, high = bootstrap_interval(*_cells(better, first.paths))
    is_share = first.is_share and second.is_share
    p_value = mcnemar(sum(one < 0 for one in better), sum(one > 0 for one in better)) if is_share else None
    before, after = (_mean(*_cells(row.values, row.paths)) for row in (first, second))
    return Difference(first.name, before, after, low, high, p_value, len(better))


def _cells(values: Sequence[float], paths: Sequence[tuple[str, ...]]) -> tuple[list[list[float]], list[float]]:
    """The values of each path, and what their mean counts: each group on the way averages those directly in it."""
    cells: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for value, path in zip(values, paths, strict=True):
        cells[path].append(value)
    inside: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for path in cells:
        for depth, name in enumerate(path):
            inside[path[:depth]].add(name)
    weights = [math.prod(1 / len(inside[path[:depth]]) for depth in range(len(path))) for path in sorted(cells)]
    return [cells[path] for path in sorted(cells)], weights


def _mean(cells: Sequence[Sequence[float]], weights: Sequence[float]) -> float:
    total = math.fsum(weight * math.fsum(cell) / len(cell) for cell, weight in zip(cells, weights, strict=True))
    return min(1.0, total)  # thirds and eighths of weights may round to a little more
