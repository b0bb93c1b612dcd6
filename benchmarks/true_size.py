"""One group's update at true size on a CPU: Qwen2.5-VL-3B, LoRA and checkpointing, packed and as ordinary rows.

    nohup python benchmarks/true_size.py --threads 2 &      # an hour on two CPU cores, 19 GB of free memory

The model has its published configuration (3.75 billion parameters, 151 936 words) and random weights in float32;
adapters are those of recipes/seed-bench-r1-3b-lora.yaml. A group is a video of 16 sampled frames, 64 tokens each two of
them, and G responses. Every part runs once, in a process of its own that builds the model, and is written to the JSON
when it is done; parts that are there already are not run again.

packed           the trainer's path, pixels encoded once: a packed update (DAPO); the scoring pass, capture and weights
inside           APPO with one update per rollout: captured and weighed between the packed update's forward and backward
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
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from shapes import RANK, SHAPES, build_adapted, prompt_of, skeleton
from torch import Tensor, nn
from trl.trainer.utils import add_fused_lm_head
from updates import CAPTURE_LAYERS, Cell, GroupUpdate

from appo.experiments.plan.architecture import VideoShape
from appo.experiments.plan.memory import CPU, Run
from appo.experiments.plan.phases import phases
from appo.models.families import family_of

PROJECTIONS = 4  # random directions along which gradients are compared
SPARE = 1.5e9  # bytes beyond the plan's peak that must be free: libraries and the allocator's gaps


# --- the parts -------------------------------------------------------------------------------------------------------


class Group(GroupUpdate):
    """A group whose gradients stay after its one update, and whose log-probabilities are summed."""

    log_prob_sum, crucial_frames = 0.0, None
    scores: Any = None

    def encode(self) -> None:
        """The trainer runs the frozen vision tower once a rollout."""
        self.prompt = family_of(self.model).encode_vision(self.prompt)

    def capture(self) -> None:
        """The scoring pass of the weights."""
        self.scores = self.score(CAPTURE_LAYERS)

    def weights(self, scores: Any) -> Any:
        """Token weights; how many frames were crucial decides what they cost."""
        weights = super().weights(scores)
        self.crucial_frames = int(weights.crucial_F.sum())
        return weights

    def part(self, rows: slice) -> Group:
        """The group of some of its responses."""
        one = copy.copy(self)
        one.responses, one.advantages_G = self.responses[rows], self.advantages_G[rows]
        return one

    def row(self, number: int) -> None:
        """One response's micro-batch of one row, with the pixels."""
        one = self.part(slice(number, number + 1))
        one.rows("sdpa", grad=True, rows_per_call=1)
        self.log_prob_sum = one.log_prob_sum

    def _loss(self, log_probs: Tensor, advantages: Tensor) -> Tensor:  # type: ignore[override]
        self.log_prob_sum += float(log_probs.detach().sum())
        return super()._loss(log_probs, advantages)


def calls_of(part: str, group: Group, rows: int) -> dict[str, list[Callable[[], Any]]]:
    """What a part measures, in order."""
    once, copies = {"vision": [group.encode]}, group.part(slice(rows))
    calls: dict[str, dict[str, list[Callable[[], Any]]]] = {
        "packed": {
            **once,
            "score": [partial(group.score, 0)],
            "score+capture": [group.capture],
            "weights": [lambda: group.weights(group.scores)],
            "update": [partial(group.packed, grad=True)],
        },
        "inside": {**once, "update+capture+weights": [group.weighted]},
        "rows": {"update": [partial(group.row, number) for number in range(rows)]},
        "generate-once": {**once, "generate": [group.generate_once_read]},
        "generate-copies": {"generate": [partial(copies.generate, "sdpa", rows_per_call=rows)]},
    }
    return calls[part]


PARTS = ("packed", "inside", "rows", "generate-once", "generate-copies")


def run_part(part: str, args: argparse.Namespace) -> dict[str, Any]:
    """One part, in this process: seconds, and peaks of resident memory beyond what libraries held before the model."""
    libraries = harness.reset_high_water_mark()
    cell = Cell(args.prompt, args.new_tokens if part.startswith("generate") else args.tokens, args.group)
    model = build_adapted(args.model, args.seed)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    group = Group(model, cell, "cpu", args.seed)
    group.model.zero_grad = lambda **_: None
    times, peaks, rows = {}, {}, args.rows or args.group
    for name, calls in calls_of(part, group, rows).items():
        harness.reset_high_water_mark()
        timed = harness.Timed(lambda: None)
        for timed.call in calls:
            timed.measure("cpu")
            print(f"{part}/{name}: {timed.processor_seconds[-1]:.0f} s", file=sys.stderr, flush=True)
        scale = args.group / rows if part in ("rows", "generate-copies") else 1
        sums = {"seconds": sum(timed.seconds), "processor_seconds": sum(timed.processor_seconds)}
        times[name] = {clock: scale * sum_ for clock, sum_ in sums.items()} | {"measured": 1 / scale}
        peaks[name] = harness.high_water_mark() - libraries
    found = {"times": times, "peak_bytes": peaks, "load_average": list(os.getloadavg())}
    if group.log_prob_sum and rows == args.group:  # as text: the JSON rounds numbers
        found["mean_log_prob"] = str(group.log_prob_sum / (args.group * args.tokens))
        found["gradient"] = fingerprint(group.model)
    return found | {"crucial_frames": group.crucial_frames}


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
    """Bytes that `appo plan` says each phase needs, without an optimiser, in float32 on a CPU."""
    prompt = prompt_of(skeleton(args.model), args.prompt, "cpu")
    assert prompt.video_grid_thw is not None
    frames, rows, columns = prompt.video_grid_thw[0].tolist()
    patches = frames * rows * columns
    run = Run(
        architecture=SHAPES[args.model],
        video=VideoShape(frames, rows * 14, columns * 14, patches, patches // 4),
        prompt_text_tokens=args.prompt - patches // 4,
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
    scored = {phase.name: phase.total for phase in phases(replace(run, scoring_pass=True))}
    return scored | {"inside": phases(run)[-1].total}


def summary(parts: dict[str, Any], planned: dict[str, int]) -> dict[str, dict[str, float]]:
    """Ratios and shares of the parts that are there."""
    found = {clock: ratios(parts, clock) for clock in ("seconds", "processor_seconds")}
    peak = {f"{part}/{name}": size for part, one in parts.items() for name, size in one["peak_bytes"].items()}
    pairs = {"score": "packed/score+capture", "update": "packed/update", "inside": "inside/update+capture+weights"}
    found["predicted:measured peak"] = {
        name: planned[phase] / peak[name] for phase, name in pairs.items() if peak.get(name)
    }
    one, other = ({"gradient": None} | parts.get(part, {}) for part in ("rows", "packed"))
    if one["gradient"] and other["gradient"]:
        found["packed against rows"] = {
            "gradient, relative distance": gradient_distance(one["gradient"], other["gradient"]),
            "mean log-probability": abs(float(one["mean_log_prob"]) - float(other["mean_log_prob"])),
        }
    return found


def ratios(parts: dict[str, Any], clock: str) -> dict[str, float]:
    """By one clock; what is not measured is left out."""

    def cost(part: str, *names: str) -> float:
        times = parts.get(part, {"times": {}})["times"]
        return sum(times[name][clock] if name in times else math.nan for name in names)

    packed, rows = cost("packed", "vision", "update"), cost("rows", "update")
    scored = packed + cost("packed", "score+capture", "weights")
    inside = cost("inside", "vision", "update+capture+weights")
    found = {
        "rows:packed update": rows / packed,
        "rows:packed with scoring, capture, weights": rows / scored,
        "rows:packed with capture and weights inside": rows / inside,
        "inside:packed update": inside / packed,
        "share of the scoring pass": cost("packed", "score") / scored,
        "share of capture": (cost("packed", "score+capture") - cost("packed", "score")) / scored,
        "share of weights": cost("packed", "weights") / scored,
        "generate copies:once": cost("generate-copies", "generate") / cost("generate-once", "vision", "generate"),
    }
    return {name: value for name, value in found.items() if not math.isnan(value)}


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    header = ["", "wall", "processor", "peak memory with weights"]
    rows = []
    for part, one in result["parts"].items():
        for name, time in one["times"].items():
            seconds = [f"{time[clock]:.1f} s" for clock in ("seconds", "processor_seconds")]
            rows.append([f"{part}: {name}", *seconds, f"{one['peak_bytes'][name] / harness.GB:.2f} GB"])
    harness.print_table("One group", header, rows)
    flat = [(f"{kind}: {name}", value) for kind, one in result["summary"].items() for name, value in one.items()]
    harness.print_table("Together", ["", ""], [[name, harness.shown(value, "", 4)] for name, value in flat])


# --- the command -----------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = harness.base_parser(__doc__ or "", "true_size")
    parser.add_argument("--model", choices=sorted(SHAPES), default="qwen2.5-vl-3b")
    parser.add_argument("--prompt", type=int, default=576, help="P: 64 of text, 64 a frame")
    parser.add_argument("--tokens", type=int, default=32, help="N")
    parser.add_argument("--group", type=int, default=8, help="G")
    parser.add_argument("--new-tokens", type=int, default=4, help="of each response where it is generated")
    parser.add_argument(
        "--rows", type=int, default=0, help="rows or copies measured, their mean taken for all; 0: all G"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--in-process", action="store_true", help="no fresh processes (peak memory is less exact)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def check_memory(planned: dict[str, int]) -> None:
    """Refuse to start where the model would not fit. The system would end another process instead."""
    needed, free = max(planned.values()) + SPARE, harness.available_memory()
    if free < needed:
        raise SystemExit(f"{needed / harness.GB:.1f} GB of memory are needed, {free / harness.GB:.1f} GB are free")


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
        print(json.dumps(run_part(args.part, args)))
        return {}
    settings = {key: getattr(args, key) for key in ("model", "prompt", "tokens", "group", "new_tokens", "seed")}
    earlier = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {"settings": settings}
    if earlier["settings"] != settings:
        raise SystemExit(f"{args.output} has other settings; choose another --output")
    planned = plan(args)
    result = harness.provenance(args, argv) | {"lora_r": RANK, "planned_bytes": planned, "parts": {}} | earlier
    for part in [name for name in args.parts if name not in result["parts"]]:
        check_memory(planned)
        result["parts"][part] = run_part(part, args) if args.in_process else fresh_process(part, argv)
        harness.write_json(args.output, result | {"summary": summary(result["parts"], planned)})
    result["summary"] = summary(result["parts"], planned)
    harness.write_json(args.output, result)
    show(result)
    return result


if __name__ == "__main__":
    main()
