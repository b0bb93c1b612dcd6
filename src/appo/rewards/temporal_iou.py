"""Exact arithmetic of time spans: the union of several, intersection over union, and NExT-GQA's two measures.

A span is ``(start, end)`` in seconds. Numbers are taken as written (3.2 is 16/5) and results are fractions: spans that
cover the same time have an IoU of exactly 1, in whatever pieces. A span of a single instant covers nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

Span = tuple[Fraction, Fraction]


def exact_span(span: Any) -> Span:
    """A span as two fractions.

    Raises:
        ValueError: not two numbers, a number that is not finite, or an end before its start.
    """
    if isinstance(span, (str, bytes)) or not isinstance(span, Sequence) or len(span) != 2:
        raise ValueError(f"{span!r} is not a pair of start and end")
    try:
        # str() of a float is the shortest decimal that reads back as it: the number that was written down.
        start, end = (time if isinstance(time, Fraction) else Fraction(str(time)) for time in span)
    except ValueError:
        raise ValueError(f"{span!r} is not a pair of finite numbers of seconds") from None
    if end < start:
        raise ValueError(f"{span!r} ends before it starts")
    return start, end


def union(spans: Sequence[Any]) -> list[Span]:
    """The same time as disjoint spans in order, none empty; spans that touch become one."""
    merged: list[Span] = []
    for start, end in sorted(map(exact_span, spans)):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return [(start, end) for start, end in merged if start < end]


def duration(spans: Sequence[Any]) -> Fraction:
    """Seconds covered by at least one of the spans."""
    return sum((end - start for start, end in union(spans)), Fraction(0))


def temporal_iou(predicted: Sequence[Any], true: Sequence[Any]) -> Fraction:
    """Seconds covered by both over seconds covered by either, each side any number of spans.

    1 exactly where both cover the same time; 0 where either covers none.
    """
    covered, total = duration(predicted) + duration(true), duration([*predicted, *true])
    if not total:
        return Fraction(0)
    return (covered - total) / total  # what both cover is counted twice in `covered` and once in `total`


def grounding_overlap(predicted: Any, true: Sequence[Any]) -> tuple[Fraction, Fraction]:
    """NExT-GQA's two measures of one question: one predicted span against the annotated ones.

    As in its ``eval_ground.py``: against each true span, IoU = overlap / hull and IoP = overlap / predicted, where the
    hull reaches from the earlier start to the later end; of each measure the best over the true spans counts. A
    predicted instant has IoU 0, and IoP 1 if it lies in a true span, ends included.

    Returns:
        ``(IoU, IoP)``; the two bests may come from different true spans.
    """
    start, end = exact_span(predicted)
    best_iou = best_iop = Fraction(0)
    for true_start, true_end in map(exact_span, true):
        if start == end:
            best_iop = max(best_iop, Fraction(true_start <= start <= true_end))
            continue
        overlap = max(Fraction(0), min(end, true_end) - max(start, true_start))
        best_iou = max(best_iou, overlap / (max(end, true_end) - min(start, true_start)))
        best_iop = max(best_iop, overlap / (end - start))
    return best_iou, best_iop
