"""Kill runs of `appo train` with SIGKILL at random moments, resume them, and compare with a run nobody disturbed.

    python benchmarks/resume_trials.py --trials 20 --seed 0

Compared byte for byte: the policy, the optimiser and all random states after the last step, rollouts.jsonl, and every
number of metrics.jsonl but those that measure time. Each launch is a process of its own, forked from one that has
done nothing but imports; tests/training/test_resume_killed.py kills and resumes the command itself.

Runs take 6 steps of 2 groups of 4 responses about generated clips, with dynamic sampling, and write a checkpoint after
every step. In every second trial each rollout serves two optimiser steps, so that checkpoints fall between them. A
third of the kills waits until a checkpoint is being written.
"""

from __future__ import annotations

import harness  # first: it sets OpenMP's waiting before torch loads

# isort: split
import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from appo.cli.main import main as appo_command
from appo.reports.run_folder import RunFolder
from appo.training.atomic_checkpoint import PARTIAL, last_complete, step_of
from appo.world import generate

STEPS = 6
TIMES = ("step_time", "appo/score_share", "train_runtime", "train_samples_per_second", "train_steps_per_second")
VARIANTS = {
    "a rollout a step": ["--gradient_accumulation_steps", "2"],
    "a rollout two steps": ["--gradient_accumulation_steps", "2", "--num_iterations", "2"],
}
AFTER_LAST_STEP = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


def parity(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward that varies within groups from the first step on; now and then a group is flat and is replaced."""
    return [float(sum(ids) % 2) for ids in completion_ids]


@dataclass
class Kill:
    """One kill and what it left.

    Attributes:
        wanted: ``step``: at a random moment of a random step; ``saving``: while a checkpoint was being written.
        logged: steps in metrics.jsonl by then.
        left: newest complete checkpoint, -1: none.
        unfinished: whether a half-written checkpoint lay there.
    """

    wanted: str
    logged: int
    left: int
    unfinished: bool


# --- runs ------------------------------------------------------------------------------------------------------------


def launch(folder: Path, variant: str, clips: Path) -> int:
    """Start `appo train` in a process of its own, going on with what is in the folder; its process id."""
    recipe = Path(__file__).parents[1] / "recipes" / "spotlight.yaml"
    settings = {
        "config": recipe, "output_dir": folder, "annotations": clips / "annotations.jsonl", "max_steps": STEPS,
        "num_generations": 4, "per_device_train_batch_size": 4, "max_completion_length": 16, "save_strategy": "steps",
        "save_steps": 1, "save_total_limit": 2, "resume_from_checkpoint": "true", "rewards": "resume_trials:parity",
        "accuracy_reward": "parity", "overlong_cache": 0, "learning_rate": 1e-3, "lr_scheduler_type": "linear",
        "threshold": 1.0,
    }  # fmt: skip
    arguments = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    child = os.fork()
    if child:
        return child
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os._exit(appo_command(["train", *arguments, *VARIANTS[variant]]))


def running(child: int) -> bool:
    """Whether it still runs. Raises RuntimeError if it ended in an error."""
    done, status = os.waitpid(child, os.WNOHANG)
    if done and status:
        raise RuntimeError(f"a run ended with status {status}: see its log")
    return not done


def finish(child: int) -> None:
    """Wait until a run is over."""
    while running(child):
        time.sleep(0.05)


def kill_once(child: int, folder: Path, chance: random.Random, step_seconds: float) -> Kill | None:
    """SIGKILL at a random moment; None if the run was over before."""
    wanted = chance.choice(("step", "step", "saving"))
    step = chance.randrange(STEPS)
    while logged(folder) < step:
        if not running(child):
            return None
        time.sleep(0.002)
    delay = chance.uniform(0, step_seconds)
    if wanted == "saving":
        delay = chance.uniform(0, 0.15)
        while not (folder / PARTIAL).exists():
            if not running(child):
                return None
    time.sleep(delay)
    if not running(child):
        return None
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    last = last_complete(folder).path if folder.exists() else None
    return Kill(wanted, logged(folder), step_of(last) if last else -1, (folder / PARTIAL).exists())


def logged(folder: Path) -> int:
    """Lines in metrics.jsonl."""
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


# --- comparison ------------------------------------------------------------------------------------------------------


def differences(run: Path, reference: Path) -> list[str]:
    """What is not the same in two finished runs."""
    last = f"checkpoint-{STEPS}"
    files = ["policy/model.safetensors", "rollouts.jsonl", *(f"{last}/{name}" for name in AFTER_LAST_STEP)]
    found = [name for name in files if (run / name).read_bytes() != (reference / name).read_bytes()]
    pairs = (metrics_of(run), metrics_of(reference))
    return [*found, "metrics.jsonl"] if pairs[0] != pairs[1] else found


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """Every number of metrics.jsonl that does not measure time."""
    lines = RunFolder.open(run).read_metrics()
    return [{k: v for k, v in line.items() if k not in TIMES and not k.startswith("time/")} for line in lines]


# --- trials ----------------------------------------------------------------------------------------------------------


def trial(work: Path, number: int, chance: random.Random, references: dict[str, Path], step_seconds: float) -> Any:
    """Kill a run once or twice, resume it to its end, compare."""
    variant = list(VARIANTS)[number % len(VARIANTS)]
    folder = work / f"trial-{number}"
    kills: list[Kill] = []
    for _ in range(chance.choice((1, 1, 2))):
        kill = kill_once(launch(folder, variant, work / "clips"), folder, chance, step_seconds)
        if kill is None:
            break
        kills.append(kill)
    if not kills:
        shutil.rmtree(folder)
        return trial(work, number, chance, references, step_seconds)
    finish(launch(folder, variant, work / "clips"))
    different = differences(folder, references[variant])
    if not different:
        shutil.rmtree(folder)
    return {"trial": number, "variant": variant, "kills": [asdict(kill) for kill in kills], "different": different}


def undisturbed(work: Path) -> tuple[dict[str, Path], float]:
    """A run of each variant from beginning to end, and the seconds of a step."""
    generate(work / "clips", "L1", 16, 0)
    references, seconds = {}, []
    for number, variant in enumerate(VARIANTS):
        references[variant] = work / f"reference-{number}"
        finish(launch(references[variant], variant, work / "clips"))
        seconds += [line["step_time"] for line in RunFolder.open(references[variant]).read_metrics()[:-1]]
    return references, sum(seconds) / len(seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials, write the JSON; 0 if every resumed run equals the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20, help="runs to kill and resume (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "resume_trials.json")
    parser.set_defaults(script="resume_trials", device="cpu")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    import_module("appo.training.run")  # once for all runs, which are forked
    sys.modules.setdefault("resume_trials", sys.modules[__name__])  # where runs find their reward
    chance = random.Random(args.seed)
    trials = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        references, step_seconds = undisturbed(work)
        print(f"two undisturbed runs done, {step_seconds:.2f} s a step", flush=True)
        for number in range(args.trials):
            trials.append(trial(work, number, chance, references, step_seconds))
            print(json.dumps(trials[-1]), flush=True)
    kills = [kill for one in trials for kill in one["kills"]]
    result = {
        "trials": len(trials),
        "equal": sum(not one["different"] for one in trials),
        "kills": len(kills),
        "kills_that_left_a_half_written_checkpoint": sum(kill["unfinished"] for kill in kills),
        "resumed_from_step": Counter(kill["left"] for kill in kills),
        "each": trials,
    }
    harness.write_json(args.output, harness.provenance(args, sys.argv[1:] if arguments is None else arguments) | result)
    print(f"{result['equal']} of {result['trials']} resumed runs equal the undisturbed one; {args.output}")
    return 0 if result["equal"] == result["trials"] else 1


if __name__ == "__main__":
    sys.exit(main())
