"""Exact spans: a table, a fine grid as oracle, and what must hold for any spans."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appo.rewards.temporal_iou import duration, exact_span, grounding_overlap, temporal_iou, union


@pytest.mark.parametrize(
    ("predicted", "true", "iou", "remark"),
    [
        ([(0, 10)], [(0, 10)], 1, "equal"),
        ([(0, 10)], [(5, 15)], Fraction(1, 3), "half over"),
        ([(2, 4)], [(0, 10)], Fraction(1, 5), "inside"),
        ([(0, 10)], [(20, 30)], 0, "apart"),
        ([(0, 10)], [(10, 20)], 0, "touching is no overlap"),
        ([(3.2, 5.1)], [("3.2", "5.1")], 1, "floats are the decimals that were written"),
        ([(0, 0.1), (0.1, 0.3)], [(0, 0.3)], 1, "0.1 + 0.2 is 0.3 here"),
        ([(0, 6), (4, 10)], [(0, 10)], 1, "overlapping predictions count once"),
        ([(0, 10)] * 100, [(0, 10)], 1, "saying it a hundred times is saying it once"),
        ([(6, 8), (0, 2)], [(0, 2), (6, 8)], 1, "several spans, in any order"),
        ([(0, 2)], [(0, 2), (6, 8)], Fraction(1, 2), "one of two spans"),
        ([(0, 8)], [(0, 2), (6, 8)], Fraction(1, 2), "the gap between two spans counts against it"),
        ([(3, 3)], [(0, 10)], 0, "an instant covers nothing"),
        ([(3, 3)], [(3, 3)], 0, "not even itself"),
        ([], [(0, 10)], 0, "nothing predicted"),
        ([], [], 0, "nothing at all"),
        ([(0, 1e300)], [(0, 2e300)], Fraction(1, 2), "huge"),
        ([(0, 1e-300)], [(0, 1)], Fraction(1, 10**300), "tiny"),
    ],
)
def test_temporal_iou(predicted: list[Any], true: list[Any], iou: Fraction, remark: str) -> None:
    assert temporal_iou(predicted, true) == iou, remark
    assert temporal_iou(true, predicted) == iou, f"{remark}, the other way round"


@pytest.mark.parametrize(
    ("span", "says"),
    [
        ((5, 3), "ends before it starts"),
        ((float("nan"), 3), "finite"),
        ((0, float("inf")), "finite"),
        (("a", "b"), "finite"),
        ((None, 3), "finite"),
        ((1, 2, 3), "not a pair"),
        ((1,), "not a pair"),
        ("12", "not a pair"),
        (7, "not a pair"),
    ],
)
def test_what_is_no_span_is_refused(span: Any, says: str) -> None:
    for use in (exact_span, lambda span: union([span]), lambda span: temporal_iou([(0, 1)], [span])):
        with pytest.raises(ValueError, match=says):
            use(span)


def test_union_merges_what_overlaps_or_touches() -> None:
    assert union([(5, 6), (0, 2), (2, 3), (1, 1.5), (9, 9)]) == [(0, 3), (5, 6)]
    assert duration([(5, 6), (0, 2), (2, 3), (9, 9)]) == 4
    assert union([]) == []


times = st.integers(0, 40)
spans = st.lists(st.tuples(times, times).map(lambda pair: tuple(sorted(pair))), max_size=6)


def cells(spans: list[tuple[int, int]]) -> set[int]:
    """The oracle: time cut into unit cells, which is exact where every span starts and ends on the grid."""
    return {cell for start, end in spans for cell in range(start, end)}


@given(spans, spans, st.integers(1, 1000))
def test_iou_is_that_of_a_fine_grid(predicted: Any, true: Any, scale: int) -> None:
    one, other = cells(predicted), cells(true)
    expected = Fraction(len(one & other), len(one | other)) if one | other else 0

    def scaled(spans: Any) -> list[tuple[Fraction, Fraction]]:
        return [(Fraction(start, scale), Fraction(end, scale)) for start, end in spans]

    assert temporal_iou(predicted, true) == expected
    assert temporal_iou(scaled(predicted), scaled(true)) == expected, "the unit of time does not matter"


seconds = st.floats(0, 1e6, allow_nan=False, allow_infinity=False)
float_spans = st.lists(st.tuples(seconds, seconds).map(lambda pair: tuple(sorted(pair))), max_size=5)


@given(float_spans, float_spans)
def test_iou_is_symmetric_within_its_range_and_1_only_for_the_same_time(one: Any, other: Any) -> None:
    iou = temporal_iou(one, other)
    assert 0 <= iou <= 1
    assert iou == temporal_iou(other, one)
    assert (iou == 1) == (union(one) == union(other) != [])
    assert temporal_iou(one, one) == (1 if duration(one) else 0)


@given(float_spans, float_spans, st.data())
def test_cutting_a_span_changes_nothing(one: Any, other: Any, data: st.DataObject) -> None:
    pieces = []
    for start, end in map(exact_span, one):
        cut = start + (end - start) * data.draw(st.fractions(0, 1))
        pieces += [(cut, end), (start, cut)]
    assert temporal_iou(pieces, other) == temporal_iou(one, other)
    assert union(pieces) == union(one)


@pytest.mark.parametrize(
    ("predicted", "true", "iou", "iop", "remark"),
    [
        ((0, 10), [(0, 10)], 1, 1, "equal"),
        ((2, 4), [(0, 10)], 0.2, 1, "inside: precise, but short"),
        ((0, 10), [(2, 4)], 0.2, 0.2, "around"),
        ((0, 10), [(5, 15)], Fraction(1, 3), 0.5, "half over"),
        ((0, 1), [(9, 10)], 0, 0, "apart"),
        ((0, 10), [(0, 4), (6, 10)], 0.4, 0.4, "two true spans: the better one, not their union"),
        ((0, 4), [(0, 10), (3, 4)], 0.4, 1, "each measure at its best"),
        ((3, 3), [(0, 10)], 0, 1, "an instant inside, as the official script has it"),
        ((10, 10), [(0, 10)], 0, 1, "an instant at the end"),
        ((11, 11), [(0, 10)], 0, 0, "an instant outside"),
        ((0, 10), [(5, 5)], 0, 0, "a true instant"),
        ((0, 10), [], 0, 0, "no true span"),
    ],
)
def test_grounding_overlap(predicted: Any, true: Any, iou: float, iop: float, remark: str) -> None:
    assert [float(measure) for measure in grounding_overlap(predicted, true)] == [float(iou), float(iop)], remark


@given(spans.filter(bool), spans)
def test_grounding_overlap_is_that_of_a_fine_grid(predicted: Any, true: Any) -> None:
    start, end = predicted[0]
    said = cells([(start, end)])
    iou, iop = grounding_overlap((start, end), true)
    if not said:
        assert (iou, iop) == (0, any(s <= start <= e for s, e in true))
        return
    hulls = [(cells([(s, e)]), cells([(min(s, start), max(e, end))])) for s, e in true]
    assert iou == max((Fraction(len(said & truth), len(hull)) for truth, hull in hulls), default=0)
    assert iop == max((Fraction(len(said & truth), len(said)) for truth, _ in hulls), default=0)
