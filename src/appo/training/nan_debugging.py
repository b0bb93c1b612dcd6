"""`appo replay`: the step that was not applied, once more from the same weights and batch: where is it not finite?

Shape suffixes: B rows = Q groups x G responses, N response tokens (padded).
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor, nn

from appo.models.loading import load_model
from appo.training.config import APPOConfig
from appo.training.fault_tolerance import REPLAY_FILE, REPLAYS, TENSOR, TUPLE
from appo.training.trainer import APPOTrainer
from appo.training.trainer_state import as_saved


@dataclass(frozen=True)
class Replay:
    """A step that was stopped."""

    folder: Path  # where it lies
    step: int  # optimiser steps done before
    problem: str  # what was not finite, and in which processes
    settings: dict[str, Any]  # all settings of training
    dtype: str  # of the weights
    accumulation: int  # micro-batches in a whole step; those behind the one that was stopped at are not there
    batches: list[dict[str, Any]]  # micro-batches of one process


def read_replay(run: Path, rank: int = 0) -> Replay:
    """The last step of a run that was stopped.

    Raises:
        OSError, ValueError: there is none, or no such process; one line.
    """
    steps = sorted((run / REPLAYS).glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    if not steps:
        raise FileNotFoundError(
            f"{run}: nothing to replay; {REPLAYS}/ is written when a loss or gradient is not finite"
        )
    folder = steps[-1]
    data = json.loads((folder / REPLAY_FILE).read_text(encoding="utf-8"))
    if not 0 <= rank < len(data["processes"]):
        raise ValueError(f"{folder}: there is no process {rank}, choose from 0 to {len(data['processes']) - 1}")
    tensors = load_file(folder / f"batch-{rank}.safetensors")
    batches = as_saved(_untree(data["processes"][rank], tensors))
    names = ("step", "problem", "settings", "dtype", "accumulation")
    return Replay(folder, **{name: data[name] for name in names}, batches=batches)


def _untree(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_untree(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if TENSOR in value:
        return tensors[value[TENSOR]]
    if TUPLE in value:
        return tuple(_untree(item, tensors) for item in value[TUPLE])
    return {key: _untree(item, tensors) for key, item in value.items()}


# -- running it again ----------------------------------------------------------------------------------------------

# What a replay neither needs nor should do; everything else is as in the run.
_OVERRIDES: dict[str, Any] = {
    "report_to": "none", "save_strategy": "no", "eval_strategy": "no", "push_to_hub": False, "hub_token": None,
    "use_vllm": False, "beta": 0.0, "deepspeed": None, "fsdp": "", "fsdp_config": None, "reward_weights": None,
    "overlong_cache": 0, "generation_batch_size": None, "resume_from_checkpoint": None, "model_init_kwargs": None,
    "disable_tqdm": True, "accelerator_config": None, "load_best_model_at_end": False, "frame_cache": None,
    "log_completions": False,
}  # fmt: skip


@dataclass(frozen=True)
class GroupFigures:
    """One group of a micro-batch.

    Attributes:
        bad: how many of its response tokens have a number that is not finite, by what is not: ``advantage`` (weighted),
            ``old log-prob``, ``log-prob``.
    """

    tokens: int  # of all its responses
    largest_advantage: float  # weighted, without its sign, of those that are finite
    bad: dict[str, int]
    first: tuple[str, int, int] | None  # the first such number: what, in which response, at which token


@dataclass
class MicroBatch:
    """One forward and backward pass of the step: its loss, its groups, and the first module that said something not
    finite ("" for none)."""

    loss: float
    groups: list[GroupFigures]
    module: str


@dataclass
class Findings:
    """What a replay found."""

    replay: Replay  # what was replayed
    weights: list[str]  # names of parameters that are not finite before the step
    micro_batches: list[MicroBatch] = field(default_factory=list)  # in order
    gradient_norm: float = 0.0  # of this process's batch
    gradients: list[str] = field(default_factory=list)  # names of parameters whose gradient is not finite

    @property
    def reproduced(self) -> bool:
        """Whether anything is not finite here, too."""
        return not math.isfinite(self.gradient_norm) or not all(math.isfinite(one.loss) for one in self.micro_batches)

    def lines(self) -> Iterator[str]:
        """For people."""
        yield f"{self.replay.folder}: {self.replay.problem}"
        if self.weights:
            yield f"weights before the step that are not finite: {_some(self.weights)}"
        for number, one in enumerate(self.micro_batches, start=1):
            yield f"micro-batch {number}: loss {one.loss:g}"
            for q, group in enumerate(one.groups):
                bad = ", ".join(f"{name} of {count}" for name, count in group.bad.items() if count)
                size = f"advantages up to {group.largest_advantage:g}"
                yield f"  group {q}: {group.tokens} tokens, {size}, not finite: {bad or 'none'}"
                if group.first:
                    name, response, token = group.first
                    yield f"    first: {name} of response {response}, token {token}"
            if one.module:
                yield f"  first module with an output that is not finite: {one.module}"
        yield f"gradient norm: {self.gradient_norm:g}" + (
            f"; gradients that are not finite: {_some(self.gradients)}" if self.gradients else ""
        )
        if not self.reproduced:
            yield (
                "everything is finite here: the cause is not in the saved weights and batch (another process's batch, "
                "see --process; hardware; or code outside of the policy)"
            )


def replay(run: Path, rank: int = 0) -> Findings:
    """Run the step that `run` did not apply again, as far as one process did it, and find out where it goes wrong.

    Weights, micro-batches and settings are those of the run; adapters are merged into their base, and whatever else
    the run had attached to the policy (hooks, compilation, sharding) is not there.

    Args:
        run: a run's folder.
        rank: the process whose batch is replayed.

    Raises:
        OSError, ValueError: there is nothing to replay; one line.
    """
    saved = read_replay(run, rank)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(saved, folder)
        model = trainer.model
        findings = Findings(saved, [n for n, p in model.named_parameters() if not bool(torch.isfinite(p).all())])
        for batch in saved.batches:
            findings.micro_batches.append(_pass(trainer, send_to_device(batch, trainer.accelerator.device)))
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        norms = [gradient.float().norm() for gradient in gradients.values()]
        findings.gradient_norm = float(torch.stack(norms).norm()) if norms else 0.0
        findings.gradients = [name for name, gradient in gradients.items() if not bool(torch.isfinite(gradient).all())]
    return findings


class _ReplayTrainer(APPOTrainer):
    """Takes its batches as they are, notes their losses and stops at nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.losses: list[float] = []
        super().__init__(*args, **kwargs)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        return generation_batch

    def _assert_finite(self, name: str, value: Any) -> None:
        self.losses.append(float(value.detach()))


def _trainer(saved: Replay, folder: str) -> _ReplayTrainer:
    names = {one.name for one in dataclasses.fields(APPOConfig) if one.init}
    settings = {name: value for name, value in saved.settings.items() if name in names} | _OVERRIDES
    settings |= {"output_dir": folder, "use_cpu": not torch.cuda.is_available()}
    model, processor = load_model(saved.folder / "policy", dtype=saved.dtype)
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "?"}]}])
    trainer = _ReplayTrainer(model, _no_reward, APPOConfig(**settings), train_dataset=rows, processing_class=processor)
    # Of these settings the loss reads what they say, and needs nothing of what they would set up.
    trainer.use_vllm, trainer.beta = saved.settings["use_vllm"], saved.settings["beta"]
    trainer.current_gradient_accumulation_steps = saved.accumulation
    return trainer


def _no_reward(completions: Any, **kwargs: Any) -> list[float]:
    return [0.0] * len(completions)


def _pass(trainer: _ReplayTrainer, batch: dict[str, Any]) -> MicroBatch:
    seen: list[Tensor] = []
    compute = trainer._get_per_token_logps_and_entropies

    def remembering(*args: Any, **kwargs: Any) -> Any:
        result = compute(*args, **kwargs)
        seen.append(result[0].detach())
        return result

    trainer._get_per_token_logps_and_entropies = remembering
    try:
        with _first_bad_output(trainer.model) as module:
            trainer.training_step(trainer.model, batch, None)
    finally:
        trainer._get_per_token_logps_and_entropies = compute
    return MicroBatch(trainer.losses[-1], _figures(batch, seen[-1]), "".join(module[:1]))


def _figures(batch: Mapping[str, Any], log_probs_BN: Tensor) -> list[GroupFigures]:
    mask = batch["completion_mask"]
    mask_QGN = mask.bool() if mask.ndim == 3 else mask.bool()[:, None]
    numbers = {
        "advantage": batch["advantages"].reshape(*mask_QGN.shape[:2], -1).expand(mask_QGN.shape),
        "old log-prob": batch.get("old_per_token_logps"),
        "log-prob": log_probs_BN,
    }
    bad = {
        name: ~torch.isfinite(values.reshape(mask_QGN.shape)) & mask_QGN
        for name, values in numbers.items()
        if values is not None
    }
    sizes = numbers["advantage"].abs().masked_fill(bad["advantage"] | ~mask_QGN, 0)
    figures = []
    for q in range(len(mask_QGN)):
        places = ((name, where[q].nonzero()) for name, where in bad.items())
        first = next(((name, *place[0].tolist()) for name, place in places if len(place)), None)
        counts = {name: int(where[q].sum()) for name, where in bad.items()}
        figures.append(GroupFigures(int(mask_QGN[q].sum()), float(sizes[q].max()), counts, first))
    return figures


@contextmanager
def _first_bad_output(model: nn.Module) -> Iterator[list[str]]:
    """Names of modules whose outputs are not finite, in the order in which they are done: inner ones first."""
    found: list[str] = []

    def watching(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not all(bool(torch.isfinite(one).all()) for one in _floats(output)):
                found.append(name)

        return hook

    handles = [module.register_forward_hook(watching(name)) for name, module in model.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _floats(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _floats(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _floats(value)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
