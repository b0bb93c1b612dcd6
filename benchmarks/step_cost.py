"""What a whole optimiser step costs, part by part: APPO, GRPO as rows with the video, and stock TRL without it.

    python benchmarks/step_cost.py                        # the demo's tiny policy on generated clips, minutes on a CPU
    python benchmarks/step_cost.py --model untrained      # the same build with random weights
    python benchmarks/step_cost.py --model cpu --prompt-tokens 2112 --tokens 64 --prompts 1 --steps 1 --repeats 1
    python benchmarks/step_cost.py --device cuda --model qwen2.5-vl-3b --frame-tokens 64 --tokens 384

Every way answers the same prompts about the same mp4 files with the same number of tokens:

appo       APPOTrainer, method appo: attention captured, token weights, groups packed behind one prompt
grpo       APPOTrainer, method grpo: the same without scoring and weights
rows       APPOTrainer, method grpo, shared_prefix false: decoding, vision tower and prefill once a group, then rows
carried    TRL's GRPOTrainer with the pixels added to its loss: what its users would run, all of it once a row
stock      TRL's GRPOTrainer: generates from the video, but its loss leaves the video out, so it is too cheap

On a CPU parts are seconds of the processor's clock, which other processes do not disturb; on a GPU the wall's.
Rewards are fixed (every second response wins), so that every group is mixed; dynamic sampling is off in all of them.
Where torchcodec is missing, stock TRL decodes through transformers' own PyAV reader.
"""

from __future__ import annotations

import harness  # first: it sets OpenMP's waiting before torch loads

# isort: split
import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from decoder_cost import decoder_seconds
from recipes.tiny_policy.build import build_policy
from shapes import SHAPES, TOKENS_PER_FRAME, config_of, messages_of
from transformers import PrinterCallback, Qwen2_5_VLForConditionalGeneration, TrainerCallback
from transformers.utils import is_torchcodec_available
from transformers.video_utils import load_video
from trl import GRPOConfig, GRPOTrainer

from appo import APPOConfig, APPOTrainer
from appo.models.families import family_of, use_pretrained_positions
from appo.models.prompt import Prompt
from appo.rewards.templates import build_messages
from appo.rollout.timers import Stopwatch
from appo.training.update import RowsModel
from appo.world import generate, load_policy

WAYS = ("appo", "grpo", "rows", "carried", "stock")
OURS: dict[str, dict[str, Any]] = {
    "appo": {"method": "appo"},
    "grpo": {"method": "grpo"},
    "rows": {"method": "grpo", "shared_prefix": False},
}
DEMO_WEIGHTS = {"score_tokens": 8, "top_frames": 2, "frame_tokens": 8}  # for its short responses; else the paper's
TOTALS = {"wall": "median", "processor": "processor_median"}
SAMPLING_FPS, MOST_FRAMES, FEWEST_FRAMES = 2.0, 24, 4


# --- the same job for all --------------------------------------------------------------------------------------------


def fixed_rewards(completions: list[Any], **kwargs: Any) -> list[float]:
    """Every second response wins."""
    return [float(index % 2) for index in range(len(completions))]


def policy(args: argparse.Namespace) -> tuple[Any, Any]:
    """Model and processor. Real shapes have random weights and the embedded world's tokenizer."""
    if args.model == "shipped":
        model, processor = load_policy()
    else:
        model, processor = build_policy(args.seed)
    if args.model in SHAPES:
        model = _random_model(args, model)
    size = {"shortest_edge": args.frame_tokens * 28 * 28, "longest_edge": args.frame_tokens * 28 * 28}
    video = processor.video_processor
    video.size = size
    # What APPOTrainer samples by its settings, stock TRL takes from the processor.
    video.do_sample_frames, video.fps = True, SAMPLING_FPS
    video.min_frames, video.max_frames = FEWEST_FRAMES, most_frames(args)
    return model, processor


def most_frames(args: argparse.Namespace) -> int:
    """Frames sampled from a video at most; two of them are one of the language model."""
    return max(MOST_FRAMES, 2 * args.prompt_tokens // args.frame_tokens)


def make_rows(args: argparse.Namespace, folder: Path) -> Dataset:
    """As many questions as all steps need, each about an mp4 file of its own."""
    count = args.prompts * (args.steps + 1)
    if not args.prompt_tokens:
        questions = generate(folder, "L1", count, args.seed)
        return Dataset.from_list([{"prompt": build_messages(question, instruction="")} for question in questions])
    _, processor = policy(args)
    sizes = (args.prompt_tokens, args.frame_tokens)
    prompts = [messages_of(processor, folder / f"{number}.mp4", *sizes, args.seed + number) for number in range(count)]
    return Dataset.from_list([{"prompt": messages} for messages in prompts])


def _random_model(args: argparse.Namespace, tiny: Any) -> Any:
    config = config_of(SHAPES[args.model])
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        setattr(config, name, getattr(tiny.config, name))
    torch.manual_seed(args.seed)
    with torch.device(args.device):
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = tiny.generation_config
    return use_pretrained_positions(model)


def settings(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """GRPOConfig's arguments, the same for all ways."""
    cuda = args.device.startswith("cuda")
    return {
        "output_dir": str(folder / "out"),
        "num_generations": args.group,
        "per_device_train_batch_size": args.group * args.prompts_per_call,
        "gradient_accumulation_steps": args.prompts // args.prompts_per_call,
        "max_completion_length": args.tokens,
        "generation_kwargs": {"min_new_tokens": args.tokens},
        "max_steps": 1 + args.steps,
        "learning_rate": 1e-6,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": not cuda,
        "bf16": cuda,
        "gradient_checkpointing": args.model.startswith(("cpu", "qwen")),
        "disable_tqdm": True,
        "seed": args.seed,
    }


def make_trainer(way: str, args: argparse.Namespace, rows: Dataset, folder: Path) -> Any:
    """A fresh trainer of one way on a fresh policy."""
    (model, processor), shared = policy(args), settings(args, folder)
    if way in ("stock", "carried"):
        shared["generation_kwargs"] = shared["generation_kwargs"] | {"suppress_tokens": family_of(model).banned_ids}
        # The vision tower is frozen in all of them.
        family_of(model).tower.requires_grad_(False)
        if not is_torchcodec_available():
            _decode_with_pyav(processor.video_processor)
        config = GRPOConfig(**shared, beta=0.0, loss_type="grpo")
        trainer = TimedStock if way == "stock" else Carrying
        return trainer(model, fixed_rewards, config, train_dataset=rows, processing_class=processor)
    config = APPOConfig(
        **shared,
        **OURS[way],
        accuracy_reward="fixed_rewards",
        max_resampling_rounds=0,
        overlong_cache=0,
        **({} if args.prompt_tokens else DEMO_WEIGHTS),
        video_fps=SAMPLING_FPS,
        video_max_frames=most_frames(args),
        video_min_frames=FEWEST_FRAMES,
    )
    return APPOTrainer(model, fixed_rewards, config, train_dataset=rows, processing_class=processor)


def _decode_with_pyav(video_processor: Any) -> None:
    def fetch(videos: Any, sample_indices_fn: Any = None) -> Any:
        if isinstance(videos, list):
            return list(zip(*[fetch(video, sample_indices_fn) for video in videos], strict=True))
        return load_video(videos, backend="pyav", sample_indices_fn=sample_indices_fn)

    video_processor.fetch_videos = fetch


class TimedStock(GRPOTrainer):
    """Stock TRL, untouched but for a stopwatch around three of its methods."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.watch = Stopwatch()

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        with self.watch("decode"):
            return super()._tokenize_prompts(prompts)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with self.watch("generate"):
            return super()._generate_single_turn(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's, measured; what is inside and measured itself does not count."""
        with self.watch("update"):
            loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            for part, seconds in self.watch.read().items():
                self._metrics["train"][f"time/{part}"].append(seconds)
        return loss


class Carrying(TimedStock):
    """Stock TRL as its users would repair it: each row's pixels go along to the loss's forward pass."""

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        ids, images, fields = super()._tokenize_prompts(prompts)
        grids = torch.as_tensor(fields["video_grid_thw"])
        pixels = torch.as_tensor(fields["pixel_values_videos"]).split(grids.prod(dim=-1).tolist())
        seconds, types = torch.as_tensor(fields["second_per_grid_ts"]), family_of(self.model).token_types
        rows = [torch.tensor([row]) for row in ids]
        self._prompts = [
            Prompt(row, types(row), None, pixels[b], video_grid_thw=grids[b, None], second_per_grid_ts=seconds[b, None])
            for b, row in enumerate(rows)
        ]
        return ids, images, fields

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        # A list goes with its rows through TRL's shuffling and splitting.
        return super()._generate_and_score_completions(inputs) | {"vision": self._prompts}

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        rows = {key: value for key, value in inputs.items() if key != "vision"}
        return super()._compute_loss(RowsModel(model, inputs["vision"], 1, self.model), rows)


def processor_seconds() -> float:
    """Of this process and of the one that decodes videos for this library."""
    return time.process_time() + decoder_seconds()


class StepClock(TrainerCallback):
    """Seconds between the ends of two steps, on the wall's clock and the processor's: all of a step is in them."""

    def __init__(self) -> None:
        self._ends: list[tuple[float, float, int]] = []
        self.patches = 0  # that the vision tower has read

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note the time."""
        self._ends.append((time.perf_counter(), processor_seconds(), self.patches))

    def seconds(self, clock: int) -> list[float]:
        """Of every step but the first, which warms up; ``clock``: 0 the wall's, 1 the processor's, 2: patches."""
        return [end[clock] - start[clock] for start, end in zip(self._ends, self._ends[1:], strict=False)]

    def count(self, tower: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook before the vision tower."""
        self.patches += len(args[0] if args else kwargs["hidden_states"])


# --- measuring -------------------------------------------------------------------------------------------------------


def run_once(way: str, args: argparse.Namespace, rows: Dataset, folder: Path) -> dict[str, Any]:
    """Train a few steps; seconds of each step but the first, by part and in all."""
    trainer, clock = make_trainer(way, args, rows, folder), StepClock()
    if not args.device.startswith("cuda"):
        trainer.watch.clock = processor_seconds
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(clock)
    family_of(trainer.model).tower.register_forward_pre_hook(clock.count, with_kwargs=True)
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "completions/mean_length" in entry]
    parts = defaultdict(list)
    for entry in logs[1:]:
        for name, value in entry.items():
            if name.startswith("time/") and not name.endswith("_share"):
                parts[name.removeprefix("time/")].append(value)
    run = {
        "seconds": clock.seconds(0),
        "processor_seconds": clock.seconds(1),
        "patches": clock.seconds(2),
        "parts": dict(parts),
        "tokens": [entry["completions/mean_length"] for entry in logs[1:]],
    }
    if args.device.startswith("cuda"):
        run["peak_bytes"] = torch.cuda.max_memory_allocated()
    return run


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All rounds of one way as one: every step's seconds, medians by part."""
    seconds, processor = ([value for run in runs for value in run[key]] for key in ("seconds", "processor_seconds"))
    names = sorted({name for run in runs for name in run["parts"]})
    parts = {name: statistics.median([value for run in runs for value in run["parts"].get(name, [])]) for name in names}
    result = {
        "seconds": seconds,
        "median": statistics.median(seconds),
        "processor_seconds": processor,
        "processor_median": statistics.median(processor),
        "parts": parts,
        "vision_patches": statistics.median([value for run in runs for value in run["patches"]]),
        "tokens": statistics.mean([value for run in runs for value in run["tokens"]]),
    }
    if "peak_bytes" in runs[0]:
        result["peak_bytes"] = max(run["peak_bytes"] for run in runs)
    return result


def ratios(ways: dict[str, Any], clock: str) -> dict[str, dict[str, float]]:
    """How many times longer the others' steps take than APPO's: by each clock, and all but decoding files."""
    total = TOTALS[clock]
    whole = {name: way[total] for name, way in ways.items()}
    if "appo" not in ways:
        return {}
    costs = {
        "wall": {name: way["median"] for name, way in ways.items()},
        clock: whole,
        "without decode": {name: seconds - ways[name]["parts"]["decode"] for name, seconds in whole.items()},
    }
    return {
        name: {f"{way}:appo": cost[way] / cost["appo"] for way in ways if way != "appo"} for name, cost in costs.items()
    }


def show(ways: dict[str, Any], found: dict[str, dict[str, float]], clock: str) -> None:
    """Print the table."""
    names = sorted({name for way in ways.values() for name in way["parts"]})
    header = ["", *names, "rest", "whole step", *(f"{name}: ratio to appo" for name in found)]
    rows = []
    for name, way in ways.items():
        parts = [harness.shown(way["parts"].get(part), " s") for part in names]
        rest = max(way[TOTALS[clock]] - sum(way["parts"].values()), 0.0)
        ratio = [harness.shown(quotients.get(f"{name}:appo"), "x") for quotients in found.values()]
        rows.append([name, *parts, harness.shown(rest, " s", 2), harness.shown(way[TOTALS[clock]], " s"), *ratio])
    harness.print_table(f"One optimiser step (medians; seconds of the {clock}'s clock)", header, rows)


# --- the command -----------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = harness.base_parser(__doc__, "step_cost")
    choices = ["shipped", "untrained", *sorted(SHAPES)]
    parser.add_argument("--model", choices=choices, default="shipped", help="the demo's policy, or a random shape")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--group", type=int, default=8, help="G")
    parser.add_argument("--prompts", type=int, default=16, help="prompts of an optimiser step (the demo's 16)")
    parser.add_argument("--prompts-per-call", type=int, default=4, help="prompts of a micro-batch (the demo's 4)")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of every response (the demo's have about 50)")
    parser.add_argument("--prompt-tokens", type=int, default=0, help="of a prompt; 0: the embedded world's questions")
    parser.add_argument("--frame-tokens", type=int, help="of a frame; default: 4 (the demo's), or 64 (the paper's)")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a round, after one that warms up")
    parser.add_argument("--append", action="store_true", help="keep the other ways of the JSON")
    args = parser.parse_args(argv)
    args.prompts_per_call = min(args.prompts_per_call, args.prompts)
    args.frame_tokens = args.frame_tokens or (TOKENS_PER_FRAME if args.prompt_tokens else 4)
    return args


def earlier_ways(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """With --append, the ways that the JSON has."""
    earlier = json.loads(args.output.read_text(encoding="utf-8")) if args.append else {"settings": settings, "ways": {}}
    if earlier["settings"] != settings:
        raise SystemExit(f"--append: {args.output} has other settings; choose another --output")
    return dict(earlier["ways"])


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, write the JSON; returns what was written."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse(argv)
    harness.prepare(args)
    clock = "wall" if args.device.startswith("cuda") else "processor"
    runs = defaultdict(list)
    left = harness.TimeLeft(args.repeats * len(args.ways))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = make_rows(args, folder)
        for number in range(args.repeats):
            for way in args.ways:
                runs[way].append(run_once(way, args, rows, folder))
                left.step(f"{way}, round {number + 1} of {args.repeats}", 1)
    keys = ("model", "group", "prompts", "prompts_per_call", "tokens", "prompt_tokens", "frame_tokens", "steps")
    result = harness.provenance(args, argv)
    result["settings"] = {key: getattr(args, key) for key in keys} | {"vision_frozen": True}
    measured = {way: summary(runs[way]) | {"git_commit": result["git_commit"]} for way in args.ways}
    ways = earlier_ways(args, result["settings"]) | measured
    ways = {way: ways[way] for way in WAYS if way in ways}
    found = ratios(ways, clock)
    result |= {"clock_of_parts": clock, "ways": ways, "ratios": found}
    harness.write_json(args.output, result)
    show(ways, found, clock)
    return result


if __name__ == "__main__":
    main()
