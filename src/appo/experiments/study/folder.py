"""The folder of a study: that of an evaluation, with what perceivers and reasoners said instead of predictions.

    eval.json, questions.jsonl, clips/   as in an evaluation (`appo.evaluation.predictions`)
    members.json                         who takes part and what they are; more may join later
    descriptions/PERCEIVER.jsonl         a line a question: what it is told of the video, or why there is nothing
    answers/PERCEIVER__REASONER.jsonl    a line a question: what the reasoner said to that description

Lines are appended as they come and read back by question; a later line replaces an earlier one. A finished file is put
into the order of the questions, so that it is the same however often the study was interrupted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from appo.evaluation.predictions import EvaluationFolder
from appo.reports.jsonl import RecordError, append_line, damaged, read_lines
from appo.types import VideoQA

MEMBERS, DESCRIPTIONS, ANSWERS = "members.json", "descriptions", "answers"
Line = dict[str, Any]


class StudyFolder(EvaluationFolder):
    """A study on disk; get one by `start`."""

    def admit(self, members: Mapping[str, Mapping[str, Any]]) -> None:
        """Write down who takes part.

        Args:
            members: ``perceiver NAME`` or ``reasoner NAME`` -> all that decides what it says.

        Raises:
            RecordError: one of that name was somebody else.
        """
        file = self.path / MEMBERS
        try:
            there = json.loads(file.read_bytes()) if file.exists() else {}
        except (OSError, ValueError) as error:
            raise RecordError(f"{file}: cannot be read ({error}); restore it, or choose another --output") from error
        for name, what in members.items():
            if others := [key for key in what if name in there and there[name].get(key) != what[key]]:
                was = {key: there[name].get(key) for key in others}
                now = {key: what[key] for key in others}
                raise RecordError(f"{self.path}: {name} was {was} and is {now}; give it another name, or --output")
        if {**there, **members} != there:
            self.write(MEMBERS, json.dumps({**there, **members}, indent=2) + "\n")
        for part in (DESCRIPTIONS, ANSWERS):
            (self.path / part).mkdir(exist_ok=True)

    def descriptions(self, perceiver: str) -> Path:
        """The file of what a perceiver said."""
        return self.path / DESCRIPTIONS / f"{perceiver}.jsonl"

    def answers(self, perceiver: str, reasoner: str) -> Path:
        """The file of what a reasoner said to a perceiver's descriptions."""
        return self.path / ANSWERS / f"{perceiver}__{reasoner}.jsonl"

    def settle(self, file: Path, questions: Sequence[VideoQA]) -> None:
        """Put a file into the order of the questions, one line each. Raises RecordError."""
        lines = said(file)
        ordered = [lines[question.id] for question in questions if question.id in lines]
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in ordered)
        if file.exists() and file.read_bytes() != text.encode():
            self.write(file.relative_to(self.path).as_posix(), text)


def said(file: Path) -> dict[str, Line]:
    """The last line about each question; a torn last one is left out. Raises RecordError."""
    lines: dict[str, Line] = {}
    for number, line in read_lines(file):
        if not isinstance(line.get("id"), str) or not isinstance(line.get("text", line.get("error")), str):
            raise damaged(file, number, "no line of a study")
        lines[line["id"]] = line
    return lines


def write_down(file: Path, lines: Iterable[Line]) -> None:
    """Append lines. Raises RecordError."""
    for line in lines:
        append_line(file, line)


def answer_key(version: int, reasoner: Mapping[str, Any], prompt: str) -> str:
    """What an answer is known by: the prompt, which holds description and question, who answers, and the version."""
    text = json.dumps([version, reasoner, prompt], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
