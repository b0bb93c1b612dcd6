"""What an evaluation prints: progress, the table of one evaluation's scores, and that of two compared in pairs.

Scored are the texts on disk, so a later parser can score an evaluation again without a model.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from appo.data import get_benchmark
from appo.evaluation.predictions import EvaluationFolder, Reply
from appo.evaluation.scores import (
    Answered,
    Difference,
    Score,
    official_scores,
    score_differences,
    unparsable_share,
)
from appo.reports.jsonl import RecordError
from appo.rewards.templates import PARSER_VERSION
from appo.types import VideoQA

LINES = 10  # of progress where there is no terminal
MAX_NAMED = 3
SCORED_SETTINGS = (
    "model", "dataset", "split", "limit", "questions", "questions_digest", "samples", "temperature", "seed",
)  # fmt: skip


# --- tables and progress ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sheet:
    """A table: title, rows of cells, remarks below. The first column holds names, all others figures."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    remarks: Sequence[str] = field(default_factory=list)

    def markdown(self) -> str:
        """As Markdown, to be pasted."""
        lines = markdown_table(self.columns, self.rows)
        return "\n".join([f"**{self.title}**", "", *lines, "", *(f"- {remark}" for remark in self.remarks)]) + "\n"

    def print(self, console: Console) -> None:
        """As a table in a terminal, as Markdown in a log, which would break a table at 80 columns."""
        if not console.is_terminal:
            console.print(self.markdown(), markup=False, highlight=False, soft_wrap=True, end="")
            return
        table = Table(title=Text(self.title))
        for index, name in enumerate(self.columns):
            table.add_column(Text(name), justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*map(Text, row))
        console.print(table)
        for remark in self.remarks:
            console.print(remark, markup=False, highlight=False)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table; the first column to the left, all others to the right."""
    cells = (head, ["---", *["---:"] * (len(head) - 1)], *rows)
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]


@contextmanager
def answer_progress(
    console: Console, total: int, done: int = 0, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[int], None]]:
    """A bar with questions a second and the time left; ten plain lines without a terminal.

    Yields a function that takes how many questions are answered, those of earlier runs included.
    """
    start, before, tenth = clock(), done, LINES * done // max(1, total)
    columns = TextColumn("answering"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[speed]}")
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("answering", total=total, completed=done, speed="")

        def update(done: int) -> None:
            nonlocal tenth
            rate = (done - before) / max(1e-9, clock() - start)
            speed = f"{rate:.2f} questions/s, {duration((total - done) / rate if rate else 0.0)} left"
            bar.update(task, completed=done, speed=speed)
            if not console.is_terminal and LINES * done // total > tenth:
                console.print(f"answered {done} of {total}: {speed}", highlight=False)
            tenth = LINES * done // total

        yield update


def duration(seconds: float) -> str:
    """``12 s``, ``3 min`` or ``2.1 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _percent(share: float | None) -> str:
    """A share in per cent without the sign: ``52.3``; ``-`` for None."""
    return "-" if share is None else f"{100 * share:.1f}"


# --- one evaluation --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScoreCard:
    """The official scores of an evaluation, and what they rest on."""

    settings: dict[str, Any]  # of the evaluation (``eval.json``)
    strict: list[Score]  # of responses exactly in the requested format
    lenient: list[Score]  # the same scores, by `appo.rewards.answer_parsing.lenient_answer`
    unparsable: float  # share of responses that are not in the format
    tokens: float | None  # mean tokens of a response; None without responses
    seconds: float | None  # mean seconds a question took; None if nothing was timed
    missing: int  # questions without a prediction, which count as wrong
    parser_version: int  # of :mod:`appo.rewards.templates`

    def to_json(self) -> str:
        """scores.json: the same answers give the same bytes, so it holds no time."""
        data = {
            **{name: self.settings[name] for name in SCORED_SETTINGS},
            "missing": self.missing,
            "unparsable": self.unparsable,
            "tokens": self.tokens,
            "prompt_version": self.settings["prompt_version"],
            "parser_version": self.parser_version,
            "strict": [asdict(score) for score in self.strict],
            "lenient": [asdict(score) for score in self.lenient],
        }
        return json.dumps(data, indent=1) + "\n"

    def sheet(self) -> Sheet:
        """The table, in per cent."""
        columns = ["figure", "n", "strict", "95 % interval", "lenient"]
        skipping = any(score.answered_only is not None for score in self.strict)
        columns += ["strict, answered only"] if skipping else []
        rows = []
        for strict, lenient in zip(self.strict, self.lenient, strict=True):
            low_high = f"{_percent(strict.low)}-{_percent(strict.high)}{' b' if strict.interval == 'bootstrap' else ''}"
            row = [strict.name, str(strict.questions), _percent(strict.value), low_high, _percent(lenient.value)]
            rows.append([*row, *([_percent(strict.answered_only)] if skipping else [])])
        settings = self.settings
        part = f" {settings['split']}" if settings["split"] else ""
        return Sheet(f"{settings['model']} on {settings['dataset']}{part}", columns, rows, self._remarks())

    def _remarks(self) -> list[str]:
        settings = self.settings
        samples = settings["samples"]
        how = f"{samples} samples at temperature {settings['temperature']:g}" if settings["temperature"] else "greedy"
        remarks = [f"{settings['questions']} questions, {how}; scores in %, b: bootstrap, else Wilson interval"]
        if self.missing:
            of = f"{self.missing} of {settings['questions']} questions"
            remarks.append(f"{of} have no prediction and count as wrong; answered only: without them")
        cost = [f"{_percent(self.unparsable)} % of responses unparsable"]
        cost += [] if self.tokens is None else [f"{self.tokens:.1f} tokens a response"]
        cost += [] if self.seconds is None else [f"{self.seconds:.2f} s a question"]
        versions = f"prompt version {settings['prompt_version']}, parser version {self.parser_version}"
        return [*remarks, ", ".join(cost), versions]


def score(folder: EvaluationFolder) -> ScoreCard:
    """Score the predictions of an evaluation; questions not answered yet count as missing.

    Raises:
        RecordError: the folder is damaged.
    """
    settings, questions = folder.settings, folder.questions()
    replies = folder.replies(questions)
    answered = _answered(questions, replies)
    lengths = [length for reply in replies if reply is not None for length in reply.tokens]
    seconds, timed = folder.seconds()
    return ScoreCard(
        settings=settings,
        strict=official_scores(settings["dataset"], answered),
        lenient=official_scores(settings["dataset"], answered, lenient=True),
        unparsable=unparsable_share(settings["dataset"], answered),
        tokens=sum(lengths) / len(lengths) if lengths else None,
        seconds=seconds / timed if timed else None,
        missing=sum(not one.texts for one in answered),
        parser_version=PARSER_VERSION,
    )


def _answered(questions: Sequence[VideoQA], replies: Sequence[Reply | None]) -> list[Answered]:
    pairs = zip(questions, replies, strict=True)
    return [Answered(question, () if reply is None else reply.texts) for question, reply in pairs]


# --- two evaluations, question by question ---------------------------------------------------------------------------


def compare(first: Path, second: Path) -> Sheet:
    """How much better the second model answers than the first, with paired intervals; both are scored afresh.

    Raises:
        RecordError: a folder is none of an evaluation, is not finished, or the two are about different questions.
    """
    folders = [EvaluationFolder.open(path) for path in (first, second)]
    datasets = [folder.settings["dataset"] for folder in folders]
    if datasets[0] != datasets[1]:
        raise RecordError(f"{first} is about {datasets[0]}, {second} about {datasets[1]}: compare the same questions")
    questions = [folder.questions() for folder in folders]
    _check_same_questions(first, second, *questions)
    old, new = (_finished(folder, own) for folder, own in zip(folders, questions, strict=True))
    names = [f"{folder.settings['model']} ({folder.path})" for folder in folders]
    columns = ["figure", "n", "first", "second", "difference", "95 % interval", "McNemar's p"]
    rows = [_row(difference) for difference in score_differences(datasets[0], old, new)]
    remarks = [
        f"first: {names[0]}",
        f"second: {names[1]}",
        _won_and_lost(datasets[0], old, new),
        "scores and differences in %; paired bootstrap; exact p where each question is right or wrong, - elsewhere",
    ]
    return Sheet(f"{datasets[0]}: second against first", columns, rows, remarks)


def _check_same_questions(first: Path, second: Path, old: Sequence[VideoQA], new: Sequence[VideoQA]) -> None:
    """The same questions with the same options and gold answers; the videos may lie elsewhere."""
    olds, news = ({question.id: question for question in questions} for questions in (old, new))
    for path, own, other in ((first, olds, news), (second, news, olds)):
        if lonely := [name for name in own if name not in other]:
            some = ", ".join(map(repr, lonely[:MAX_NAMED])) + (" ..." if len(lonely) > MAX_NAMED else "")
            count = f"{len(lonely)} questions are in {path} alone ({some})"
            raise RecordError(f"{count}: evaluate both models on the same questions")
    for question in old:
        other_fields = _without_paths(news[question.id])
        for name, value in _without_paths(question).items():
            if value != other_fields[name]:
                raise RecordError(f"question {question.id!r} has another `{name}` in {first} than in {second}")


def _without_paths(question: VideoQA) -> dict[str, Any]:
    return vars(question) | {"video": question.video and replace(question.video, path=""), "image": ""}


def _finished(folder: EvaluationFolder, questions: Sequence[VideoQA]) -> list[Answered]:
    replies = folder.replies(questions)
    if left := sum(reply is None for reply in replies):
        fix = "run its command again to finish it"
        raise RecordError(f"{folder.path}: {left} of {len(replies)} questions are not answered yet; {fix}")
    return _answered(questions, replies)


def _row(difference: Difference) -> list[str]:
    return [
        difference.name,
        str(difference.questions),
        _percent(difference.first),
        _percent(difference.second),
        f"{100 * (difference.second - difference.first):+.1f}",
        f"{100 * difference.low:+.1f} to {100 * difference.high:+.1f}",
        "-" if difference.p_value is None else f"{difference.p_value:.3g}",
    ]


def _won_and_lost(dataset: str, old: Sequence[Answered], new: Sequence[Answered]) -> str:
    """On how many questions the second model's responses count more, and less, in the headline."""
    later = {one.question.id: _mean_score(dataset, one) for one in new}
    changes = [later[one.question.id] - _mean_score(dataset, one) for one in old]
    won, lost = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    return f"{won} questions won, {lost} lost, {len(changes) - won - lost} equal, from first to second"


def _mean_score(dataset: str, one: Answered) -> float:
    scores = [get_benchmark(dataset).score(one.question, text) for text in one.texts]
    return sum(scores) / max(1, len(scores))
