"""One group's update at true size on a CPU: Qwen2.5-VL-3B, LoRA and checkpointing, packed and as ordinary rows.

    nohup python benchmarks/true_size.py --threads 2 &      # an hour on two CPU cores, 19 GB of free memory
    python benchmarks/true_size.py --parts packed inside    # some of it

The model has its published configuration (3.75 billion parameters, 151 936 words) and random weights in float32;
adapters are those of recipes/seed-bench-r1-3b-lora.yaml. A group is a video of 16 sampled frames, 64 tokens each two of
them, and G responses. Every part runs once, in a process of its own that builds the model, and is written to the JSON
when it is done; parts that are there already are not run again.

packed           the trainer's path with the pixels encoded once: scoring, capture, weights, packed update
inside           the same where the update's own forward pass gives log-probabilities, frame attention and weights
rows             what a stock trainer would run if it carried the video: G micro-batches of one row, pixels each time
generate-once    a few tokens of G responses from one prefill (the trainer's path)
generate-copies  the same from G copies of the prompt with its pixels (stock)
"""

from __future__ import annotations

import harness  # first: it sets OpenMP's waiting before torch loads

# isort: split
import argparse
import copy
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, inject_adapter_in_model
from shapes import SHAPES, config_of
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration
from trl.trainer.utils import add_fused_lm_head
from updates import CAPTURE_LAYERS, Cell, GroupUpdate

from appo.experiments.plan.architecture import VideoShape
from appo.experiments.plan.memory import CPU, Run
from appo.experiments.plan.phases import phases
from appo.models.checkpointing_names import quiet
from appo.models.families import family_of, use_pretrained_positions
from appo.models.log_probs import score_group
from appo.training.lora import LANGUAGE_LAYERS

RANK, ALPHA = 64, 128  # of the recipe
TILE = 4_194_319  # random numbers that fill all matrices, over and over; a prime, so that no two rows are alike
PROJECTIONS = 4  # random directions along which gradients are compared
SPARE = 1.5e9  # bytes beyond the plan's peak that must be free: libraries and the allocator's gaps


# --- the model -------------------------------------------------------------------------------------------------------


def build(name: str, seed: int) -> Any:
    """A random model with adapters on its language model, checkpointing on; 15 GB are filled in seconds."""
    config = config_of(SHAPES[name])
    config._attn_implementation = "sdpa"
    with init_empty_weights(include_buffers=False):
        model: Any = Qwen2_5_VLForConditionalGeneration(config)
    model.tie_weights()
    tile = 0.02 * torch.randn(TILE, generator=torch.Generator().manual_seed(seed))
    for path, parameter in list(model.named_parameters()):
        module, leaf = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        setattr(module, leaf, nn.Parameter(filled(parameter.shape, leaf, tile), requires_grad=False))
    model.tie_weights()
    model.generation_config.pad_token_id = 0
    torch.manual_seed(seed)
    adapters = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LANGUAGE_LAYERS, task_type="CAUSAL_LM")
    inject_adapter_in_model(adapters, model)
    for path, parameter in model.named_parameters():
        if "lora_B" in path:  # zero at first, which would leave the other matrix without a gradient
            nn.init.normal_(parameter, std=0.01)
    model.train()
    with quiet():
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    return use_pretrained_positions(model)


def filled(shape: torch.Size, leaf: str, tile: Tensor) -> Tensor:
    """Norms are 1, biases 0, matrices the tile repeated."""
    if len(shape) == 1:
        return torch.ones(shape) if leaf == "weight" else torch.zeros(shape)
    values = torch.empty(math.prod(shape))
    for part in values.split(len(tile)):
        part.copy_(tile[: len(part)])
    return values.view(shape)


# --- the parts -------------------------------------------------------------------------------------------------------


class Group(GroupUpdate):
    """A group whose gradients stay after its one update, and whose log-probabilities are summed."""

    def __init__(self, args: argparse.Namespace, tokens: int) -> None:
        model = build(args.model, args.seed)
        super().__init__(model, Cell(args.prompt, tokens, args.group), "cpu", args.seed)
        model.zero_grad = lambda **_: None
        self.log_prob_sum, self.crucial_frames = 0.0, None

    def _loss(self, log_probs: Tensor, advantages_G: Tensor) -> Tensor:  # type: ignore[override]
        self.log_prob_sum += float(log_probs.detach().sum())
        return super()._loss(log_probs, advantages_G)

    def encode(self) -> None:
        """The trainer runs the frozen vision tower once a rollout."""
        self.prompt = family_of(self.model).encode_vision(self.prompt)

    def weights(self, scores: Any) -> Any:
        """Token weights; how many frames were crucial decides what they cost."""
        weights = super().weights(scores)
        self.crucial_frames = int(weights.crucial_F.sum())
        return weights

    def row(self, number: int) -> None:
        """One response's micro-batch of one row, with the pixels."""
        one = copy.copy(self)
        one.responses = self.responses[number : number + 1]
        one.advantages_G = self.advantages_G[number : number + 1]
        one.rows("sdpa", grad=True, rows_per_call=1)
        self.log_prob_sum = one.log_prob_sum

    def update_with_capture(self) -> None:
        """Forward with capture, weights, backward: no scoring pass."""
        self._use("appo")
        scores = score_group(self.model, self.prompt, self.responses, capture_layers=CAPTURE_LAYERS)
        weights_GN = self.weights(scores).weights_GN
        log_probs_GN = scores.log_probs_GN
        self.log_prob_sum += float(log_probs_GN.detach().sum())
        ratio_GN = (log_probs_GN - log_probs_GN.detach()).exp()
        (-(ratio_GN * self.advantages_G[:, None] * weights_GN).sum()).backward()


class Meter:
    """Seconds of named calls, and the peak of resident memory in them beyond what libraries held before the model."""

    def __init__(self) -> None:
        self._libraries = harness.reset_high_water_mark()
        self.times: dict[str, Any] = {}
        self.peak_bytes: dict[str, int] = {}

    def __call__(self, name: str, *calls: Callable[[], Any]) -> None:
        """Measure calls one after another under one name."""
        harness.reset_high_water_mark()
        timed = harness.Timed(lambda: None)
        for timed.call in calls:
            timed.measure("cpu")
            print(f"{name}: {timed.seconds[-1]:.0f} s", file=sys.stderr, flush=True)
        self.times[name] = {"seconds": sum(timed.seconds), "processor_seconds": sum(timed.processor_seconds)}
        if len(calls) > 1:
            self.times[name]["each"] = timed.seconds
        self.peak_bytes[name] = harness.high_water_mark() - self._libraries


def packed(args: argparse.Namespace, meter: Meter) -> Group:
    """Scoring with and without capture, weights and the packed update."""
    group, state = Group(args, args.tokens), {}

    def score() -> None:
        state["scores"] = group.score(CAPTURE_LAYERS)

    meter("vision", group.encode)
    meter("score", lambda: group.score(0))
    meter("score+capture", score)
    meter("weights", lambda: group.weights(state["scores"]))
    meter("update", lambda: group.packed(grad=True))
    return group


def inside(args: argparse.Namespace, meter: Meter) -> Group:
    """The update with capture and weights between forward and backward."""
    group = Group(args, args.tokens)
    meter("vision", group.encode)
    meter("update+capture+weights", group.update_with_capture)
    return group


def rows(args: argparse.Namespace, meter: Meter) -> Group:
    """G micro-batches."""
    group = Group(args, args.tokens)
    meter("update", *(lambda number=number: group.row(number) for number in range(args.group)))
    return group


def generate_once(args: argparse.Namespace, meter: Meter) -> Group:
    """Vision tower and prompt once."""
    group = Group(args, args.new_tokens)
    meter("vision", group.encode)
    meter("generate", group.generate_once_read)
    return group


def generate_copies(args: argparse.Namespace, meter: Meter) -> Group:
    """Vision tower and prompt G times."""
    group = Group(args, args.new_tokens)
    meter("generate", lambda: group.generate("sdpa", rows_per_call=args.group))
    return group


PARTS: dict[str, Callable[[argparse.Namespace, Meter], Group]] = {
    "packed": packed,
    "inside": inside,
    "generate-once": generate_once,
    "rows": rows,
    "generate-copies": generate_copies,
}


def run_part(args: argparse.Namespace) -> dict[str, Any]:
    """One part, in this process."""
    meter, started = Meter(), time.time()
    group = PARTS[args.part](args, meter)
    found = {"times": meter.times, "peak_bytes": meter.peak_bytes, "load_average": list(os.getloadavg())}
    if group.log_prob_sum:
        found["mean_log_prob"] = str(group.log_prob_sum / (args.group * args.tokens))
        found["crucial_frames"] = group.crucial_frames
        found["gradient"] = fingerprint(group.model)
    return found | {"seconds_with_building": time.time() - started}


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """The gradient's norm, and its projections on random directions, by which another one's distance is estimated."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    square, along = 0.0, [0.0] * PROJECTIONS
    for number, parameter in enumerate(trained):
        assert parameter.grad is not None, "every adapter is trained"
        square += float(parameter.grad.double().square().sum())
        for which in range(PROJECTIONS):
            generator = torch.Generator().manual_seed(PROJECTIONS * number + which)
            direction = torch.randn(parameter.shape, generator=generator)
            along[which] += float((parameter.grad * direction).sum(dtype=torch.float64))
    return {"norm": str(math.sqrt(square)), "projections": [str(value) for value in along], "tensors": len(trained)}


def gradient_distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Relative to the norm. Along a random normal direction a vector's variance is its squared length."""
    pairs = zip(one["projections"], other["projections"], strict=True)
    square = sum((float(a) - float(b)) ** 2 for a, b in pairs) / PROJECTIONS
    return math.sqrt(square) / float(one["norm"])


# --- what they say together ------------------------------------------------------------------------------------------


def plan(args: argparse.Namespace) -> dict[str, int]:
    """What `appo plan` says the phases need, without an optimiser, in float32 on a CPU."""
    shape = SHAPES[args.model]
    side = 16 if args.prompt >= 128 else 4  # patches of a frame's side in `prompt_of`
    tokens = args.prompt - 64 if args.prompt >= 128 else 4 * ((args.prompt - args.prompt // 2) // 4)
    frames = tokens * 4 // side**2
    run = Run(
        architecture=shape,
        video=VideoShape(frames, 14 * side, 14 * side, 4 * tokens, tokens),
        prompt_text_tokens=args.prompt - tokens,
        num_generations=args.group,
        max_completion_length=args.tokens,
        prompts_per_gpu=1,
        dtype="fp32",
        optimizer="sgd",
        gpus=1,
        lora_r=RANK,
        capture_layers=CAPTURE_LAYERS,
        kernels=CPU,
    )
    return {phase.name: phase.total for phase in phases(run)}


def summary(parts: dict[str, Any], planned: dict[str, int]) -> dict[str, Any]:
    """Ratios and shares of the parts that are there."""
    found: dict[str, Any] = {}
    for clock in ("seconds", "processor_seconds"):
        cost = {f"{part}/{name}": time[clock] for part, one in parts.items() for name, time in one["times"].items()}
        found[clock] = {name: value for name, value in _quotients(cost).items() if value is not None}
    if "packed" in parts:
        peak = parts["packed"]["peak_bytes"]
        found["plan"] = {
            "score: predicted by measured": planned["score"] / peak["score+capture"],
            "update: predicted by measured": planned["update"] / peak["update"],
        }
    if {"packed", "rows"} <= parts.keys():
        one, other = parts["rows"], parts["packed"]
        found["packed against rows"] = {
            "gradient, relative distance": gradient_distance(one["gradient"], other["gradient"]),
            "mean log-probability, difference": abs(float(one["mean_log_prob"]) - float(other["mean_log_prob"])),
        }
    return found


def _quotients(cost: dict[str, float]) -> dict[str, float | None]:
    def total(*names: str) -> float:
        return sum(cost.get(name, math.nan) for name in names)

    today = total("packed/vision", "packed/score+capture", "packed/weights", "packed/update")
    within = total("inside/vision", "inside/update+capture+weights")
    found = {
        "rows : packed update": total("rows/update") / total("packed/vision", "packed/update"),
        "rows : scoring, capture, weights, packed update": total("rows/update") / today,
        "rows : packed update with capture inside": total("rows/update") / within,
        "capture inside : packed update alone": within / total("packed/vision", "packed/update"),
        "share of the scoring pass": total("packed/score") / today,
        "share of capture": (total("packed/score+capture") - total("packed/score")) / today,
        "share of weights": total("packed/weights") / today,
        "generate: copies : once": total("generate-copies/generate")
        / total("generate-once/vision", "generate-once/generate"),
    }
    return {name: None if math.isnan(value) else value for name, value in found.items()}


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    rows = [
        [f"{part}: {name}", f"{time['seconds']:.1f} s", f"{time['processor_seconds']:.1f} s",
         f"{one['peak_bytes'][name] / harness.GB:.2f} GB"]
        for part, one in result["parts"].items() for name, time in one["times"].items()
    ]  # fmt: skip
    harness.print_table("One group", ["", "wall", "processor", "peak memory with weights"], rows)
    flat = [[f"{kind}: {name}", harness.shown(value, "", 4)] for kind, one in result["summary"].items()
            for name, value in one.items()]  # fmt: skip
    harness.print_table("Together", ["", ""], flat)


# --- the command -----------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = harness.base_parser(__doc__ or "", "true_size")
    parser.add_argument("--model", choices=sorted(SHAPES), default="qwen2.5-vl-3b")
    parser.add_argument("--prompt", type=int, default=576, help="P: 64 of text, 64 a frame")
    parser.add_argument("--tokens", type=int, default=32, help="N")
    parser.add_argument("--group", type=int, default=8, help="G")
    parser.add_argument("--new-tokens", type=int, default=4, help="of each response where it is generated")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--in-process", action="store_true", help="no fresh processes (peak memory is less exact)")
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def check_memory(planned: dict[str, int]) -> None:
    """Refuse to start where the model would not fit. The system would end another process instead."""
    needed, free = max(planned.values()) + SPARE, harness.available_memory()
    if free < needed:
        raise SystemExit(f"{needed / harness.GB:.1f} GB of free memory are needed, {free / harness.GB:.1f} GB are there")


def fresh_process(part: str, argv: Sequence[str]) -> dict[str, Any]:
    """Run one part in a process of its own; what it says on the way is shown."""
    command = [sys.executable, __file__, *argv, "--part", part]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure what is not in the JSON yet, print the tables; returns what was written."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse(argv)
    harness.prepare(args)
    if args.part:
        print(json.dumps(run_part(args)))
        return {}
    settings = {key: getattr(args, key) for key in ("model", "prompt", "tokens", "group", "new_tokens", "seed")}
    earlier = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {"settings": settings}
    if earlier["settings"] != settings:
        raise SystemExit(f"{args.output} has other settings; choose another --output")
    planned = plan(args)
    result = {**harness.provenance(args, argv), "settings": settings, "lora_r": RANK, "planned_bytes": planned}
    result |= {"parts": earlier.get("parts", {}), "summary": {}}
    for part in [name for name in args.parts if name not in result["parts"]]:
        check_memory(planned)
        print(part, file=sys.stderr, flush=True)
        one = argparse.Namespace(**vars(args) | {"part": part})
        result["parts"][part] = run_part(one) if args.in_process else fresh_process(part, argv)
        result["summary"] = summary(result["parts"], planned)
        harness.write_json(args.output, result)
    result["summary"] = summary(result["parts"], planned)
    show(result)
    return result


if __name__ == "__main__":
    main()
