"""What `appo plan` predicts against what torch's allocator reports, for real optimiser steps of small models on a CPU.

    python benchmarks/plan_check.py                        # every shape, a few minutes on a CPU core
    python benchmarks/plan_check.py --cells tiny lora

Each cell is one step of APPOTrainer (the second: AdamW's moments are there) on a generated clip, with random weights:
generation, scoring with capture, weights, loss, backward, optimiser. The profiler reports every allocation and release
of the CPU allocator, so peaks are exact bytes and the same on every run; weights and moments are counted tensor by
tensor. `head-tile` cuts the tiles of TRL's fused head: 32768 words over all tokens, as it does without Triton, would
hide the layers of a small model.
"""

from __future__ import annotations

import harness  # first: it sets OpenMP's waiting before torch loads

# isort: split
import argparse
import bisect
import gc
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import trl.trainer.utils
from datasets import Dataset
from shapes import SHAPES, ModelShape
from step_cost import fixed_rewards, policy
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import PrinterCallback, TrainerCallback

from appo import APPOConfig, APPOTrainer
from appo.experiments.plan.architecture import VideoShape
from appo.experiments.plan.memory import CPU, Run
from appo.experiments.plan.phases import phases
from appo.rewards.templates import build_messages
from appo.rollout.timers import Stopwatch
from appo.types import STEP_PARTS
from appo.world import generate

MARK = "appo/"
_SMALL_TOWER: dict[str, Any] = {"vision_heads": 2, "vision_full": (0,)}
SHAPES["plan"] = ModelShape(256, 6, 8, 2, 704, 512, True, 1, 16, 32, mrope=(4, 6, 6), **_SMALL_TOWER)
SHAPES["plan-wide"] = ModelShape(384, 4, 6, 6, 1024, 512, False, 1, 16, 32, mrope=(8, 12, 12), **_SMALL_TOWER)


@dataclass(frozen=True)
class Cell:
    """One step: a model, its precision, and the settings that decide about memory."""

    model: str = "plan"
    precision: str = "fp32"
    frame_tokens: int = 16
    generations: int = 4
    completion: int = 32
    prompts: int = 1
    checkpointing: bool = False
    rows_per_chunk: int = 0
    lora_rank: int = 0
    head_tile: int = 512
    scoring_pass: bool = False

    @property
    def phases(self) -> tuple[str, ...]:
        """What a step has."""
        return ("generate", "score", "update") if self.scoring_pass else ("generate", "update")


CELLS = {
    "tiny": Cell(),
    "own-head-tile": Cell(head_tile=32768),
    "checkpointing": Cell(checkpointing=True, prompts=2),
    "autocast": Cell(precision="mixed", prompts=2),
    "autocast-checkpointing": Cell(precision="mixed", checkpointing=True, prompts=2),
    "bf16": Cell(precision="bf16", checkpointing=True, prompts=2),
    "wide": Cell(model="plan-wide", checkpointing=True, prompts=2),
    "chunks": Cell(rows_per_chunk=2, generations=8),
    "scoring-pass": Cell(scoring_pass=True, checkpointing=True, prompts=2),
    "long": Cell(frame_tokens=64, generations=8, completion=48),
    "lora": Cell(lora_rank=8, precision="bf16", frame_tokens=32),
}


# --- the step --------------------------------------------------------------------------------------------------------


class Marks(Stopwatch):
    """A stopwatch that also writes its parts into the profile."""

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Measure and mark a ``with`` block."""
        with record_function(MARK + part), super().__call__(part):
            yield


class SecondStep(TrainerCallback):
    """Profiles the second step of a trainer."""

    def __init__(self, trainer: APPOTrainer) -> None:
        self._trainer = trainer
        self.profiler: Any = None
        self.static = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count what stays, and start."""
        if state.global_step == 1:
            gc.collect()
            self.static = static_bytes(self._trainer)
            self.profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profiler.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop after the second."""
        if state.global_step == 2:
            self.profiler.__exit__(None, None, None)


def static_bytes(trainer: APPOTrainer) -> int:
    """Of weights and of the optimiser's states, every storage once."""
    optimizer: Any = trainer.optimizer
    states = [value for state in optimizer.optimizer.state.values() for value in state.values()]
    tensors = [*trainer.model.parameters(), *states]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def make_trainer(cell: Cell, folder: Path, seed: int) -> APPOTrainer:
    """A trainer whose every response has all the tokens, on one clip asked about again and again."""
    names = argparse.Namespace(
        model=cell.model, seed=seed, frame_tokens=cell.frame_tokens, prompt_tokens=0, device="cpu"
    )
    model, processor = policy(names)
    if cell.precision == "bf16":
        model = model.to(torch.bfloat16)
    config = APPOConfig(
        output_dir=str(folder / "out"),
        num_generations=cell.generations,
        per_device_train_batch_size=cell.generations,
        gradient_accumulation_steps=cell.prompts,
        max_completion_length=cell.completion,
        generation_kwargs={"min_new_tokens": cell.completion},
        max_steps=2,
        learning_rate=1e-6,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=cell.precision == "mixed",
        gradient_checkpointing=cell.checkpointing,
        rows_per_chunk=cell.rows_per_chunk,
        disable_tqdm=True,
        max_resampling_rounds=0,
        overlong_cache=0,
        rollouts_per_step=0,
        normalize_weights=cell.scoring_pass,
        accuracy_reward="fixed_rewards",
        score_tokens=8,
        top_frames=2,
        frame_tokens=8,
        seed=seed,
    )
    (question,) = generate(folder / "clips", "L1", 1, seed)
    row = {"prompt": build_messages(question, instruction=""), "answer": question.answer, "kind": question.kind}
    rows = Dataset.from_list([row] * (2 * cell.prompts))
    lora = {"peft_config": adapters(cell.lora_rank)} if cell.lora_rank else {}
    return APPOTrainer(model, fixed_rewards, config, train_dataset=rows, processing_class=processor, **lora)


def adapters(rank: int) -> Any:
    """LoRA on every matrix of the language model's layers."""
    from peft import LoraConfig

    pattern = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=pattern, task_type="CAUSAL_LM")


# --- measured --------------------------------------------------------------------------------------------------------


def peaks(profiler: Any) -> dict[str, int]:
    """Bytes beyond those at the start, at the peak of each phase; what is not generation or scoring is update.

    Decoding a file is left out: it happens in the CPU's memory wherever the model is.
    """
    events = profiler.profiler.kineto_results.events()
    spans: dict[str, list[tuple[int, int]]] = {"generate": [], "score": [], "decode": []}
    parts = {"generate": "generate", "vision": "generate", "decode": "decode", "score": "score"}
    for event in events:
        part = parts.get(event.name().removeprefix(MARK)) if event.name().startswith(MARK) else None
        if part:
            spans[part].append((event.start_ns(), event.start_ns() + event.duration_ns()))
    now, found = 0, dict.fromkeys(("generate", "score", "update", "decode"), 0)
    memory = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    starts = {part: sorted(inside) for part, inside in spans.items()}
    for time, size in memory:
        now += size
        phase = next((part for part, inside in starts.items() if _inside(time, inside)), "update")
        found[phase] = max(found[phase], now)
    return found


def _inside(time: int, spans: Sequence[tuple[int, int]]) -> bool:
    place = bisect.bisect_right(spans, (time, sys.maxsize)) - 1
    return place >= 0 and spans[place][0] <= time <= spans[place][1]


def measure(cell: Cell, seed: int = 0) -> tuple[dict[str, int], Run]:
    """Peaks of a real step, and the run that the plan is asked about."""
    with tempfile.TemporaryDirectory() as temporary, head_tile(cell.head_tile):
        trainer = make_trainer(cell, Path(temporary), seed)
        trainer.remove_callback(PrinterCallback)
        trainer.watch = trainer.encoder.watch = trainer.pipeline.watch = Marks(STEP_PARTS)
        second = SecondStep(trainer)
        trainer.add_callback(second)
        seen: list[Any] = []
        look = trainer.encoder.vision_features

        def looking(base: Any, inputs: Any, *rest: Any) -> Any:
            seen.append(inputs.with_features(None, None))  # without pixels, which nothing else keeps
            return look(base, inputs, *rest)

        trainer.encoder.vision_features = looking  # type: ignore[method-assign]
        trainer.train()
    found = {phase: second.static + peak for phase, peak in peaks(second.profiler).items()}
    return found | {"static": second.static}, run_of(cell, trainer, seen[-1])


@contextmanager
def head_tile(words: int) -> Iterator[None]:
    """Let TRL's fused head project so many words at once."""
    own = trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE
    trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = words
    try:
        yield
    finally:
        trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE = own


# --- predicted -------------------------------------------------------------------------------------------------------


def run_of(cell: Cell, trainer: APPOTrainer, inputs: Any) -> Run:
    """The same step in the plan's words."""
    frames, rows, columns = inputs.video_grid_thw[0].tolist()
    patches = frames * rows * columns
    video = VideoShape(frames, rows * 14, columns * 14, patches, patches // 4)
    return Run(
        architecture=SHAPES[cell.model],
        video=video,
        prompt_text_tokens=inputs.length - video.tokens,
        num_generations=cell.generations,
        max_completion_length=cell.completion,
        prompts_per_gpu=cell.prompts,
        rows_per_chunk=cell.rows_per_chunk,
        dtype=cell.precision,
        gradient_checkpointing=cell.checkpointing,
        gpus=1,
        lora_r=cell.lora_rank,
        capture_layers=trainer.args.attention_layers,
        scoring_pass=cell.scoring_pass,
        kernels=replace(CPU, head_tile=cell.head_tile),
    )


def check(name: str, cell: Cell, seed: int) -> dict[str, Any]:
    """One cell of the JSON."""
    measured, run = measure(cell, seed)
    planned = phases(run)
    predicted = {phase.name: phase.total for phase in planned}
    static = planned[0].parts["weights"] + planned[0].parts["optimiser"]
    return {
        "cell": name,
        "settings": cell.__dict__,
        "prompt": run.prompt,
        "packed_tokens": run.packed_tokens,
        "static_bytes": {"measured": measured["static"], "predicted": static},
        "measured_bytes": {phase: measured[phase] for phase in cell.phases},
        "predicted_bytes": predicted,
        "parts": {phase.name: phase.parts for phase in planned},
        "predicted:measured": {
            **{phase: predicted[phase] / measured[phase] for phase in cell.phases},
            "peak": max(predicted.values()) / max(measured[phase] for phase in cell.phases),
            "peak beyond weights and moments": (max(predicted.values()) - static)
            / (max(measured[phase] for phase in cell.phases) - measured["static"]),
        },
    }


def _pair(cell: dict[str, Any], phase: str) -> str:
    sizes = [cell[kind].get(phase) for kind in ("measured_bytes", "predicted_bytes")]
    return ", ".join("-" if size is None else f"{size / 1e6:.1f}" for size in sizes) + " MB"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, write."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = harness.base_parser(__doc__ or "", "plan_check")
    parser.add_argument("--cells", nargs="+", choices=tuple(CELLS), default=list(CELLS))
    args = parser.parse_args(argv)
    harness.prepare(args)
    where = harness.provenance(args, argv)
    cells = []
    for name in args.cells:
        cells.append(check(name, CELLS[name], args.seed))
        print(f"{name}: {cells[-1]['predicted:measured']}", file=sys.stderr, flush=True)
    columns = ("generate", "score", "update")
    header = ["cell", "tokens", *(f"{phase}: measured, predicted" for phase in columns), "peak", "beyond weights"]
    rows = [
        [
            cell["cell"],
            str(cell["packed_tokens"]),
            *(_pair(cell, phase) for phase in columns),
            *(f"{cell['predicted:measured'][what]:.3f}" for what in ("peak", "peak beyond weights and moments")),
        ]
        for cell in cells
    ]
    harness.print_table("Live bytes at the peak; the last columns are predicted : measured", header, rows)
    result = where | {"cells_checked": cells}
    harness.write_json(args.output, result)
    return result


if __name__ == "__main__":
    main()
