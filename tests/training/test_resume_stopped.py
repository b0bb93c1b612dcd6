"""Runs of `appo train` that signals or full disks stop, and what a user is told who goes on with one."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from appo.cli.main import main
from appo.reports.run_folder import RunFolder
from appo.training import trainer_state as resuming
from appo.training.atomic_checkpoint import CheckpointError, last_complete
from tests.support.full_disk import largest_file
from tests.support.runs import clips, rows_of
from tests.training.resume_cases import begin, killed_after, metrics_of, questions

RECIPE = Path(__file__).parents[2] / "recipes" / "spotlight.yaml"
SHORT = ["--max_steps", "4", "--num_generations", "4", "--per_device_train_batch_size", "4", "--overlong_cache", "0",
         "--gradient_accumulation_steps", "1", "--max_completion_length", "8", "--instruction", ""]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    clips(folder, 5)
    return folder / "annotations.jsonl"


def train(folder: Path, world: Path, *flags: str, reward: str = "tests.support.runs:accuracy_reward") -> int:
    """`appo train` in this process; its exit code."""
    where = ["--output_dir", str(folder), "--annotations", str(world), "--rewards", reward]
    return main(["train", "--config", str(RECIPE), *where, "--accuracy_reward", reward.split(":")[1], *SHORT, *flags])


# --- signals ----------------------------------------------------------------------------------------------------------


def test_sigterm_ends_the_step_and_writes_a_checkpoint_that_goes_on_exactly(
    tmp_path: Path, world: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert train(run, world, reward="tests.training.resume_cases:stop_in_second_rollout") == 143
    said = capfd.readouterr().err.strip().splitlines()
    assert said[-2] == "appo: stopping after this step, with a checkpoint; once more stops at once"
    assert said[-1] == (
        f"appo: interrupted, with a checkpoint of step 2 in {run}; to go on: the same command and "
        "--resume_from_checkpoint true"
    )
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"], "though save_strategy is no"
    assert not (run / "policy").exists()
    resumed = ["--resume_from_checkpoint", "true"]
    assert train(run, world, *resumed, reward="tests.training.resume_cases:stop_in_second_rollout") == 0
    assert "going on from" in " ".join(capfd.readouterr().out.split())
    assert train(whole, world) == 0
    renamed = [
        {key.replace("stop_in_second_rollout", "accuracy_reward"): value for key, value in line.items()}
        for line in metrics_of(run)
    ]
    assert renamed == metrics_of(whole)
    name = Path("policy") / "model.safetensors"
    assert (run / name).read_bytes() == (whole / name).read_bytes()
    (line,) = (run / "resumes.jsonl").read_text().splitlines()
    assert json.loads(line)["from"] == "checkpoint-2"


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN])
def test_a_second_ctrl_c_stops_at_once(
    tmp_path: Path, world: Path, capfd: pytest.CaptureFixture[str], before: Any
) -> None:
    """Also where ctrl-C was ignored before the run, as in jobs of a script's background: it says that it would."""
    signal.signal(signal.SIGINT, before)
    assert train(tmp_path / "run", world, reward="tests.training.resume_cases:interrupt_twice") == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert capfd.readouterr().err.strip().splitlines()[-1] == "appo: interrupted"
    assert last_complete(tmp_path / "run").path is None


# --- what a resumed run is told ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, world: Path) -> Path:
    """A run of `appo train` with checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert train(folder, world, "--save_strategy", "steps", "--save_steps", "2") == 0
    return folder


RESUME = ["--save_strategy", "steps", "--save_steps", "2", "--resume_from_checkpoint"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ["true", "--seed", "7", "--max_weight", "2"],
            "seed was 0 and is 7; max_weight was 1.7 and is 2.0; a resumed run",
        ),
        (
            ["true", "--lr_scheduler_type", "linear", "--max_steps", "9"],
            "lr_scheduler_type was 'constant' and is 'linear'",
        ),
        (["RUN/checkpoint-2"], r"checkpoint-2: the run has gone on since \(checkpoint-4\); move or delete"),
        (["RUN/checkpoint-3"], "checkpoint-3: cannot be resumed from: there is no such folder"),
        (["false"], "run: the run folder is not empty"),
    ],
)
def test_what_cannot_go_on_is_one_line(
    finished: Path, world: Path, flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert train(finished, world, *RESUME, *(flag.replace("RUN", str(finished)) for flag in flags)) == 2
    error = capsys.readouterr().err
    assert error.startswith("appo: ")
    assert error.count("\n") == 1
    assert re.search(says, error), error
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before, "nothing was touched"


def test_a_damaged_checkpoint_is_passed_over_and_said(
    tmp_path: Path, finished: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "checkpoint-4" / "optimizer.pt").write_bytes(b"half")
    assert train(run, world, *RESUME, "last") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"passed over {run / 'checkpoint-4'}: optimizer.pt has 4 bytes, not" in said
    assert f"going on from {run / 'checkpoint-2'}" in said
    assert metrics_of(run) == metrics_of(finished)
    assert last_complete(run).damaged == ()


def test_a_run_with_a_constant_learning_rate_can_be_made_longer(tmp_path: Path, finished: Path, world: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    assert train(run, world, *RESUME, "true", "--max_steps", "5") == 0
    assert [line["step"] for line in metrics_of(run)] == [1, 2, 3, 4, 5, 5]
    assert metrics_of(run)[:4] == metrics_of(finished)[:4]


def test_true_begins_a_run_and_begins_again_one_that_had_no_checkpoint_yet(
    tmp_path: Path, finished: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(run, world, *RESUME, "true", "--max_steps", "1") == 0
    shutil.rmtree(run / "checkpoint-1")
    assert train(run, world, *RESUME, "true", "--max_steps", "1") == 0
    assert "no checkpoint yet: from the beginning" in capsys.readouterr().out
    assert [line["step"] for line in metrics_of(run)] == [1, 1]
    assert metrics_of(run)[0] == metrics_of(finished)[0]
    assert len(list(RunFolder.open(run).read_rollouts())) == 1
    shutil.rmtree(run / "checkpoint-1")
    assert train(run, world, "--resume_from_checkpoint", "true", "--max_steps", "1") == 2
    assert "the run writes no checkpoints (save_strategy is no)" in capsys.readouterr().err


def test_the_supervised_baseline_resumes_exactly(tmp_path: Path, world: Path) -> None:
    flags = ["--method", "sft", "--save_strategy", "steps", "--save_steps", "1", "--logging_steps", "3"]
    assert train(tmp_path / "whole", world, *flags) == 0
    run = killed_after(tmp_path / "whole", tmp_path / "run", 2)
    shutil.rmtree(run / "policy")
    assert train(run, world, *flags, "--resume_from_checkpoint", "true") == 0
    assert metrics_of(run) == metrics_of(tmp_path / "whole")
    name = Path("policy") / "model.safetensors"
    assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# --- full disks -------------------------------------------------------------------------------------------------------


def test_a_full_disk_ends_a_run_with_one_line(tmp_path: Path, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with largest_file(200_000):
        assert train(tmp_path / "run", world, *RESUME, "false") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "checkpoint-2: cannot be written (" in error
    assert "there is no earlier checkpoint" in error
    assert not (tmp_path / "run" / "_partial").exists()


def test_a_full_disk_leaves_the_last_checkpoint_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever file the disk is too small for: a text, the model's, the optimiser's (the largest), or the last one."""
    run = tmp_path / "run"
    trainer = begin(run, rows_of(questions(tmp_path / "clips")), max_steps=2, save_total_limit=1)
    size = (run / "checkpoint-2" / "model.safetensors").stat().st_size
    trainer.state.global_step = 3
    for limit in (10, size // 2, size + 1000):
        refused = pytest.raises(
            CheckpointError, match=r"checkpoint-3: cannot be written \(.+\); checkpoint-2 is complete"
        )
        with largest_file(limit), refused:
            trainer._save_checkpoint(trainer.model, None)
    monkeypatch.setattr(resuming, "write_manifest", _no_space)
    with pytest.raises(CheckpointError, match=r"\(No space left on device\); checkpoint-2 is complete"):
        trainer._save_checkpoint(trainer.model, None)
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (run / "_partial").exists(), "the space is given back"
    monkeypatch.undo()
    trainer._save_checkpoint(trainer.model, None)
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-3"], "now the old one may go"


def _no_space(*args: object, **kwargs: object) -> None:
    raise OSError(28, "No space left on device")
