"""Reasoners at work: every description of the grid is read and answered once, and what was answered stays answered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appo.evaluation.predictions import batches
from appo.experiments.study.endpoints import Endpoint
from appo.experiments.study.folder import Line, StudyFolder, answer_key, said, write_down
from appo.experiments.study.members import Perceiver, Reasoner
from appo.experiments.study.rules import rule_answer
from appo.experiments.study.text_models import ChatAnswer, TextModel
from appo.experiments.study.words import REASONING_VERSION, reasoning_prompt
from appo.types import VideoQA


@dataclass(frozen=True)
class Task:
    """One question put to one reasoner with one description, and what answers it in which file."""

    id: str
    key: str
    question: str
    description: str
    prompt: str


Answer = Callable[[Sequence[Task]], list[ChatAnswer]]  # to a batch


@dataclass(frozen=True)
class Cell:
    """A perceiver's descriptions before one reasoner: what is to be answered, in the order of the questions."""

    file: Path
    tasks: list[Task]

    def known(self) -> dict[str, Line]:
        """The answers there are, by question; those to other descriptions, and failures, left out."""
        return self.among(said(self.file))

    def among(self, lines: Mapping[str, Line]) -> dict[str, Line]:
        """The same of lines that were read already."""
        return {task.id: lines[task.id] for task in self.tasks if answers(lines.get(task.id, {}), task)}


def answers(line: Line, task: Task) -> bool:
    """Whether a line of a file is the answer to a task."""
    return line.get("key") == task.key and "text" in line


def cell_of(
    folder: StudyFolder,
    perceiver: Perceiver,
    reasoner: Reasoner,
    identity: Mapping[str, Any],
    questions: Sequence[VideoQA],
) -> Cell:
    """What one cell of the grid asks: a task for each question that has a description."""
    lines = said(folder.descriptions(perceiver.name))
    tasks = []
    for question in questions:
        if "text" in (line := lines.get(question.id, {})):
            prompt = reasoning_prompt(question, line["text"])
            key = answer_key(REASONING_VERSION, identity, prompt)
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


def answer_here(cell: Cell, answer: Answer, batch_size: int, on_progress: Callable[[int], None]) -> None:
    """Answer a cell in this process, in batches fixed by position; one with anything missing is asked as a whole.

    Args:
        cell: of the grid.
        answer: answers a batch.
        batch_size: tasks of a batch.
        on_progress: called with how many answers there are, after each batch.
    """
    known = set(cell.known())
    for _, batch in batches(cell.tasks, batch_size):
        missing = [task.id not in known for task in batch]
        if not any(missing):
            continue
        found = zip(batch, answer(batch), missing, strict=True)
        lines = [_line(task, one) for task, one, is_missing in found if is_missing]
        write_down(cell.file, lines)
        known.update(line["id"] for line in lines)
        on_progress(len(known))


def column(cells: Mapping[tuple[str, str], Cell], reasoner: str) -> list[Cell]:
    """Of the cells by names of perceiver and reasoner, one reasoner's."""
    return [cell for (_, name), cell in cells.items() if name == reasoner]


def costs(endpoint: Endpoint, cells: Sequence[Cell]) -> dict[str, Any]:
    """Tokens and dollars (None: prices not given) of an endpoint's answers; equal prompts are paid once."""
    prompts = {task.key: task.prompt for cell in cells for task in cell.tasks}
    paid = {line["key"]: line["tokens"] for cell in cells for line in cell.known().values()}
    known = [tokens for tokens in paid.values() if tokens is not None]
    dollars = sum(endpoint.cost(tokens, prompts[key]) for key, tokens in paid.items())
    return {
        "answers": len(paid),
        "read": sum(read for read, _ in known),
        "written": sum(written for _, written in known),
        "unknown": len(paid) - len(known),
        "dollars": None if endpoint.calling.prices is None else dollars,
    }


def answer_there(endpoint: Endpoint, cells: Sequence[Cell], on_progress: Callable[[int], None]) -> None:
    """Answer cells through an endpoint: each prompt once, however many cells it stands in.

    Args:
        endpoint: who answers.
        cells: all of this reasoner's.
        on_progress: called with how many tasks were answered by this call, as they come.

    Raises:
        BudgetError, ValueError: as :meth:`Endpoint.ask`; what was answered is written down.
    """
    wanted: dict[str, list[tuple[Path, Task]]] = {}
    answered: dict[str, Line] = {}
    for cell in cells:
        known = cell.known()
        answered |= {line["key"]: line for line in known.values()}
        for task in cell.tasks:
            if task.id not in known:
                wanted.setdefault(task.key, []).append((cell.file, task))
    done = 0
    for key in [key for key in wanted if key in answered]:  # another perceiver said the same
        for file, task in wanted.pop(key):
            write_down(file, [{**answered[key], "id": task.id}])
            done += 1

    def take(key: str, answer: ChatAnswer | str) -> None:
        nonlocal done
        for file, task in wanted[key]:
            write_down(file, [_line(task, answer)])
        done += len(wanted[key])
        on_progress(done)

    endpoint.ask([(key, places[0][1].prompt) for key, places in wanted.items()], take)


def _line(task: Task, answer: ChatAnswer | str) -> Line:
    if isinstance(answer, str):
        return {"id": task.id, "key": task.key, "error": answer}
    return {"id": task.id, "key": task.key, "text": answer.text, "tokens": answer.tokens}
