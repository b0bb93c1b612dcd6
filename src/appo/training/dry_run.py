"""`appo train --tiny`: what a dry run on a CPU has in the place of a file's settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from appo.models.names import SPOTLIGHT

# Two real steps of a few short responses on one core; a flag of the command line wins.
_STEPS = {
    "max_steps": "2", "num_generations": "2", "per_device_train_batch_size": "2", "gradient_accumulation_steps": "2",
    "max_completion_length": "16", "logging_steps": "1", "save_strategy": "no", "report_to": "none", "use_cpu": "true",
    "bf16": "false", "use_vllm": "false", "optim": "adamw_torch", "model_init_kwargs": "{}", "disable_tqdm": "true",
}  # fmt: skip
# Model and data, which no flag changes.
REPLACED: dict[str, Any] = {
    "model": SPOTLIGHT, "dataset": SPOTLIGHT, "annotations": None, "videos": None, "split": None, "clips": 8,
    "video_min_pixels": None, "video_max_pixels": None, "image_max_pixels": None,
    "load_in_4bit": False, "load_in_8bit": False,
}  # fmt: skip


def shrunk(arguments: Sequence[str]) -> list[str]:
    """The arguments of ``appo train`` behind those of a dry run.

    Raises:
        ValueError: they set what a dry run replaces.
    """
    if clash := [name for name in REPLACED if f"--{name}" in arguments]:
        raise ValueError(f"--tiny sets {clash[0]} itself: leave out --{clash[0]} or --tiny")
    return [*(word for name, value in _STEPS.items() for word in (f"--{name}", value)), *arguments]
