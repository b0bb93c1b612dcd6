"""`appo study`: all perceivers describe, all reasoners answer, the grid is scored; resumable."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from rich.console import Console

from appo.evaluation.tables import answer_progress
from appo.experiments.study.answering import (
    Cell,
    StudyFolder,
    answer_by_endpoint,
    answer_locally,
    by_model,
    by_rules,
    cell_of,
    column,
    costs,
    latest_lines,
)
from appo.experiments.study.describing import describe
from appo.experiments.study.reasoners import Budget, BudgetError, Endpoint, TextModel
from appo.experiments.study.report import curves, markdown
from appo.experiments.study.settings import (
    Calling,
    Perceiver,
    Reasoner,
    StudySettings,
    check,
    member_identities,
    study_identity,
    study_questions,
)
from appo.experiments.study.summary import summary_of
from appo.reports.jsonl import append_line
from appo.reports.records import as_json
from appo.types import VideoQA

DIGITS = 6
MAX_NAMED_GAPS = 5


def study(settings: StudySettings, console: Console) -> bool:
    """Complete the descriptions and answers; write and print the grid.

    Returns:
        Whether every question has an answer in every cell. Standard error names what is missing.

    Raises:
        ValueError, OSError: an impossible setting, dataset, checkpoint, endpoint or folder; one line each.
    """
    check(settings)
    own = study_identity(settings)
    StudyFolder.check(settings.output, own)
    endpoints, budget = _endpoints(settings)
    questions, members = study_questions(settings), member_identities(settings)
    folder = StudyFolder(StudyFolder.start(settings.output, own, questions).path)
    stopped = ""
    with folder.locked():
        folder.add_members(members)
        for perceiver in settings.perceivers:
            _describe(folder, perceiver, questions, settings, console)
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
            folder.sort_lines(cell.file, questions)
        result = _report(folder, settings, questions, cells, endpoints, console)
    _name_gaps(result, stopped)
    return not result["missing"]


def _describe(
    folder: StudyFolder, perceiver: Perceiver, questions: Sequence[VideoQA], settings: StudySettings, console: Console
) -> None:
    file = folder.descriptions(perceiver.name)
    there = {name for name, line in latest_lines(file).items() if "text" in line}
    missing = {question.id for question in questions} - there
    if missing:
        done = len(questions) - len(missing)
        console.print(f"{perceiver.name} describes, {len(missing)} to go", highlight=False, markup=False)
        with answer_progress(_quiet(console, not perceiver.is_model), len(questions), done) as update:
            for lines in describe(perceiver, questions, missing, settings):
                for line in lines:
                    append_line(file, line)
                done += len(lines)
                update(done)
    folder.sort_lines(file, questions)


def _endpoints(settings: StudySettings) -> tuple[dict[str, Endpoint], Budget]:
    """The reasoners behind endpoints, and the budget they share. Raises ValueError if a package or key is missing."""
    budget = Budget() if settings.budget is None else Budget(settings.budget)
    callings = settings.calling
    endpoints = {
        reasoner.name: Endpoint(reasoner, callings.get(reasoner.name, Calling()), budget, settings.max_answer)
        for reasoner in settings.reasoners
        if reasoner.url is not None
    }
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
    """Complete one reasoner's answers."""
    total = sum(len(cell.tasks) for cell in cells)
    known = [len(cell.answers()) for cell in cells]
    if sum(known) == total:
        return
    console.print(f"{reasoner.name} answers, {total - sum(known)} to go", highlight=False, markup=False)
    with answer_progress(_quiet(console, reasoner.is_rules), total, sum(known)) as update:
        if reasoner.name in endpoints:
            answer_by_endpoint(endpoints[reasoner.name], cells, lambda more: update(sum(known) + more))
            return
        model = TextModel(reasoner.source, settings.max_answer, settings.dtype)
        answer = by_rules(reasoner.known) if reasoner.is_rules else by_model(model)
        for place, cell in enumerate(cells):
            elsewhere = sum(len(done.tasks) for done in cells[:place]) + sum(known[place + 1 :])
            on_progress = partial(lambda more, done: update(more + done), elsewhere)
            answer_locally(cell, answer, settings.batch_size, on_progress)


def _quiet(console: Console, is_quick: bool) -> Console:
    """No progress is printed for work of milliseconds."""
    return Console(quiet=True) if is_quick else console


def _report(
    folder: StudyFolder,
    settings: StudySettings,
    questions: Sequence[VideoQA],
    cells: Mapping[tuple[str, str], Cell],
    endpoints: Mapping[str, Endpoint],
    console: Console,
) -> dict[str, Any]:
    """Write summary, table and curves; print the table."""
    perceivers = [perceiver.name for perceiver in settings.perceivers]
    reasoners = [reasoner.name for reasoner in settings.reasoners]
    described = {name: latest_lines(folder.descriptions(name)) for name in perceivers}
    result = summary_of(questions, perceivers, reasoners, cells, described, endpoints)
    folder.write("summary.json", json.dumps(as_json(result, DIGITS), indent=1, allow_nan=False) + "\n")
    folder.write("table.md", page := markdown(result))
    folder.write("grid.svg", curves(result))
    console.print(page, highlight=False, markup=False, soft_wrap=True)
    return result


def _name_gaps(result: Mapping[str, Any], stopped: str) -> None:
    """Print to standard error what is missing, and how to complete it."""
    gaps = result["missing"]
    for gap in gaps[:MAX_NAMED_GAPS]:
        print(f"appo: {gap['count']} {gap['what']} are missing: {gap['why']}", file=sys.stderr)
    if len(gaps) > MAX_NAMED_GAPS:
        print(f"appo: {len(gaps) - MAX_NAMED_GAPS} more gaps are in summary.json", file=sys.stderr)
    if gaps:
        print(f"appo: {stopped or 'the same command asks for what is missing again'}", file=sys.stderr)
