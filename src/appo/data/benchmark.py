"""What a benchmark is: its annotation files as questions, and responses to them as official scores.

One subclass in one file says what differs from benchmark to benchmark; docs/data.md («Adding a benchmark») shows one.
A response is marked once (`Mark`), and every figure averages a `Measure` of the marks. How right an answer is says
the function that also rewards training (:func:`appo.rewards.functions.comparison`), so score and reward are one.
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
    """What is averaged: a value of each mark, None where there is nothing that an official script would count.

    Attributes:
        name: as the figure is called.
        of: the value of a mark, 0 to 1.
        graded: whether it may lie between 0 and 1 where the answer is right or wrong.
    """

    name: str
    of: Callable[[Mark], float | None] = lambda mark: mark.right
    graded: bool = False


class Benchmark(ABC):
    """One benchmark. A subclass sets `name`, writes `question`, and changes of the rest what differs.

    Attributes:
        name: what ``--dataset`` and :func:`appo.data.load` call it.
        splits: its parts; empty: it has none.
        file_name: of the annotations in their folder; ``{split}`` stands for the split.
        kinds: the kinds of answers that its questions have, of :data:`appo.rewards.scorers.KINDS`: how they are
            rewarded and scored.
        response_format: what its prompts ask for, one of :data:`appo.rewards.templates.FORMATS`.
        measures: what is averaged over all questions; the first is the headline.
        part_fields: fields of the metadata; for each of their values the headline is also given. With several fields
            the figures are called ``field/value``.
        part_order: in which order such figures are shown; others follow by name.
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
            split: one of `splits`, or None: all that there is.

        Raises:
            OSError: there is no such file.
            ValueError: a file is not of its format as a whole, or `annotation_file` says so.
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
        """The question of a row.

        Args:
            row: of `rows`, without fault.
            videos: the folder that paths of videos and images start from.
            split: as in `rows`.

        Raises:
            RowError: the row is not of the schema; its getters raise this by themselves.
        """

    def parts(self, question: VideoQA) -> Sequence[str]:
        """The sub-scores that a question counts in, each the headline's measure over its questions."""
        said = [(name, question.metadata.get(name)) for name in self.part_fields]
        prefixed = len(self.part_fields) > 1
        return [f"{name}/{value}" if prefixed else str(value) for name, value in said if value is not None]

    def path(self, question: VideoQA) -> tuple[str, ...]:
        """For means of means: the groups that a question is in, from the outermost to the innermost."""
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
        """What marks the responses to a question.

        Args:
            question: with its gold answer.
            lenient: read a response as a forgiving reader would, not strictly in the format asked for.

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
        """What one response counts in the headline, 0 to 1. Arguments and errors: `marker`."""
        return self.measures[0].of(self.marker(question, lenient=lenient)(text)) or 0.0


def _vote(answer: str, question: VideoQA) -> Hashable | None:
    """What an answer says, equal for answers that say the same."""
    if question.kind == "letter":
        return answer_letter(answer, question.options)
    if question.kind in ("number", "regression", "mra"):
        number = parse_number(answer)
        return number and number.value
    return normalize_words(answer) or None


def _overlap(parsed: ParsedResponse, question: VideoQA) -> tuple[Fraction, Fraction] | None:
    """IoU and IoP of the time that a response names; of several spans from the first start to the last end.

    Source: not in NExT-GQA, whose script takes one span. So it never pays to name several.
    """
    spans = parse_spans(parsed.time)
    if not spans or not question.spans:
        return None
    return grounding_overlap((min(start for start, _ in spans), max(end for _, end in spans)), question.spans)
