"""Each benchmark's scores by its authors' formulas, with intervals, for any number of responses to a question.

What a benchmark measures in a response, its sub-scores and its averages are its own (:mod:`appo.data.benchmark`).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

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
    """One figure."""

    name: str  # such as ``accuracy``, ``C``, ``mIoU``, ``area/memory``, ``pass@4``, ``majority``
    value: float  # 0 to 1; a missing prediction counts as wrong
    low: float  # lower end of the 95 % interval
    high: float  # its upper end
    questions: int  # how many the figure is about
    interval: str  # ``wilson`` where each question is right or wrong, else ``bootstrap`` over questions
    answered_only: float | None  # the value without missing predictions; None if none is missing (or all are)


@dataclass(frozen=True)
class Difference:
    """How much better a second model does the same questions, in one figure."""

    name: str  # as in `Score`
    first: float  # the first model's figure
    second: float  # the second's
    low: float  # lower end of the 95 % interval of second - first, by a bootstrap that draws questions as pairs
    high: float  # its upper end
    p_value: float | None  # that both are right equally often (McNemar, exact); None where the figure is no plain share
    questions: int  # how many the figure is about


def official_scores(dataset: str | Benchmark, answered: Sequence[Answered], *, lenient: bool = False) -> list[Score]:
    """All figures of a dataset: the headline, its other measures, sub-scores, and for K > 1 pass@k and majority.

    With K responses to a question its value is their mean; those that a question lacks count as wrong, as does a
    question without any. A sub-score without questions is left out. pass@k counts a response as right from `RIGHT`;
    the majority is the answer that most responses give, the first one among equals.

    Args:
        dataset: a name of :data:`appo.data.DATASETS`, or a benchmark of your own.
        answered: every question, in any order, with its responses.
        lenient: parse responses by :func:`appo.rewards.answer_parsing.lenient_answer`.

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
    """Share of the responses that do not have the requested format; 0 without responses. Raises ValueError."""
    texts = [text for one in answered for text in one.texts]
    response_format = get_benchmark(dataset).response_format
    bad = sum(strict_answer(text, response_format) is None for text in texts)
    return bad / len(texts) if texts else 0.0


class _Value(NamedTuple):
    """One question's value in a figure."""

    counted: float  # a missing prediction counts as wrong
    answered: float | None  # without missing predictions; None where nothing is left
    binary: bool  # whether the value can only be 0 or 1
    path: tuple[str, ...]  # the groups whose means are averaged (`appo.data.Benchmark.path`)


class _Row(NamedTuple):
    """One figure before it is averaged, with one value per question."""

    name: str
    values: list[_Value]

    @property
    def is_share(self) -> bool:
        """Whether the figure is a share of right questions: neither graded nor a mean of several means."""
        return all(value.binary for value in self.values) and len({value.path for value in self.values}) == 1

    @property
    def counted(self) -> tuple[list[list[float]], list[float]]:
        """The values as `_cells` has them."""
        return _cells((value.counted, value.path) for value in self.values)


def _rows(dataset: str | Benchmark, answered: Sequence[Answered], lenient: bool) -> list[_Row]:
    """Every figure of `official_scores`, in its order."""
    if not answered:
        raise ValueError("there is no question to score: give at least one")
    benchmark, questions = get_benchmark(dataset), [one.question for one in answered]
    marks = [list(map(benchmark.marker(one.question, lenient=lenient), one.texts)) for one in answered]
    samples = max(1, *map(len, marks))
    paths = [benchmark.path(question) for question in questions]

    def row(name: str, values: Iterable[tuple[float, float | None]], binary: Sequence[bool]) -> _Row:
        return _Row(name, [_Value(*pair, one, path) for pair, one, path in zip(values, binary, paths, strict=True)])

    def binary(measure: Measure) -> list[bool]:
        return [not measure.graded and question.kind not in GRADED for question in questions]

    rows = []
    for measure in benchmark.measures:
        means = [_mean_of(_values(measure, group), samples) for group in marks]
        rows.append(row(measure.name, means, [samples == 1 and one for one in binary(measure)]))
    headline, first = rows[0], benchmark.measures[0]
    parts = [benchmark.parts(question) for question in questions]
    for name in _in_order({name for names in parts for name in names}, benchmark.part_order):
        own = [value for value, names in zip(headline.values, parts, strict=True) if name in names]
        rows.append(_Row(name, own))
    if samples > 1:
        for k in (1 << power for power in range(samples.bit_length())):
            passed = [_passed(_values(first, group), samples, k) for group in marks]
            rows.append(row(f"pass@{k}", passed, [k == samples] * len(marks)))
        rows.append(row("majority", [_majority(first, group) for group in marks], binary(first)))
    return rows


def _values(measure: Measure, marks: Sequence[Mark]) -> list[float]:
    """The measure of the responses that are a prediction."""
    return [value for value in map(measure.of, marks) if value is not None]


def _mean_of(values: list[float], samples: int) -> tuple[float, float | None]:
    """One question's mean over its responses: with those missing as wrong, and without them."""
    return math.fsum(values) / samples, math.fsum(values) / len(values) if values else None


def _passed(values: list[float], samples: int, k: int) -> tuple[float, float | None]:
    value = pass_at_k(sum(one >= RIGHT for one in values), samples, k)
    return value, value if values else None


def _majority(measure: Measure, marks: Sequence[Mark]) -> tuple[float, float | None]:
    """The value of the first response that gives the most frequent answer."""
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
    n, (cells, weights) = len(row.values), row.counted
    value = _mean(cells, weights)
    low, high = wilson_interval(value, n) if row.is_share else bootstrap_interval(cells, weights)
    answered = [(one.answered, one.path) for one in row.values if one.answered is not None]
    differs = any(one.answered != one.counted for one in row.values)
    answered_only = _mean(*_cells(answered)) if answered and differs else None
    return Score(row.name, value, low, high, n, "wilson" if row.is_share else "bootstrap", answered_only)


def _difference(first: _Row, second: _Row) -> Difference:
    better = [b.counted - a.counted for a, b in zip(first.values, second.values, strict=True)]
    low, high = bootstrap_interval(*_cells(zip(better, (value.path for value in first.values), strict=True)))
    is_share = first.is_share and second.is_share
    p_value = mcnemar(sum(one < 0 for one in better), sum(one > 0 for one in better)) if is_share else None
    return Difference(first.name, _mean(*first.counted), _mean(*second.counted), low, high, p_value, len(better))


def _cells(values: Iterable[tuple[float, tuple[str, ...]]]) -> tuple[list[list[float]], list[float]]:
    """The values of each path, and the weight of their mean: each group of a path averages those directly in it."""
    cells: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for value, path in values:
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
