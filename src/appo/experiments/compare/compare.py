"""`appo compare`: all cells of methods x seeds, one process each, resumable; then the tables.

A folder holds `settings.json`, `clips/` (written once, shared by all cells), `cells/SEED-METHOD.json` (one per finished
cell, written atomically), `logs/`, and, renewed after each cell, `summary.json`, `table.md`, `curves.svg` and
`ablations.svg`. Later commands may add methods and seeds: the tables are about all cells of the folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from appo.evaluation.tables import duration
from appo.experiments.compare.cells import Conditions, config_of, mean_weight, run_cell, setting_of
from appo.experiments.compare.methods import in_order, variant_of, variants_of
from appo.experiments.compare.report import ablation_curves, ablations, learning_curves, markdown, points_over_dapo
from appo.experiments.compare.summaries import Cells, share, summary
from appo.experiments.demo import prompts_a_step
from appo.experiments.figures import require_matplotlib
from appo.files import atomic_write, rename_folder
from appo.models.loading import fingerprint
from appo.reports.jsonl import RecordError
from appo.reports.records import as_json
from appo.reports.run_folder import describe_run
from appo.types import VideoQA
from appo.world import generate, load_annotations, policy_path
from appo.world.dataset import HELD_OUT_SEED
from appo.world.world import LEVELS

DIGITS = 6  # enough of any number here
CellName = tuple[str, int]  # method, seed


@dataclass(frozen=True)
class Comparison:
    """The settings of `appo compare`."""

    output: Path  # folder, new or of this comparison
    methods: tuple[str, ...] = ("grpo", "dapo", "appo")  # names of :data:`appo.experiments.compare.methods.VARIANTS`
    seeds: int = 8  # 0 .. seeds - 1
    steps: int = 30  # optimiser steps of each cell
    questions: int = 1000  # held-out questions a level, the same for all
    workers: int = 1  # cells at the same time, each on one core
    level: str = "L1"  # of the world, for the training clips
    policy: Path = field(default_factory=policy_path)  # folder of the policy that all start from

    @property
    def cells(self) -> list[CellName]:
        """All cells, seed after seed, so that what is finished is paired. The start is one for all seeds."""
        return [
            (method, seed) for seed in range(self.seeds) for method in self.methods if seed == 0 or method != "start"
        ]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that all cells of a folder share."""
        shared = {"steps": self.steps, "questions": self.questions, "level": self.level}
        return {**shared, "policy": fingerprint(self.policy)}


def compare(comparison: Comparison, console: Console, start: Callable[..., Any] | None = None) -> dict[str, Any]:
    """Run all cells that are not finished, write the report and print its table; returns the summary.

    `start` starts a cell and returns an object with ``poll()`` and ``kill()``, as :func:`start_process` does.

    Raises:
        ValueError: an unknown method, a folder of another comparison, or a cell that failed; one line with the fix.
    """
    require_matplotlib()
    for name in variants_of(list(comparison.methods)):
        config_of(name, 0, comparison.steps, comparison.output)
    open_folder(comparison)
    pending = [cell for cell in comparison.cells if not _file(comparison, cell).exists()]
    console.print(f"{len(comparison.cells)} cells, {len(pending)} to run", highlight=False)
    result = _report(comparison)
    began = time.monotonic()
    for done, cell in enumerate(_running(comparison, list(pending), start or start_process), 1):
        left = (time.monotonic() - began) / done * (len(pending) - done)
        console.print(f"[{done}/{len(pending)}] {_line(comparison, cell)}, about {duration(left)} left",
                      highlight=False, markup=False)  # fmt: skip
        result = _report(comparison)
    console.print(
        (comparison.output / "table.md").read_text(encoding="utf-8"), highlight=False, markup=False, soft_wrap=True
    )
    return result


def open_folder(comparison: Comparison) -> None:
    """Create the folder, or check that it has the same steps, questions, level and policy.

    Raises:
        RecordError, OSError, ValueError: it has not, or there is no such policy or level.
    """
    if comparison.level not in LEVELS:
        raise ValueError(f"unknown level {comparison.level!r}: choose from {', '.join(LEVELS)}")
    settings = comparison.settings
    file = comparison.output / "settings.json"
    for part in ("cells", "logs", "clips"):
        (comparison.output / part).mkdir(parents=True, exist_ok=True)
    if not file.exists():
        _write(file, settings)
    found = json.loads(file.read_text(encoding="utf-8"))
    if found != settings:
        raise RecordError(f"{file}: the folder is of {found}, not {settings}: choose another --output")


def run_one(comparison: Comparison, name: str) -> None:
    """Run one cell, SEED-METHOD, in this process and write its file.

    Raises:
        ValueError: it is none of the comparison's, or needs another that is not finished.
    """
    names = {_file(comparison, cell).stem: cell for cell in comparison.cells}
    if name not in names:
        raise ValueError(f"--only {name}: there is no such cell; they are SEED-METHOD, as {next(iter(names))}")
    open_folder(comparison)
    method, seed = names[name]
    needed = variant_of(method).needs
    weight = mean_weight(_read(comparison, (needed, seed))) if needed else 1.0
    clips = comparison.output / "clips"
    conditions = Conditions(comparison.steps, comparison.policy, _held_out(comparison), clips)
    rows = _training(comparison, (method, seed))
    with tempfile.TemporaryDirectory(prefix="scratch-", dir=comparison.output) as scratch:
        cell = run_cell(method, seed, conditions, rows, Path(scratch) / "run", weight)
    about = describe_run({})
    header = {"method": method, "seed": seed, **comparison.settings, "commit": about["git_commit"],
              "versions": about["versions"]}  # fmt: skip
    _write(_file(comparison, (method, seed)), header | cell)


def start_process(comparison: Comparison, cell: CellName) -> subprocess.Popen[bytes]:
    """A cell in a process with one thread; its output goes to the folder's logs."""
    name = _file(comparison, cell).stem
    flags = vars(comparison) | {"methods": ",".join(comparison.methods), "only": name}
    words = [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with (comparison.output / "logs" / f"{name}.log").open("wb") as log:
        command = [sys.executable, "-m", "appo", "compare", *words]
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def _running(comparison: Comparison, pending: list[CellName], start: Callable[..., Any]) -> Any:
    """Yield each cell when it is finished; at most ``workers`` run at a time, none before what it needs."""
    busy: dict[CellName, Any] = {}
    try:
        while pending or busy:
            needed = {cell: variant_of(cell[0]).needs for cell in pending}
            ready = [
                cell for cell, first in needed.items() if not first or _file(comparison, (first, cell[1])).exists()
            ]
            for cell in ready[: comparison.workers - len(busy)]:
                pending.remove(cell)
                _held_out(comparison)
                _training(comparison, cell)
                busy[cell] = start(comparison, cell)
            for cell in [cell for cell, process in busy.items() if process.poll() is not None]:
                del busy[cell]
                if not _file(comparison, cell).exists():
                    name = _file(comparison, cell).stem
                    log = comparison.output / "logs" / f"{name}.log"
                    raise RecordError(f"cell {name} failed, see {log}; the same command goes on with what is left")
                yield cell
            time.sleep(0.2)
    finally:
        for process in busy.values():
            process.kill()
            process.wait()


def _held_out(comparison: Comparison) -> dict[str, list[VideoQA]]:
    clips = comparison.output / "clips"
    return {level: _clips(clips / level, level, comparison.questions, HELD_OUT_SEED) for level in LEVELS}


def _training(comparison: Comparison, cell: CellName) -> list[VideoQA]:
    """Training questions of a seed: twice what the sampler needs, for dynamic sampling."""
    method, seed = cell
    config = config_of(method, seed, comparison.steps, comparison.output)
    count = 2 * comparison.steps * prompts_a_step(config)
    return _clips(comparison.output / "clips" / f"train-{seed}-{count}", comparison.level, count, seed)


def _clips(folder: Path, level: str, count: int, seed: int) -> list[VideoQA]:
    """The questions of a folder of clips, which is generated if absent."""
    if not folder.exists():
        partial = Path(tempfile.mkdtemp(prefix="partial-", dir=folder.parent))
        generate(partial, level, count, seed)
        try:
            rename_folder(partial, folder)
        except OSError:
            shutil.rmtree(partial)
            if not folder.exists():  # else another process was faster, with the same clips
                raise
    questions: list[VideoQA] = load_annotations(folder)
    return questions


def _report(comparison: Comparison) -> dict[str, Any]:
    """Write summary and table of all finished cells, and learning curves of the comparison's methods."""
    cells = _finished(comparison)
    methods = in_order({method for method, _ in cells})
    unfinished = [_file(comparison, cell).stem for cell in comparison.cells if cell not in cells]
    result = summary(cells, methods)
    _write(comparison.output / "summary.json", {**comparison.settings, **result, "unfinished": unfinished})
    atomic_write(comparison.output / "table.md", markdown(result, comparison.settings, unfinished))
    if drawn := [method for method in comparison.methods if method in result["seeds"]]:
        atomic_write(comparison.output / "curves.svg", learning_curves(cells, drawn))
    if found := ablations(methods, partial(setting_of, steps=comparison.steps)):
        points = points_over_dapo(result["differences"].get("dapo", {}))
        atomic_write(comparison.output / "ablations.svg", ablation_curves(found, points, "points over dapo"))
    return result


def _finished(comparison: Comparison) -> Cells:
    """All cells of the folder, whichever command made them. Raises RecordError for one of no known method."""
    found = {}
    for file in sorted((comparison.output / "cells").glob("*.json")):
        seed, _, method = file.stem.partition("-")
        try:
            variant_of(method)
            found[method, int(seed)] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RecordError(f"{file}: no finished cell ({error}); move it away or choose another --output") from error
    return found


def _line(comparison: Comparison, cell: CellName) -> str:
    done = _read(comparison, cell)
    levels = ", ".join(f"{level} {100 * share(bits['right']):.1f}" for level, bits in done["levels"].items())
    return f"seed {cell[1]} {cell[0]}: {levels}, {duration(done['training_seconds'] + done['evaluation_seconds'])}"


def _file(comparison: Comparison, cell: CellName) -> Path:
    return comparison.output / "cells" / f"{cell[1]}-{cell[0]}.json"


def _read(comparison: Comparison, cell: CellName) -> dict[str, Any]:
    return dict(json.loads(_file(comparison, cell).read_text(encoding="utf-8")))


def _write(file: Path, data: Mapping[str, Any]) -> None:
    atomic_write(file, json.dumps(as_json(data, DIGITS), separators=(",", ":"), allow_nan=False) + "\n")
