"""Short real training runs on the embedded world with an untrained policy: shared by the trainer's tests."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from datasets import Dataset
from recipes.tiny_policy.build import build_policy

from appo import APPOConfig, APPOTrainer
from appo.rewards.templates import build_messages
from appo.types import VideoQA
from appo.world import generate

FAST = {
    "num_generations": 4,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_completion_length": 8,
    "max_steps": 5,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "seed": 1,
}


def accuracy_reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """An untrained policy is never right: reward something about its tokens, so that groups are mixed."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def rows_of(questions: list[VideoQA]) -> Dataset:
    return Dataset.from_list(
        [
            {"id": qa.id, "prompt": build_messages(qa, instruction=""), "answer": qa.answer, "kind": qa.kind}
            for qa in questions
        ]
    )


@cache
def clips(folder: Path, count: int = 6) -> list[VideoQA]:
    return generate(folder, "L1", count, 0)


def make_trainer(output: Path, dataset: Dataset, *, rewards: Any = accuracy_reward, **settings: Any) -> APPOTrainer:
    model, processor = build_policy(0)
    args = APPOConfig(output_dir=str(output), **{**FAST, **settings})
    return APPOTrainer(model, rewards, args, train_dataset=dataset, processing_class=processor)


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]
