"""A short training run as one of several processes (or the only one), with what it logged and ended with in a file.

Called by tests/test_distributed.py, one operating-system process a rank: ``python distributed_worker.py '{...}'``.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, gather_object

import appo.trainer
from appo.rollout import respond
from appo.spotlight import load_annotations
from runs import accuracy_reward, make_trainer, rows_of


def sample_by_prompt(model: Any, pad: int, prompts: Any, responses: int, **generation: Any) -> Any:
    """Real sampling whose chance depends on the prompt alone, so that it does not matter which process does it."""
    groups = []
    for prompt in prompts:
        with torch.random.fork_rng():
            torch.manual_seed(zlib.crc32(prompt["input_ids"].numpy().tobytes()))
            groups += respond(model, pad, [prompt], responses, **generation)
    return groups


def shard_on_cpu() -> None:
    """accelerate reads FSDP settings on accelerators only; torch's own FSDP2 shards on CPU just as well."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Qwen2_5_VLDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    start = AcceleratorState.__init__

    def sharded(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        self._shared_state["distributed_type"] = DistributedType.FSDP
        self._shared_state["fsdp_plugin"] = plugin

    AcceleratorState.__init__ = sharded  # type: ignore[method-assign]


def deepspeed_on_cpu() -> None:
    """accelerate starts DeepSpeed on accelerators only; DeepSpeed itself has a CPU backend."""
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter as one tensor, wherever its shards are. Every process must ask."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.full_tensor().detach() if hasattr(parameter, "full_tensor") else parameter.detach()


def reward_of_process_one(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Process 0 finds all its groups flat and replaces them; process 1 has nothing to replace."""
    mixed = PartialState().process_index == 1
    return [float(mixed and number % 2) for number in range(len(completion_ids))]


def main(task: dict[str, Any]) -> None:
    """Train as told and write what came of it, from the first process."""
    if task["sharding"] == "fsdp2":
        shard_on_cpu()
    if task["sharding"] == "deepspeed":
        deepspeed_on_cpu()
    if task["sampling"] == "by prompt":
        appo.trainer.respond = sample_by_prompt
    questions = load_annotations(Path(task["clips"]))
    rewards = reward_of_process_one if task["rewards"] == "of process 1" else accuracy_reward
    trainer = make_trainer(Path(task["output"]) / "run", rows_of(questions), rewards=rewards, **task["settings"])
    groups: list[list[str]] = []
    trainer.on_rollout = lambda step, scored: groups.append([one.samples[0].row["id"] for one in scored])
    trainer.train()
    parameters = list(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    result = {
        "log": trainer.state.log_history,
        "groups": gather_object([groups]),
        "sharded": sum(hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id") for _, parameter in parameters),
        "parameters": {name: whole(parameter) for name, parameter in parameters},
    }
    if PartialState().is_main_process:
        torch.save(result, Path(task["output"]) / "result.pt")
    PartialState().wait_for_everyone()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
