"""The folder of a study, and the answers of its reasoners: every description of the grid is answered once.

It is the folder of an evaluation, with descriptions and answers instead of predictions:

    eval.json, questions.jsonl, clips/   as in an evaluation (`appo.evaluation.predictions`)
    members.json                         the members' names and identities; more may join later
    descriptions/PERCEIVER.jsonl         a line per question: its description, or why there is none
    answers/PERCEIVER__REASONER.jsonl    a line per question: the answer to that description

Lines are appended as they come and read back by question; a later line replaces an earlier one. A finished file is
sorted by question, so that it is the same however often the study was interrupted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appo.evaluation.predictions import EvaluationFolder, batches
from appo.experiments.study.reasoners import ChatAnswer, Endpoint, TextModel
from appo.experiments.study.settings import Perceiver, Reasoner
from appo.experiments.study.words import REASONING_VERSION, reasoning_prompt, rule_answer
from appo.reports.jsonl import RecordError, append_line, damaged, read_lines
from appo.types import VideoQA

# --- the folder ------------------------------------------------------------------------------------------------------


MEMBERS, DESCRIPTIONS, ANSWERS = "members.json", "descriptions", "answers"
Line = dict[str, Any]


class StudyFolder(EvaluationFolder):
    """A study on disk; get one by `start`."""

    def add_members(self, members: Mapping[str, Mapping[str, Any]]) -> None:
        """Write `member_identities` to members.json.

        Raises:
            RecordError: a member of that name had another identity.
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
        """The file of a perceiver's descriptions."""
        return self.path / DESCRIPTIONS / f"{perceiver}.jsonl"

    def answers(self, perceiver: str, reasoner: str) -> Path:
        """The file of a reasoner's answers to a perceiver's descriptions."""
        return self.path / ANSWERS / f"{perceiver}__{reasoner}.jsonl"

    def sort_lines(self, file: Path, questions: Sequence[VideoQA]) -> None:
        """Sort a file by question, one line each. Raises RecordError."""
        lines = latest_lines(file)
        ordered = [lines[question.id] for question in questions if question.id in lines]
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in ordered)
        if file.exists() and file.read_bytes() != text.encode():
            self.write(file.relative_to(self.path).as_posix(), text)


def latest_lines(file: Path) -> dict[str, Line]:
    """The last line about each question; a torn last one is left out. Raises RecordError."""
    lines: dict[str, Line] = {}
    for number, line in read_lines(file):
        if not isinstance(line.get("id"), str) or not isinstance(line.get("text", line.get("error")), str):
            raise damaged(file, number, "no line of a study")
        lines[line["id"]] = line
    return lines


def _answer_key(version: int, reasoner: Mapping[str, Any], prompt: str) -> str:
    """Identifies an answer: by the version, the reasoner, and the prompt, which holds description and question."""
    text = json.dumps([version, reasoner, prompt], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- answers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One question with one description for one reasoner."""

    id: str  # of the question
    key: str  # identifies the answer
    question: str
    description: str
    prompt: str


Answer = Callable[[Sequence[Task]], list[ChatAnswer]]  # to a batch


@dataclass(frozen=True)
class Cell:
    """One reasoner's tasks from one perceiver's descriptions, in the order of the questions."""

    file: Path  # of the answers
    tasks: list[Task]

    def answers(self, lines: Mapping[str, Line] | None = None) -> dict[str, Line]:
        """The lines by question that answer a task; those to other descriptions, and failures, are left out."""
        lines = latest_lines(self.file) if lines is None else lines
        pairs = ((task, lines.get(task.id, {})) for task in self.tasks)
        return {task.id: line for task, line in pairs if line.get("key") == task.key and "text" in line}


def cell_of(
    folder: StudyFolder,
    perceiver: Perceiver,
    reasoner: Reasoner,
    identity: Mapping[str, Any],
    questions: Sequence[VideoQA],
) -> Cell:
    """A cell of the grid: a task for each question that has a description; `identity`: of the reasoner."""
    lines = latest_lines(folder.descriptions(perceiver.name))
    tasks = []
    for question in questions:
        if "text" in (line := lines.get(question.id, {})):
            prompt = reasoning_prompt(question, line["text"])
            key = _answer_key(REASONING_VERSION, identity, prompt)
            tasks.append(Task(question.id, key, question.question, line["text"], prompt))
    return Cell(folder.answers(perceiver.name, reasoner.name), tasks)


def by_model(model: TextModel) -> Answer:
    """Answers tasks by a text model."""
    return lambda tasks: model([task.prompt for task in tasks])


def by_rules(known: Sequence[str]) -> Answer:
    """Answers tasks by rules that know some tasks of the embedded world."""

    def answer(tasks: Sequence[Task]) -> list[ChatAnswer]:
        words = [rule_answer(task.question, task.description, known) for task in tasks]
        return [ChatAnswer(f"<answer>{word}</answer>") for word in words]

    return answer


def answer_locally(cell: Cell, answer: Answer, batch_size: int, on_progress: Callable[[int], None]) -> None:
    """Answer a cell in this process, in batches fixed by position; one with anything missing is repeated as a whole.

    `on_progress` is called after each batch with the number of answers.
    """
    known = set(cell.answers())
    for _, batch in batches(cell.tasks, batch_size):
        missing = [task.id not in known for task in batch]
        if not any(missing):
            continue
        for task, one, is_missing in zip(batch, answer(batch), missing, strict=True):
            if is_missing:
                append_line(cell.file, _line(task, one))
                known.add(task.id)
        on_progress(len(known))


def column(cells: Mapping[tuple[str, str], Cell], reasoner: str) -> list[Cell]:
    """One reasoner's cells, of those by names of perceiver and reasoner."""
    return [cell for (_, name), cell in cells.items() if name == reasoner]


def costs(endpoint: Endpoint, cells: Sequence[Cell]) -> dict[str, Any]:
    """Tokens and dollars (None: prices unknown) of an endpoint's answers; equal prompts are paid once."""
    prompts = {task.key: task.prompt for cell in cells for task in cell.tasks}
    paid = {line["key"]: line["tokens"] for cell in cells for line in cell.answers().values()}
    known = [tokens for tokens in paid.values() if tokens is not None]
    dollars = sum(endpoint.cost(tokens, prompts[key]) for key, tokens in paid.items())
    return {
        "answers": len(paid),
        "read": sum(read for read, _ in known),
        "written": sum(written for _, written in known),
        "unknown": len(paid) - len(known),
        "dollars": None if endpoint.calling.prices is None else dollars,
    }


def answer_by_endpoint(endpoint: Endpoint, cells: Sequence[Cell], on_progress: Callable[[int], None]) -> None:
    """Answer a reasoner's cells through its endpoint: each prompt once, however many cells have it.

    `on_progress` is called with the number of tasks answered by this call.

    Raises:
        BudgetError, ValueError: as :meth:`Endpoint.ask`; the answers so far are written.
    """
    wanted: dict[str, list[tuple[Path, Task]]] = {}
    answered: dict[str, Line] = {}
    for cell in cells:
        known = cell.answers()
        answered |= {line["key"]: line for line in known.values()}
        for task in cell.tasks:
            if task.id not in known:
                wanted.setdefault(task.key, []).append((cell.file, task))
    done = 0
    for key in [key for key in wanted if key in answered]:  # another perceiver's description was the same
        for file, task in wanted.pop(key):
            append_line(file, {**answered[key], "id": task.id})
            done += 1

    def write(key: str, answer: ChatAnswer | str) -> None:
        nonlocal done
        for file, task in wanted[key]:
            append_line(file, _line(task, answer))
        done += len(wanted[key])
        on_progress(done)

    endpoint.ask([(key, places[0][1].prompt) for key, places in wanted.items()], write)


def _line(task: Task, answer: ChatAnswer | str) -> Line:
    if isinstance(answer, str):
        return {"id": task.id, "key": task.key, "error": answer}
    return {"id": task.id, "key": task.key, "text": answer.text, "tokens": answer.tokens}
