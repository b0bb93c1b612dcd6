"""`appo train`, killed with SIGKILL and started again, in its own processes. More: benchmarks/resume_trials.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.support.runs import clips
from tests.training.resume_cases import metrics_of

ROOT = Path(__file__).parents[2]
STEPS = 4
PATIENCE = 240  # seconds until a test that hangs is given up


def command(folder: Path, world: Path) -> list[str]:
    flags = {
        "config": ROOT / "recipes" / "spotlight.yaml", "output_dir": folder, "annotations": world, "max_steps": STEPS,
        "num_generations": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
        "max_completion_length": 8, "num_iterations": 2, "save_strategy": "steps", "save_steps": 1,
        "rewards": "tests.support.runs:accuracy_reward", "accuracy_reward": "accuracy_reward", "overlong_cache": 0,
        "resume_from_checkpoint": "true",
    }  # fmt: skip
    return [
        sys.executable,
        "-m",
        "appo",
        "train",
        *(word for name, v in flags.items() for word in (f"--{name}", str(v))),
    ]


def start(folder: Path, world: Path) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    pipe = subprocess.PIPE
    return subprocess.Popen(command(folder, world), env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    clips(tmp_path / "world", 5)
    world, killed, whole = tmp_path / "world" / "annotations.jsonl", tmp_path / "killed", tmp_path / "whole"
    process, undisturbed = start(killed, world), start(whole, world)
    deadline = time.monotonic() + PATIENCE
    while not (killed / "checkpoint-1").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGKILL, output
    assert not (killed / "policy").exists()

    again = start(killed, world)
    output, _ = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0, output
    assert "going on from" in output
    output, _ = undisturbed.communicate(timeout=PATIENCE)
    assert undisturbed.returncode == 0, output

    assert [line["step"] for line in metrics_of(whole)] == [1, 2, 3, 4, 4]
    assert metrics_of(killed) == metrics_of(whole)
    last = f"checkpoint-{STEPS}"
    for name in ("rollouts.jsonl", "policy/model.safetensors", f"{last}/optimizer.pt", f"{last}/rng_state.pth"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
