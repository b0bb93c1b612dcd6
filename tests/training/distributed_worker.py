"""Short training runs as one of several processes (or the only one), with what they logged and ended with in files.

Called by tests/test_distributed*.py, one operating-system process a rank: ``python distributed_worker.py '[{...}]'``.
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
from datasets import Dataset
from PIL import Image

import appo.training.trl_engine
from appo.rollout.generation import respond
from appo.world import load_annotations, load_policy
from tests.support import runs
from tests.support.runs import accuracy_reward, make_trainer, rows_of


def sample_by_prompt(model: Any, pad: int, prompts: Any, responses: int, **generation: Any) -> Any:
    """Real sampling whose chance depends on the prompt alone, so that it does not matter which process does it."""
    groups = []
    for prompt in prompts:
        with torch.random.fork_rng():
            torch.manual_seed(zlib.crc32(prompt.ids_1P.numpy().tobytes()))
            groups += respond(model, pad, [prompt], responses, **generation)
    return groups


def shard_on_cpu(*, load_once: bool) -> None:
    """accelerate reads FSDP settings on accelerators only; torch's own FSDP2 shards on CPU just as well.

    As in recipes/accelerate/fsdp2.yaml, transformers names the classes of the units: decoder layer and vision block.
    """
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=load_once
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


def prompt(question: str, *parts: dict[str, Any]) -> dict[str, Any]:
    """A row that shows these parts."""
    content = [*parts, {"type": "text", "text": question}]
    return {"id": question, "prompt": [{"role": "user", "content": content}], "answer": "", "kind": ""}


def dataset_of(kind: str, clips: Path) -> Dataset:
    """The rows of a run, in the order of their global batches: the first half of a batch goes to process 0."""
    questions = load_annotations(clips)
    if kind == "clips":
        return rows_of(questions)
    videos = [{"type": "video", "video": question.video.path} for question in questions]
    pictures = []
    for number in range(4):
        file = clips / f"{number}.png"
        Image.new("RGB", (56, 56 * (1 + number % 2)), (60 * number, 200, 255 - 60 * number)).save(file)
        pictures.append({"type": "image", "image": str(file)})
    rows = {
        "video, text": [
            prompt("what colour ?", videos[0]),
            prompt("which ?"),
            prompt("when ?", videos[1]),
            prompt("what ?"),
        ],
        "text, picture": [
            prompt("which ?"),
            prompt("when ?", pictures[0]),
            prompt("what ?"),
            prompt("which first ?", pictures[1]),
        ],
        "picture and video, text": [
            prompt("what colour ?", pictures[0], videos[0]),
            prompt("which ?"),
            prompt("when ?", pictures[1], videos[1]),
            prompt("what ?"),
        ],
        "same video twice": [
            prompt("what colour ?", videos[0]),
            prompt("when ?", videos[0]),
            prompt("what ?", videos[1]),
            prompt("which ?", videos[2]),
        ],
    }
    return Dataset.from_list(rows[kind])


def changed_policy(*, first_process_only: bool) -> tuple[Any, Any]:
    """A policy that is no longer what its folder holds; it may be so in the first process, and empty in the others."""
    model, processor = load_policy()
    empty = first_process_only and not PartialState().is_main_process
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.0 if empty else 0.9)
    return model, processor


def main(tasks: list[dict[str, Any]]) -> None:
    """Train as told, one run after the other, and write what came of each, from the first process."""
    if tasks[0]["sharding"] == "fsdp2":
        shard_on_cpu(load_once="loaded once" in tasks[0]["policy"])
    if tasks[0]["sharding"] == "deepspeed":
        deepspeed_on_cpu()
    for task in tasks:
        appo.training.trl_engine.respond = sample_by_prompt if task["sampling"] == "by prompt" else respond
        train(task)


def train(task: dict[str, Any]) -> None:
    """One run."""
    if "changed" in task["policy"]:
        runs.build_policy = lambda seed: changed_policy(first_process_only="loaded once" in task["policy"])
    rewards = reward_of_process_one if task["rewards"] == "of process 1" else accuracy_reward
    rows = dataset_of(task["rows"], Path(task["clips"]))
    trainer = make_trainer(Path(task["output"]) / "run", rows, rewards=rewards, **task["settings"])
    groups: list[list[str]] = []
    trainer.on_rollout = lambda step, scored: groups.append([one.row["id"] for one in scored])
    trainer.train()
    parameters = list(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    result = {
        "log": trainer.state.log_history,
        "groups": gather_object([groups]),
        "sharded": sum(hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id") for _, parameter in parameters),
        "parameters": {name: whole(parameter) for name, parameter in parameters},
    }
    # Of parameters that are not sharded each process has its own copy.
    sums = gather_object([float(sum(value.double().abs().sum() for value in result["parameters"].values()))])
    assert len(set(sums)) == 1, f"the processes ended with different parameters: {sums}"
    if PartialState().is_main_process:
        torch.save(result, Path(task["output"]) / "result.pt")
    PartialState().wait_for_everyone()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
