"""Several processes on one machine (gloo, CPU): the same run as one process's, however the policy is sharded."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel

from appo.models.sharding import copy_weights
from appo.reports.run_folder import RunFolder
from tests.support.runs import clips

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("distributed_worker.py")
SETTINGS = {
    "method": "appo",
    "max_steps": 3,
    "gradient_accumulation_steps": 1,
    "max_resampling_rounds": 0,
}
ZERO = {
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
# Adam divides by the size of a gradient: rounding moves parameters whose gradient is next to nothing. A step is 1e-3.
CLOSE = {"ddp": 2e-5, "fsdp2": 2e-5, "deepspeed": 3e-4}
has_deepspeed = importlib.util.find_spec("deepspeed") is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    clips(folder / "clips", 8)
    return folder


def run(folder: Path, processes: int, sharding: str, **task: Any) -> dict[str, Any]:
    """Train in operating-system processes; what the first one wrote. Keywords: those of `task_of`."""
    (result,) = run_all(folder, processes, sharding, [task])
    return result


def run_all(folder: Path, processes: int, sharding: str, tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same for several runs, one after another in the same processes: starting them is most of the time."""
    described = [task_of(folder, processes, sharding, **task) for task in tasks]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    on_cpu = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"} if sharding == "deepspeed" else {}
    on_cpu = on_cpu or {"ACCELERATE_USE_CPU": "true"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **on_cpu}
    done = subprocess.run(
        [*command, str(WORKER), json.dumps(described)], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(Path(one["output"]) / "result.pt", weights_only=False) for one in described]


def task_of(
    folder: Path,
    processes: int,
    sharding: str,
    *,
    name: str = "",
    rows: str = "clips",
    sampling: str = "by prompt",
    rewards: str = "plain",
    policy: str = "untrained",
    **settings: Any,
) -> dict[str, Any]:
    """What tests/training/distributed_worker.py is told about one run."""
    output = folder / f"{sharding}-{processes}-{rewards}-{policy}-{settings.get('method', 'appo')}{name}"
    output.mkdir(exist_ok=True)
    settings = {"per_device_train_batch_size": 8 // processes, **SETTINGS, **settings}
    task = {"clips": str(folder / "clips"), "output": str(output), "sharding": sharding, "settings": settings}
    return task | {"sampling": sampling, "rewards": rewards, "rows": rows, "policy": policy}


# What each process would do otherwise by itself: it has other prompts, so other usual shares and another mean weight.
SHARED = {"frame_attention": "relative", "base_weight": 0.2, "normalize_weights": True, "rewards": "plain, shared"}
SHARED |= {"score_tokens": 2, "top_frames": 1, "frame_tokens": 2}
# Process 0 replaces every group each round, process 1 none.
UNEVEN = {
    "max_resampling_rounds": 2,
    "overlong_cache": 0,
    "max_steps": 2,
    "sampling": "free",
    "rewards": "of process 1",
}


@pytest.fixture(scope="module")
def started(folder) -> Callable[[int, str], dict[str, Any]]:
    """The runs of so many processes, by name, each kind of processes started once."""

    @cache
    def results(processes: int, sharding: str) -> dict[str, Any]:
        tasks: dict[str, dict[str, Any]] = {"plain": {}}
        tasks |= {"shared": SHARED} if sharding == "ddp" else {}
        tasks |= {"uneven": UNEVEN} if processes == 2 else {}
        return dict(zip(tasks, run_all(folder, processes, sharding, list(tasks.values())), strict=True))

    return results


def measured(result: dict[str, Any], name: str) -> list[float]:
    return [entry[name] for entry in result["log"] if name in entry]


def assert_same_run(result: dict[str, Any], alone: dict[str, Any], close: float) -> None:
    """Metrics and parameters within rounding, and groups whole: each prompt with one process."""
    names = {name for entry in alone["log"] for name in entry if not name.startswith(("time/", "train_"))}
    names -= {"step_time", "appo/score_share"}
    assert {"loss", "grad_norm", "reward", "appo/mean_weight", "entropy"} <= names
    for name in names:
        assert measured(result, name) == pytest.approx(measured(alone, name), rel=1e-5, abs=1e-6), name
    assert max(measured(alone, "grad_norm")) > 1, "nothing was learned, so nothing was compared"
    worst = {
        name: float((parameter - alone["parameters"][name]).abs().max())
        for name, parameter in result["parameters"].items()
    }
    assert max(worst.values()) < close, max(worst.items(), key=lambda pair: pair[1])
    steps = zip(*result["groups"], strict=True)
    assert [sorted(chain.from_iterable(groups)) for groups in steps] == [sorted(ids) for ids in alone["groups"][0]]


SHARDINGS = [
    pytest.param("ddp", {}, id="ddp"),
    pytest.param("fsdp2", {}, id="fsdp2"),
    *(
        pytest.param(
            "deepspeed",
            {"use_cpu": False, "deepspeed": {"zero_optimization": zero, **ZERO}},
            id=f"zero{zero['stage']}",
            marks=pytest.mark.skipif(not has_deepspeed, reason="deepspeed is not installed"),
        )
        for zero in ({"stage": 2}, {"stage": 3, "stage3_param_persistence_threshold": 0})
    ),
]


@pytest.mark.parametrize(("sharding", "settings"), SHARDINGS)
def test_two_processes_do_what_one_does(folder, started, sharding, settings):
    result = run(folder, 2, sharding, **settings) if settings else started(2, sharding)["plain"]
    assert_same_run(result, started(1, "ddp")["plain"], CLOSE[sharding])
    stage = settings.get("deepspeed", {}).get("zero_optimization", {}).get("stage")
    assert (result["sharded"] > 0) == (sharding == "fsdp2" or stage == 3), "the policy was not sharded as asked"


@pytest.mark.parametrize(("sharding", "settings"), SHARDINGS)
def test_the_reference_is_the_policy_as_it_was_given(folder, sharding, settings):
    """TRL loads it from the folder that the policy came from; the policy has changed since, and is what counts.

    With the recipe's ``fsdp_cpu_ram_efficient_loading`` only the first process needs to have it.
    """
    policy = "changed, loaded once" if sharding == "fsdp2" else "changed"
    result = run(folder, 2, sharding, policy=policy, beta=0.1, max_steps=2, learning_rate=1e-2, **settings)
    first, second = measured(result, "kl")
    assert first == pytest.approx(0, abs=1e-6)
    assert second > 1e-5, "the policy has moved away from the reference, or the reference along with it"


def test_a_reference_under_fsdp_version_1_is_refused():
    sharded = object.__new__(FullyShardedDataParallel)  # a real one wants an accelerator
    with pytest.raises(ValueError, match="fsdp_version: 2"):
        copy_weights(torch.nn.Linear(1, 1), sharded)


def test_usual_shares_and_the_mean_weight_are_those_of_all_processes(started):
    one, two = started(1, "ddp")["shared"], started(2, "ddp")["shared"]
    assert 0.2 < measured(one, "appo/mean_weight")[0] < 1
    assert_same_run(two, one, CLOSE["ddp"])


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_processes_stay_in_step_when_one_has_nothing_to_resample(started, sharding):
    """Neither waits for ever, and both train."""
    result = started(2, sharding)["uneven"]
    assert measured(result, "resampling/flat_groups") == [0.5, 0.5], "one of two groups stays flat, as it must"
    assert len(measured(result, "grad_norm")) == 2
    assert min(measured(result, "grad_norm")) > 0


def test_the_command_writes_one_run_folder_however_many_processes_there_are(folder):
    """Two processes train by the command; asked to do so again, they are refused the used folder in one line."""
    output = folder / "command"
    flags = ["train", "--tiny", "--config", str(ROOT / "recipes" / "spotlight.yaml"), "--output_dir", str(output)]
    flags += ["--save_strategy", "steps", "--save_steps", "1", "--max_resampling_rounds", "0"]
    first = launch("appo", *flags)
    assert first.returncode == 0, first.stderr[-4000:]
    assert first.stdout.count("run folder:") == 1
    run_folder = RunFolder.open(output)
    assert [entry["step"] for entry in run_folder.read_metrics() if "loss" in entry] == [1, 2]
    assert [record.step for record in run_folder.read_rollouts()] == [0, 0, 1, 1], "the groups of the first process"
    assert (output / "policy" / "config.json").is_file()
    assert len(list((output / "clips").glob("*.mp4"))) == 8
    again = launch("appo", *flags)
    assert again.returncode != 0
    assert again.stderr.count("the run folder is not empty") == 1, "one process reports, both stop"


def launch(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", module]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=500)
