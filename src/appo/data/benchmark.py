"""The base class of benchmarks: annotation files -> questions, responses -> official scores.

A benchmark is one subclass in one file; docs/data.md («Adding a benchmark») shows one. A response is marked once
(`Mark`), and every figure averages a `Measure` of the marks. Scores and training rewards use the same function,
:func:`appo.rewards.functions.comparison`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from appo.data.files import file_in, rows_of_file
from appo.data.row import LETTERS, NO_OPTION, UNREADABLE, Row, RowError
from appo.rewards.answer_parsing import lenient_answer, strict_answer
from appo.rewards.functions import comparison
from appo.rewards.scorers import parse_number
from appo.rewards.templates import ParsedResponse, answer_letter, normalize_words, parse_spans
from appo.rewards.temporal_iou import grounding_overlap
from appo.types import VideoQA


@dataclass(frozen=True)
class Mark:
    """The mark of one response.

    Attributes:
        overlap: IoU and IoP of its time with the true spans; None where there is no time, or no true span.
    """

    vote: Hashable | None = None  # its answer in canonical form, for majority votes; None where there is none
    right: float = 0.0  # how right its answer is, 0 to 1
    overlap: tuple[Fraction, Fraction] | None = None


@dataclass(frozen=True)
class Measure:
    """A value of each mark, to be averaged.

    Attributes:
        of: the value of a mark, 0 to 1; None where an official script would not count the response.
    """

    name: str  # of the figure
    of: Callable[[Mark], float | None] = lambda mark: mark.right
    graded: bool = False  # whether it may lie between 0 and 1 where the answer is right or wrong


class Benchmark(ABC):
    """One benchmark. A subclass sets `name`, writes `question`, and overrides what differs.

    Attributes:
        name: in ``--dataset`` and :func:`appo.data.load`.
        splits: empty: it has none.
        file_name: of the annotations in their folder; ``{split}`` stands for the split.
        kinds: of its answers, from :data:`appo.rewards.scorers.KINDS`: how they are rewarded and scored.
        response_format: that its prompts request, one of :data:`appo.rewards.templates.FORMATS`.
        measures: averaged over all questions; the first is the headline.
        part_fields: fields of the metadata; each of their values has a headline too, called ``field/value`` where
            there are several fields.
        part_order: order of such figures; others follow by name.
    """

    name: ClassVar[str]
    splits: ClassVar[tuple[str, ...]] = ()
    file_name: ClassVar[str] = "annotations.jsonl"
    kinds: ClassVar[tuple[str, ...]] = ("letter",)
    response_format: ClassVar[str] = "answer"
    measures: ClassVar[tuple[Measure, ...]] = (Measure("accuracy"),)
    part_fields: ClassVar[tuple[str, ...]] = ()
    part_order: ClassVar[tuple[str, ...]] = ()

    def rows(self, annotations: str, split: str | None) -> Iterator[Row]:
        """The rows of the annotation file, in order; one that cannot be read carries its fault.

        Args:
            annotations: the file, or the folder that holds it; may be a URL.
            split: one of `splits`, or None: all rows.

        Raises:
            OSError: there is no such file.
            ValueError: a whole file is not of its format, or as `annotation_file`.
        """
        return rows_of_file(self.annotation_file(annotations, split))

    def annotation_file(self, annotations: str, split: str | None) -> str:
        """The annotation file: itself, or the one called `file_name` in the folder.

        Raises:
            ValueError: it is a folder, and no split says which file.
        """
        path = file_in(annotations, self.file_name.format(split=split))
        if path != annotations and split is None and "{split}" in self.file_name:
            splits = ", ".join(self.splits)
            raise ValueError(f"{annotations} is a folder: name the split ({splits}), or give the file itself")
        return path

    @abstractmethod
    def question(self, row: Row, videos: str, split: str | None) -> VideoQA:
        """The question of a row without fault.

        Args:
            row: one of `rows`.
            videos: the folder that paths of videos and images start from.
            split: as in `rows`.

        Raises:
            RowError: the row is not of the schema; its getters raise this.
        """

    def parts(self, question: VideoQA) -> Sequence[str]:
        """The sub-scores that a question counts in: the headline's measure over their questions."""
        values = [(name, question.metadata.get(name)) for name in self.part_fields]
        prefixed = len(self.part_fields) > 1
        return [f"{name}/{value}" if prefixed else str(value) for name, value in values if value is not None]

    def path(self, question: VideoQA) -> tuple[str, ...]:
        """For means of means: the groups of a question, from the outermost to the innermost."""
        return ()

    def answer_fault(self, row: Row, question: VideoQA) -> RowError | None:
        """Why no answer to a row's question can be rewarded and scored, or None."""
        if len(question.options) > len(LETTERS):
            return row.error(f"{len(question.options)} options cannot be lettered", f"give at most {len(LETTERS)}")
        if question.kind not in self.kinds:
            problem = f"`kind` is {question.kind!r}: it must be one of {', '.join(self.kinds)}"
            return row.error(problem, "correct the row")
        try:
            comparison(question.answer, question.kind, question.options)
        except ValueError as error:
            return row.error(str(error), "correct the row", NO_OPTION if question.options else UNREADABLE)
        return None

    def marker(self, question: VideoQA, *, lenient: bool = False) -> Callable[[str], Mark]:
        """The function that marks responses to a question, by strict or by `lenient` parsing.

        Raises:
            ValueError: the gold answer cannot be scored; names the question.
        """
        try:
            compare = comparison(question.answer, question.kind, question.options)
        except ValueError as error:
            raise ValueError(f"question {question.id!r}: {error}") from None

        def mark(text: str) -> Mark:
            parsed = lenient_answer(text, question) if lenient else strict_answer(text, self.response_format)
            if parsed is None:
                return Mark()
            return Mark(_vote(parsed.answer, question), compare(parsed.answer), _overlap(parsed, question))

        return mark

    def score(self, question: VideoQA, text: str, *, lenient: bool = False) -> float:
        """The headline's value of one response, 0 to 1. Arguments and errors: `marker`."""
        return self.measures[0].of(self.marker(question, lenient=lenient)(text)) or 0.0


def _vote(answer: str, question: VideoQA) -> Hashable | None:
    """An answer in canonical form."""
    if question.kind == "letter":
        return answer_letter(answer, question.options)
    if question.kind in ("number", "regression", "mra"):
        number = parse_number(answer)
        return number and number.value
    return normalize_words(answer) or None


def _overlap(parsed: ParsedResponse, question: VideoQA) -> tuple[Fraction, Fraction] | None:
    """IoU and IoP of a response's time; several spans count as one, from the first start to the last end.

    Source: not in NExT-GQA, whose script takes one span. So naming several never pays.
    """
    spans = parse_spans(parsed.time)
    if not spans or not question.spans:
        return None
    return grounding_overlap((min(start for start, _ in spans), max(end for _, end in spans)), question.spans)
