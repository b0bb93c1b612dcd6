"""Runs that are resumed, and what must then be equal: shared by the tests of resuming."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from recipes.tiny_policy.build import build_policy

from appo import APPOConfig, APPOTrainer
from appo.reports.run_folder import RunFolder
from appo.training.rollout_logger import Recorder
from tests.support.runs import FAST, accuracy_reward, clips

TIMES = ("step_time", "appo/score_share", "train_runtime", "train_samples_per_second", "train_steps_per_second")
EVERY_STEP = {"save_strategy": "steps", "save_steps": 1}
SEVEN = 7  # rows: no whole number of steps, so that orders and epochs do not fall together by chance


def flat_often(completion_ids: list[list[int]], prompts: list[Any], **kwargs: Any) -> list[float]:
    """A reward that is 0 for every second clip, so that dynamic sampling draws fresh rows in most steps."""
    numbers = [int(re.findall(r"(\d+)\.mp4", str(prompt))[0]) for prompt in prompts]
    return [float(number % 2 and sum(ids) % 2) for number, ids in zip(numbers, completion_ids, strict=True)]


_told: list[int] = []


def stop_in_second_rollout(completion_ids: list[list[int]], trainer_state: Any, **kwargs: Any) -> list[float]:
    """A reward during which SIGTERM arrives, in step 2; once, though dynamic sampling may call it again."""
    if trainer_state.global_step == 1 and not _told:
        _told.append(signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    return accuracy_reward(completion_ids)


def interrupt_twice(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """A reward during which somebody loses patience."""
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    return accuracy_reward(completion_ids)


def begin(folder: Path, rows: Dataset, **settings: Any) -> APPOTrainer:
    """A run from its beginning to its end."""
    RunFolder.create(folder, {})
    trainer = recorded(folder, rows, **settings)
    trainer.train()
    return trainer


def recorded(
    folder: Path,
    rows: Dataset,
    *,
    rewards: Any = accuracy_reward,
    peft_config: Any = None,
    build: Callable[[], Any] = build_policy,
    **settings: Any,
) -> APPOTrainer:
    """A trainer that writes into a run folder; ``build`` makes the untrained model and its processor."""
    model, processor = build()
    args = APPOConfig(output_dir=str(folder), **{**FAST, "max_steps": 6, **EVERY_STEP, **settings})
    trainer = APPOTrainer(model, rewards, args, train_dataset=rows, processing_class=processor, peft_config=peft_config)
    Recorder(RunFolder.open(folder), trainer)
    return trainer


def killed_after(whole: Path, folder: Path, step: int) -> Path:
    """A copy of a finished run in which later checkpoints were never written; its records are longer than that."""
    shutil.copytree(whole, folder)
    for checkpoint in folder.glob("checkpoint-*"):
        if int(checkpoint.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(checkpoint)
    return folder


def go_on(folder: Path, rows: Dataset, **settings: Any) -> APPOTrainer:
    """Resume it, with random states that would show if they were not replaced."""
    trainer = recorded(folder, rows, **settings)
    random.seed(12345)
    torch.manual_seed(12345)
    trainer.train(resume_from_checkpoint=True)
    return trainer


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """Every number of metrics.jsonl that does not measure time."""
    lines = RunFolder.open(folder).read_metrics()
    return [{k: v for k, v in line.items() if k not in TIMES and not k.startswith("time/")} for line in lines]


def differences(run: APPOTrainer, reference: APPOTrainer) -> list[str]:
    """What is not equal, bit for bit, in two finished runs."""
    one, other = Path(run.args.output_dir), Path(reference.args.output_dir)
    pairs = {
        "parameters": (list(run.model.state_dict().values()), list(reference.model.state_dict().values())),
        "optimiser": (tensors_of(run.optimizer.state_dict()), tensors_of(reference.optimizer.state_dict())),
        "learning rate": (run.lr_scheduler.state_dict(), reference.lr_scheduler.state_dict()),
        "metrics": (metrics_of(one), metrics_of(other)),
        "rollouts": ((one / "rollouts.jsonl").read_bytes(), (other / "rollouts.jsonl").read_bytes()),
    }
    return [name for name, (a, b) in pairs.items() if not same(a, b)]


def tensors_of(state: Any) -> list[torch.Tensor]:
    """All tensors of an optimiser's state, in order."""
    return [value for slot in state["state"].values() for value in slot.values() if isinstance(value, torch.Tensor)]


def same(a: Any, b: Any) -> bool:
    """Equal; tensors bit for bit."""
    if isinstance(a, list) and a and isinstance(a[0], torch.Tensor):
        return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def questions(folder: Path) -> Any:
    """The embedded world's questions about seven clips."""
    return clips(folder, SEVEN)
