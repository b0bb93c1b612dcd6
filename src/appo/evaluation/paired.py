"""`appo eval --compare A B`: two evaluations of the same questions, question by question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from appo.data import get_benchmark
from appo.evaluation.predictions import EvaluationFolder
from appo.evaluation.scoreboard import Sheet
from appo.evaluation.scorecard import pair, percent
from appo.evaluation.scores import Answered, Difference, score_differences
from appo.reports.jsonl import RecordError
from appo.types import VideoQA

_NAMED = 3


def compare(first: Path, second: Path) -> Sheet:
    """How much better the second model answers than the first, both scored afresh, with paired intervals.

    Raises:
        RecordError: a folder is none of an evaluation, is not finished, or the two are about different questions.
    """
    folders = [EvaluationFolder.open(path) for path in (first, second)]
    datasets = [folder.settings["dataset"] for folder in folders]
    if datasets[0] != datasets[1]:
        raise RecordError(f"{first} is about {datasets[0]}, {second} about {datasets[1]}: compare the same questions")
    asked = [folder.questions() for folder in folders]
    _refuse_others(first, second, *asked)
    old, new = (_answered(folder, questions) for folder, questions in zip(folders, asked, strict=True))
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


def _refuse_others(first: Path, second: Path, old: Sequence[VideoQA], new: Sequence[VideoQA]) -> None:
    """The same questions with the same options and gold answers; where the videos lie does not matter."""
    by_id = {question.id: question for question in new}
    known = {question.id for question in old}
    only_first = [question.id for question in old if question.id not in by_id]
    only_second = [question.id for question in new if question.id not in known]
    for path, lonely in ((first, only_first), (second, only_second)):
        if lonely:
            some = ", ".join(map(repr, lonely[:_NAMED])) + (" ..." if len(lonely) > _NAMED else "")
            count = f"{len(lonely)} questions are in {path} alone ({some})"
            raise RecordError(f"{count}: evaluate both models on the same questions")
    for question in old:
        other = _without_paths(by_id[question.id])
        for name, value in _without_paths(question).items():
            if value != other[name]:
                raise RecordError(f"question {question.id!r} has another `{name}` in {first} than in {second}")


def _without_paths(question: VideoQA) -> dict[str, Any]:
    """All of a question but where its files lie."""
    return vars(question) | {"video": question.video and replace(question.video, path=""), "image": ""}


def _answered(folder: EvaluationFolder, questions: Sequence[VideoQA]) -> list[Answered]:
    replies = folder.replies(questions)
    if left := sum(reply is None for reply in replies):
        fix = "run its command again to finish it"
        raise RecordError(f"{folder.path}: {left} of {len(replies)} questions are not answered yet; {fix}")
    return pair(questions, replies)


def _row(difference: Difference) -> list[str]:
    change = difference.second - difference.first
    return [
        difference.name,
        str(difference.questions),
        percent(difference.first),
        percent(difference.second),
        f"{100 * change:+.1f}",
        f"{100 * difference.low:+.1f} to {100 * difference.high:+.1f}",
        "-" if difference.p_value is None else f"{difference.p_value:.3g}",
    ]


def _won_and_lost(dataset: str, old: Sequence[Answered], new: Sequence[Answered]) -> str:
    """On how many questions the second model's responses count more, and less, in the headline."""
    later = {one.question.id: _mean(dataset, one) for one in new}
    changes = [later[one.question.id] - _mean(dataset, one) for one in old]
    won, lost = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    return f"{won} questions won, {lost} lost, {len(changes) - won - lost} equal, from first to second"


def _mean(dataset: str, one: Answered) -> float:
    scores = [get_benchmark(dataset).score(one.question, text) for text in one.texts]
    return sum(scores) / max(1, len(scores))
