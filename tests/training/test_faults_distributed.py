"""Two processes of which one meets a video that cannot be shown: they stay in step, and stop together."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from appo.reports.jsonl import read_lines
from appo.reports.run_folder import FAULTS
from appo.training.atomic_checkpoint import last_complete
from tests.support.runs import clips
from tests.training import test_distributed

# Four steps of two groups: every clip is asked for once.
SETTINGS = {"method": "dapo", "max_resampling_rounds": 1, "overlong_cache": 0, "max_steps": 4}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight clips, one of them gone."""
    clips(tmp_path / "clips", 8)
    sorted((tmp_path / "clips").rglob("*.mp4"))[0].unlink()
    return tmp_path


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_processes_stay_in_step_when_one_meets_a_fault(folder, sharding) -> None:
    result = test_distributed.run(folder, 2, sharding, sampling="free", **SETTINGS)
    run = folder / f"{sharding}-2-plain-untrained-dapo" / "run"
    faults = [line for _, line in read_lines(run / FAULTS)]
    assert faults, "no process met it: nothing was shown"
    assert len({fault["file"] for fault in faults}) == 1
    assert not Path(faults[0]["file"]).exists()
    assert test_distributed.measured(result, "faults/videos")[-1] == len(faults)
    shown = {name for process in result["groups"] for step in process for name in step}
    assert shown
    assert faults[0]["id"] not in shown
    assert [len(step) for process in result["groups"] for step in process] == [1] * 8
    assert min(test_distributed.measured(result, "grad_norm")) >= 0


def test_both_stop_with_a_checkpoint_when_it_is_too_many(folder, monkeypatch) -> None:
    """No fault is allowed; only one of the two processes has it."""
    done: list[subprocess.CompletedProcess[str]] = []
    run = subprocess.run

    def keeping(*args: Any, **kwargs: Any) -> Any:
        done.append(run(*args, **kwargs))
        return subprocess.CompletedProcess(args, 1, "", done[-1].stderr)

    monkeypatch.setattr(test_distributed.subprocess, "run", keeping)
    settings = {**SETTINGS, "max_faulty_videos": 0, "max_steps": 40, "max_completion_length": 2}
    with pytest.raises(AssertionError):
        test_distributed.run(folder, 2, "ddp", sampling="free", **settings)
    assert done[0].returncode != 0
    assert "FaultyVideosError: 1 videos cannot be shown, 0 are allowed (max_faulty_videos)" in done[0].stderr
    checkpoint = last_complete(folder / "ddp-2-plain-untrained-dapo" / "run").path
    assert checkpoint is not None
    assert (checkpoint / "state-1.pt").exists()
