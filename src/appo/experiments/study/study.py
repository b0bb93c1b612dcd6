"""`appo study`: all perceivers describe, all reasoners answer, the grid is scored; goes on with what is there."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from rich.console import Console

from appo.evaluation.tables import answer_progress
from appo.experiments.study.answering import Cell, answer_here, answer_there, by_model, by_rules, cell_of, column, costs
from appo.experiments.study.describing import DescribeSettings, describe
from appo.experiments.study.endpoints import Budget, BudgetError, Endpoint
from appo.experiments.study.folder import StudyFolder, said, write_down
from appo.experiments.study.members import Perceiver, Reasoner
from appo.experiments.study.pages import curves, markdown
from appo.experiments.study.settings import (
    StudySettings,
    calling_of,
    check,
    decisive,
    describe_settings,
    members_of,
    questions_to_ask,
)
from appo.experiments.study.summary import summary_of
from appo.experiments.study.text_models import TextModel
from appo.reports.records import as_json
from appo.types import VideoQA

DIGITS = 6
NAMED_GAPS = 5


def study(settings: StudySettings, console: Console) -> bool:
    """Ask what was not answered yet; write and print what the grid says.

    Returns:
        Whether every question has an answer in every cell. What is missing is said on standard error.

    Raises:
        ValueError, OSError: an impossible setting, dataset, checkpoint, endpoint or folder; one line each.
    """
    check(settings)
    describing = describe_settings(settings)
    own = decisive(settings, describing)
    StudyFolder.check(settings.output, own)
    endpoints, budget = _endpoints(settings)
    questions, members = questions_to_ask(settings), members_of(settings)
    folder = StudyFolder(StudyFolder.start(settings.output, own, questions).path)
    stopped = ""
    with folder.locked():
        folder.admit(members)
        for perceiver in settings.perceivers:
            _describe(folder, perceiver, questions, describing, console)
        cells = {
            (p.name, r.name): cell_of(folder, p, r, members[f"reasoner {r.name}"], questions)
            for p in settings.perceivers
            for r in settings.reasoners
        }
        budget.spent = sum(costs(one, column(cells, name))["dollars"] or 0.0 for name, one in endpoints.items())
        try:
            for reasoner in settings.reasoners:
                _answer(settings, reasoner, column(cells, reasoner.name), endpoints, console)
        except BudgetError as error:
            stopped = f"stopped at the budget of ${settings.budget:g} ({error}); a larger --budget goes on"
        for cell in cells.values():
            folder.settle(cell.file, questions)
        result = _report(folder, settings, questions, cells, endpoints, console)
    _name_gaps(result, stopped)
    return not result["missing"]


def _describe(
    folder: StudyFolder, perceiver: Perceiver, questions: Sequence[VideoQA], how: DescribeSettings, console: Console
) -> None:
    file = folder.descriptions(perceiver.name)
    there = {name for name, line in said(file).items() if "text" in line}
    missing = {question.id for question in questions} - there
    if missing:
        done = len(questions) - len(missing)
        console.print(f"{perceiver.name} describes, {len(missing)} to go", highlight=False, markup=False)
        with answer_progress(_quiet(console, not perceiver.is_model), len(questions), done) as update:
            for lines in describe(perceiver, questions, missing, how):
                write_down(file, lines)
                done += len(lines)
                update(done)
    folder.settle(file, questions)


def _endpoints(settings: StudySettings) -> tuple[dict[str, Endpoint], Budget]:
    """The reasoners behind endpoints, and the budget they share. Raises ValueError if a package or key is missing."""
    budget = Budget() if settings.budget is None else Budget(settings.budget)
    there = [reasoner for reasoner in settings.reasoners if reasoner.url is not None]
    endpoints = {reasoner.name: Endpoint(reasoner, calling_of(settings, reasoner), budget) for reasoner in there}
    for endpoint in endpoints.values():
        endpoint.check()
    return endpoints, budget


def _answer(
    settings: StudySettings,
    reasoner: Reasoner,
    cells: Sequence[Cell],
    endpoints: Mapping[str, Endpoint],
    console: Console,
) -> None:
    """Let one reasoner answer what is missing in its cells."""
    total = sum(len(cell.tasks) for cell in cells)
    known = [len(cell.known()) for cell in cells]
    if sum(known) == total:
        return
    console.print(f"{reasoner.name} answers, {total - sum(known)} to go", highlight=False, markup=False)
    with answer_progress(_quiet(console, reasoner.is_rules), total, sum(known)) as update:
        if reasoner.name in endpoints:
            answer_there(endpoints[reasoner.name], cells, lambda more: update(sum(known) + more))
            return
        model = TextModel(reasoner.source, settings.max_answer, settings.dtype)
        answer = by_rules(reasoner.known) if reasoner.is_rules else by_model(model)
        for place, cell in enumerate(cells):
            elsewhere = sum(len(done.tasks) for done in cells[:place]) + sum(known[place + 1 :])
            on_progress = partial(lambda more, done: update(more + done), elsewhere)
            answer_here(cell, answer, settings.batch_size, on_progress)


def _quiet(console: Console, is_quick: bool) -> Console:
    """Where progress goes; nobody waits for what takes milliseconds."""
    return Console(quiet=True) if is_quick else console


def _report(
    folder: StudyFolder,
    settings: StudySettings,
    questions: Sequence[VideoQA],
    cells: Mapping[tuple[str, str], Cell],
    endpoints: Mapping[str, Endpoint],
    console: Console,
) -> dict[str, Any]:
    """Write and print summary, table and curves of what is there."""
    perceivers = [perceiver.name for perceiver in settings.perceivers]
    reasoners = [reasoner.name for reasoner in settings.reasoners]
    described = {name: said(folder.descriptions(name)) for name in perceivers}
    result = summary_of(questions, perceivers, reasoners, cells, described, endpoints)
    folder.write("summary.json", json.dumps(as_json(result, DIGITS), indent=1, allow_nan=False) + "\n")
    folder.write("table.md", page := markdown(result))
    folder.write("grid.svg", curves(result))
    console.print(page, highlight=False, markup=False, soft_wrap=True)
    return result


def _name_gaps(result: Mapping[str, Any], stopped: str) -> None:
    """Say on standard error what is missing, and what asks for it again."""
    gaps = result["missing"]
    for gap in gaps[:NAMED_GAPS]:
        print(f"appo: {gap['count']} {gap['what']} are missing: {gap['why']}", file=sys.stderr)
    if len(gaps) > NAMED_GAPS:
        print(f"appo: {len(gaps) - NAMED_GAPS} more gaps are in summary.json", file=sys.stderr)
    if gaps:
        print(f"appo: {stopped or 'the same command asks for what is missing again'}", file=sys.stderr)
