"""Forty combinations of settings, kinds of rows and processes, of which every two meet somewhere, and what must hold.

What is combined is in combination_cases.py, what is asserted in invariants.py. `benchmarks/combinations.py` runs the
whole matrix, in which every three meet.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from appo.rollout import encoding, pipeline
from tests.combinations.cases import DIMENSIONS, Case, all_tuples, covering_array, random_cases, tuples_of
from tests.combinations.invariants import run_case
from tests.combinations.worker import run_apart
from tests.combinations.world import World, build_world

SEED = 0
COVER = covering_array(2, SEED)
# Combinations of three and more that were broken once, whatever the seed makes of the rest.
ONCE_BROKEN = [
    Case("appo", "mixed", weights="relative", processes="ddp"),
    Case("appo", "mixed", tower="trained", processes="fsdp2"),
    Case("grpo", "repeated video", processes="fsdp2"),
    Case("dapo", "picture in memory", resampling="on", reward="with None"),
    Case("dapo", "picture path", resampling="on", layout="rows", batch="two groups", reward="with None"),
    Case("appo", peft="lora", updates="num_iterations", truncation="masked", layout="chunks"),
    Case("appo", weights="relative", resume="yes"),
]
KNOWN = [*COVER, *ONCE_BROKEN]
CASES = [*KNOWN, *random_cases(40 - len(KNOWN), SEED, KNOWN, processes="one")]
WORKER = Path(__file__).with_name("worker.py")
SECONDS = 240.0  # for one case in two processes, on a busy machine


# --- the choice of cases ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("strength", "most"), [(1, 9), (2, 30), (3, 120)])
@pytest.mark.parametrize("seed", [0, 1])
def test_all_values_of_any_dimensions_meet(strength: int, most: int, seed: int) -> None:
    cases = covering_array(strength, seed)
    assert set().union(*(tuples_of(case, strength) for case in cases)) == all_tuples(strength)
    assert len(set(cases)) == len(cases) <= most
    assert cases == covering_array(strength, seed)


def test_what_there_is_to_cover_is_counted_by_hand() -> None:
    sizes = [len(values) for values in DIMENSIONS.values()]
    pairs = sum(a * b for i, a in enumerate(sizes) for b in sizes[:i])
    assert len(all_tuples(2)) == pairs
    assert ((0, "appo"), (1, "text")) in all_tuples(2)
    assert list(DIMENSIONS) == list(asdict(Case()))
    assert all(value == values[0] for value, values in zip(asdict(Case()).values(), DIMENSIONS.values(), strict=True))


def test_the_cases_of_this_file() -> None:
    assert len({str(case) for case in CASES}) == 40
    assert {case.processes for case in CASES[len(KNOWN) :]} == {"one"}


# --- the cases --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """What is trained on; one thread, for matrices as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield build_world(tmp_path_factory.mktemp("world"))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def worker(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """Runs cases in processes of their own, one after another."""
    command = [sys.executable, str(WORKER), str(world.folder), str(tmp_path_factory.mktemp("cases")), str(SECONDS)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def ids(cases: list[Case]) -> list[Any]:
    return [pytest.param(case, id=str(case).replace(", ", "-").replace(" ", "_")) for case in cases]


@pytest.mark.parametrize("case", ids([case for case in CASES if case.processes == "one"]))
def test_a_combination_holds(case: Case, world: World, tmp_path: Path) -> None:
    assert run_case(case, world, tmp_path)["outcome"] == "held"


@pytest.mark.parametrize("case", ids([case for case in CASES if case.processes != "one"]))
def test_a_combination_holds_in_two_processes(case: Case, worker: subprocess.Popen[str]) -> None:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(json.dumps(asdict(case)) + "\n")
    worker.stdin.flush()
    result = json.loads(worker.stdout.readline())
    assert result["outcome"] == "held", result["reason"]


def test_a_case_that_does_not_end_is_named(world: World, tmp_path: Path) -> None:
    """Three runs take longer than a second."""
    result = run_apart(Case("dapo", resume="yes"), world, tmp_path / "case", 1.0)
    assert result["outcome"] == "hung"
    assert result["reason"].startswith("not ended after 1 s: {0: ")
    assert "Current thread" in (tmp_path / "case" / "0.stacks").read_text()


# --- the matrix can fail ----------------------------------------------------------------------------------------------


def test_features_of_another_picture_are_seen(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All pictures of a rollout are taken for the same one."""
    monkeypatch.setattr(encoding, "_digest", lambda *tensors: b"")
    with pytest.raises(AssertionError, match="is trained on features that differ by"):
        run_case(Case(rows="picture in memory"), world, tmp_path)


def test_rows_without_their_own_question_are_seen(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamic sampling hands over the rows that it has replaced."""
    resampled = pipeline.RolloutPipeline.dynamic_sampling

    def stale(rollout: Any, groups: Any, *rest: Any) -> Any:
        """The new groups, but with the prompts of the first ones."""
        pairs = zip(resampled(rollout, groups, *rest), groups, strict=True)
        return [replace(new, prompt=old.prompt) for new, old in pairs]

    monkeypatch.setattr(pipeline.RolloutPipeline, "dynamic_sampling", stale)
    with pytest.raises(AssertionError, match=r"is trained on features that differ by|trained on .* rewarded"):
        run_case(Case(rows="picture path", resampling="on"), world, tmp_path)


def test_dropout_while_scoring_is_seen(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "evaluation_mode", lambda model: nullcontext())
    with pytest.raises(AssertionError, match="is not dapo's"):
        run_case(Case(method="dapo", peft="lora"), world, tmp_path)
