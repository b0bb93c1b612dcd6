"""A run that does not fit into memory: one line that names the settings which lower what it needs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from appo.training.config import APPOConfig

_CPU = re.compile(r"not enough memory|DefaultCPUAllocator")  # torch has no class for it
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+) ?([KMGT]i?B|bytes)")


class TooLittleMemoryError(ValueError):
    """A run asked for more memory than there is. One line with the settings that lower it."""


@contextmanager
def named_memory_errors(config: APPOConfig) -> Iterator[None]:
    """Turn what GPUs, torch and Python raise where memory ends into one line.

    Raises:
        TooLittleMemoryError: in their place.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not _CPU.search(str(error)):
            raise
        asked = _ASKED.search(str(error))
        size = f" ({_size(*asked.groups())} more were asked for)" if asked else ""
        what = ", ".join(remedies(config)) or "the size of the model"
        raise TooLittleMemoryError(
            f"out of memory{size}: change, in this order, {what}; what fits: appo plan"
        ) from error


def remedies(config: APPOConfig) -> list[str]:
    """Settings that can still be lowered, with their present values, in the order to try them (not in the paper)."""
    sampled = config.method != "sft"
    group = config.num_generations if sampled else 1
    chunk, rows = config.rows_per_chunk, config.per_device_train_batch_size
    found = {
        f"rows_per_chunk ({chunk or f'0: all {group} at once'})": sampled and config.shared_prefix and chunk != 1,
        f"per_device_train_batch_size ({rows}, with more gradient_accumulation_steps)": rows > group,
        f"vllm_gpu_memory_utilization ({config.vllm_gpu_memory_utilization:g})": sampled and config.use_vllm,
        f"video_max_frames ({config.video_max_frames})": config.video_max_frames > config.video_min_frames,
        f"max_completion_length ({config.max_completion_length})": sampled,
        "gradient_checkpointing (false: set it to true)": not config.gradient_checkpointing,
    }
    return [remedy for remedy, helps in found.items() if helps]


def _size(number: str, unit: str) -> str:
    return f"{int(number) / 1e9:.2f} GB" if unit == "bytes" else f"{number} {unit}"
