"""What is measured in each dataset: a response is marked once, and every figure averages a measure of the marks.

All that differs between datasets is in `BENCHMARKS`. How right an answer is says the function that also rewards
training (`comparison`). Where a rule differs from an official script on purpose, docs/evaluation.md says
so.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from appo.rewards.answer_parsing import lenient_answer, strict_answer
from appo.rewards.functions import comparison
from appo.rewards.scorers import parse_number
from appo.rewards.templates import ParsedResponse, answer_letter, normalize_words, parse_spans
from appo.rewards.temporal_iou import grounding_overlap

if TYPE_CHECKING:
    from appo.types import VideoQA

GRADED = ("ocr", "text", "regression", "mra")  # kinds whose score may lie between 0 and 1
VSI_TASKS = (
    "object_counting", "object_abs_distance", "object_size_estimation", "room_size_estimation",
    "object_rel_distance", "object_rel_direction", "route_planning", "obj_appearance_order",
)  # fmt: skip


@dataclass(frozen=True)
class Mark:
    """One response, marked.

    Attributes:
        vote: what it says, equal for responses that say the same; None where nothing is read.
        right: how right its answer is, 0 to 1.
        overlap: IoU and IoP of its time with the true spans; None where no time is read or none was asked for.
    """

    vote: Hashable | None = None
    right: float = 0.0
    overlap: tuple[Fraction, Fraction] | None = None


@dataclass(frozen=True)
class Measure:
    """What is averaged: a value of each mark, None where there is nothing that an official script would count."""

    name: str
    of: Callable[[Mark], float | None] = lambda mark: mark.right
    graded: bool = False


def _grounding(name: str, of: Callable[[Fraction, Fraction, float], float], *, graded: bool = False) -> Measure:
    """A measure of (IoU, IoP, how right the answer is) that skips a response without a time."""
    return Measure(name, lambda mark: of(*mark.overlap, mark.right) if mark.overlap else None, graded)


GROUNDING = (
    _grounding("mIoU", lambda iou, iop, right: float(iou), graded=True),
    _grounding("mIoP", lambda iou, iop, right: float(iop), graded=True),
    _grounding("IoU@0.3", lambda iou, iop, right: float(iou >= Fraction(3, 10))),
    _grounding("IoU@0.5", lambda iou, iop, right: float(iou >= Fraction(1, 2))),
    _grounding("IoP@0.3", lambda iou, iop, right: float(iop >= Fraction(3, 10))),
    _grounding("IoP@0.5", lambda iou, iop, right: float(iop >= Fraction(1, 2))),
    Measure("Acc@QA"),
    _grounding("Acc@GQA", lambda iou, iop, right: right * (iop >= Fraction(1, 2))),
)


@dataclass(frozen=True)
class Benchmark:
    """How a dataset is scored.

    Attributes:
        measures: what is averaged over all questions; the first is the headline.
        parts: the sub-scores that a question counts in, each the headline's measure over its questions.
        order: in which sub-scores are shown; others follow by name.
        path: for means of means: groups, from the outermost to the innermost, that a question is in.
        response_format: what the prompt asks for, one of :data:`appo.rewards.templates.FORMATS`.
    """

    measures: tuple[Measure, ...] = (Measure("accuracy"),)
    parts: Callable[[VideoQA], Sequence[str]] = lambda question: ()
    order: tuple[str, ...] = ()
    path: Callable[[VideoQA], tuple[str, ...]] = lambda question: ()
    response_format: str = "answer"


def _said_in(*names: str) -> Callable[[VideoQA], list[str]]:
    """What the metadata say under these names, where they do; with several names as ``name/what``."""

    def parts(question: VideoQA) -> list[str]:
        there = [(name, question.metadata[name]) for name in names if question.metadata.get(name) is not None]
        return [f"{name}/{said}" if len(names) > 1 else str(said) for name, said in there]

    return parts


def _next_qa_parts(question: VideoQA) -> list[str]:
    """Group, type, and for TP also TN, which it counts as."""
    kind = str(question.metadata["type"])
    return [kind[0], kind, *(["TN"] if kind == "TP" else [])]


def _vsi_path(question: VideoQA) -> tuple[str, str]:
    """Task and question type: only object_rel_direction has several types, its levels."""
    return str(question.metadata["task"]), str(question.metadata["question_type"])


BENCHMARKS: dict[str, Benchmark] = {
    "seed-bench-r1": Benchmark(parts=_said_in("split")),
    "video-r1": Benchmark((Measure("score"),), _said_in("problem_type")),
    "nextqa": Benchmark(parts=_next_qa_parts, order=("C", "T", "D", "CW", "CH", "TN", "TC", "TP", "DC", "DL", "DO")),
    "nextgqa": Benchmark(GROUNDING, response_format="grounded"),
    "perception-test": Benchmark(parts=_said_in("area", "reasoning")),
    "vsi-bench": Benchmark((Measure("score"),), _said_in("task"), VSI_TASKS, _vsi_path),
    "mvbench": Benchmark(parts=_said_in("task")),
    "spotlight": Benchmark(parts=_said_in("level")),
    "jsonl": Benchmark((Measure("score"),), lambda question: [f"kind/{question.kind}"]),
}


def benchmark(dataset: str) -> Benchmark:
    """How a dataset is scored.

    Raises:
        ValueError: there is no such dataset.
    """
    if dataset not in BENCHMARKS:
        raise ValueError(f"unknown dataset {dataset!r}; there are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[dataset]


def marker(question: VideoQA, response_format: str, lenient: bool) -> Callable[[str], Mark]:
    """What marks the responses to a question: strictly in the format asked for, or as a forgiving reader would.

    Raises:
        ValueError: the gold answer cannot be scored; names the question.
    """
    try:
        compare = comparison(question.answer, question.kind, question.options)
    except ValueError as error:
        raise ValueError(f"question {question.id!r}: {error}") from None

    def mark(text: str) -> Mark:
        parsed = lenient_answer(text, question) if lenient else strict_answer(text, response_format)
        if parsed is None:
            return Mark()
        return Mark(_vote(parsed.answer, question), compare(parsed.answer), _overlap(parsed, question))

    return mark


def _vote(answer: str, question: VideoQA) -> Hashable | None:
    """What an answer says, equal for answers that say the same."""
    if question.kind == "letter":
        return answer_letter(answer, question.options)
    if question.kind in ("number", "regression", "mra"):
        number = parse_number(answer)
        return number and number.value
    return normalize_words(answer) or None


def _overlap(parsed: ParsedResponse, question: VideoQA) -> tuple[Fraction, Fraction] | None:
    """IoU and IoP of the time that a response names. Of several spans, ours: from the first start to the last end."""
    spans = parse_spans(parsed.time)
    if not spans or not question.spans:
        return None
    return grounding_overlap((min(start for start, _ in spans), max(end for _, end in spans)), question.spans)
