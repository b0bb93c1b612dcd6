"""`appo eval` killed three times midway ends with what an undisturbed evaluation ends with, byte for byte."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from appo.cli.main import main
from appo.evaluation.predictions import EvaluationFolder

QUESTIONS = 24
COMMAND = [
    "eval",
    "--model",
    "spotlight",
    "--limit",
    str(QUESTIONS),
    "--batch-size",
    "2",
    "--num-generations",
    "3",
    "--seed",
    "4",
]


def run(output: Path) -> None:
    """What each process does, from the command line on."""
    sys.exit(main([*COMMAND, "--output", str(output)]))


@pytest.fixture(scope="module")
def processes() -> Any:
    """Fresh processes that have imported appo already: they are forked from one that has done nothing else."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["appo.evaluation.run"])
    return context


def lines(output: Path) -> int:
    file = output / "predictions.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def stop_at(processes: Any, output: Path, count: int, how: signal.Signals) -> int:
    """Start, stop as soon as so many questions are answered; the exit code."""
    process = processes.Process(target=run, args=(output,))
    process.start()
    deadline = time.monotonic() + 240
    while lines(output) < count and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, how)
    process.join(60)
    return int(process.exitcode)


def finish(processes: Any, output: Path) -> None:
    process = processes.Process(target=run, args=(output,))
    process.start()
    process.join(240)
    assert process.exitcode == 0


def test_killed_three_times_it_ends_as_if_undisturbed(tmp_path, processes):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish(processes, undisturbed)
    answered = []
    for count in (1, 9, 17):
        assert stop_at(processes, killed, count, signal.SIGKILL) == -signal.SIGKILL
        answered.append(lines(killed))
    assert 0 < answered[0] < answered[1] < answered[2] < QUESTIONS, "each was killed on its way"
    with (killed / "predictions.jsonl").open("ab") as file:
        file.write(b'{"id": "l1-100')  # what a kill within a write leaves
    finish(processes, killed)
    for name in ("predictions.jsonl", "scores.json"):
        assert (killed / name).read_bytes() == (undisturbed / name).read_bytes(), name
    ids = [json.loads(line)["id"] for line in (killed / "predictions.jsonl").read_text().splitlines()]
    assert len(ids) == len(set(ids)) == QUESTIONS


def test_ctrl_c_leaves_whole_batches(tmp_path, processes):
    assert stop_at(processes, tmp_path / "e", 1, signal.SIGINT) == 130
    assert 0 < lines(tmp_path / "e") < QUESTIONS
    assert lines(tmp_path / "e") % 2 == 0
    folder = EvaluationFolder.open(tmp_path / "e")
    assert len(folder.resume(folder.questions(), 2)) == lines(tmp_path / "e") / 2
