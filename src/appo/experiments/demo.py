"""`appo demo`: the whole method on the embedded world in a few minutes on a laptop, nothing downloaded."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback

from appo.data import rows_of
from appo.evaluation.inference import Accuracy, Prediction, accuracy, prediction_of
from appo.evaluation.inspection import inspect_question
from appo.files import atomic_write
from appo.models.families import family_of
from appo.models.prompt import Prompt
from appo.reports.console import print_group
from appo.reports.group_view import ViewSettings
from appo.reports.page import write_page
from appo.reports.records import RolloutRecord
from appo.reports.run_folder import PAGE, RunFolder, load_run
from appo.rollout.generation import evaluation_mode, generate
from appo.training.config import APPOConfig
from appo.training.run import fit, make_trainer
from appo.types import VideoQA
from appo.world import dataset, load_policy
from appo.world.policy import MAX_NEW_TOKENS, SAMPLING, WORLD_WEIGHTS, prompt_of
from appo.world.world import LEVELS

# Held-out questions that the untrained policy gets wrong are sampled every few steps, as a film of training.
FILMED_QUESTIONS, FILM_EVERY = 4, 5
PICTURE_WIDTH = 120
EVALUATION_BATCH = 100  # questions


@dataclass(frozen=True)
class DemoSettings:
    """What the demo's flags set: run folder, method, optimiser steps, seed, held-out questions per level."""

    output: Path
    method: str = "appo"
    steps: int = 30
    seed: int = 0
    questions: int = 200


@dataclass(frozen=True)
class DemoResult:
    """Accuracy by level before and after, and the two groups printed."""

    before: dict[str, Accuracy]
    after: dict[str, Accuracy]
    groups: list[RolloutRecord]


def demo_config(settings: DemoSettings, **changes: Any) -> APPOConfig:
    """The paper's settings, scaled to responses of 50 instead of 384 tokens and a policy of a million parameters.

    `changes`: settings of :class:`APPOConfig`.
    """
    usual: dict[str, Any] = {
        "output_dir": str(settings.output),
        "method": settings.method,
        "seed": settings.seed,
        "max_steps": settings.steps,
        "num_generations": 8,
        "per_device_train_batch_size": 32,
        "gradient_accumulation_steps": 4,
        "max_completion_length": MAX_NEW_TOKENS,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        **WORLD_WEIGHTS,
        "video_fps": SAMPLING.fps,
        "video_max_frames": SAMPLING.max_frames,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return APPOConfig(**{**usual, **changes})


def prompts_a_step(config: APPOConfig) -> int:
    """The number of groups in an optimiser step."""
    return int(config.per_device_train_batch_size * config.gradient_accumulation_steps // config.num_generations)


def run_demo(settings: DemoSettings, console: Console) -> DemoResult:
    """Generate clips, evaluate, train, evaluate again, write the run folder and its page, print the result.

    Raises:
        ValueError: the first step's rewards were all equal, so there is nothing to learn from.
        appo.reports.run_folder.RecordError: the output folder cannot be used.
    """
    config = demo_config(settings)
    folder = RunFolder.create(settings.output, {"demo": asdict(settings), "training": config.to_dict()})
    train_questions, held_out = _clips(settings, config, console)
    model, processor = load_policy()
    prompts = _encoded(model, processor, held_out, console)
    before = _evaluate(model, processor, held_out, prompts, "before training", console)
    trainer = make_trainer(model, processor, rows_of(train_questions, ""), config, folder)
    trainer.add_callback(RewardsMustVary())
    inspect = Inspector(processor, config, folder)
    trainer.add_callback(Filming([q for q, old in _pairs(held_out["L1"], before["L1"]) if not old.right], inspect))
    fit(trainer, console)
    trainer.save_model(str(folder.path / "policy"))
    assert not family_of(model).trains_vision, "the held-out prompts were read by another vision tower"
    after = _evaluate(model, processor, held_out, prompts, "after training", console)
    inspect_now = partial(inspect, model, step=config.max_steps)
    groups = _example_groups(inspect_now, held_out["L1"], before["L1"], after["L1"])
    old, new = ({level: accuracy(answers) for level, answers in one.items()} for one in (before, after))
    result = DemoResult(old, new, [record for _, record in groups])
    _write_evaluation(folder, result, before, after)
    _show(result, groups, folder, console)
    return result


def _clips(
    settings: DemoSettings, config: APPOConfig, console: Console
) -> tuple[list[VideoQA], dict[str, list[VideoQA]]]:
    """Fresh training clips of level L1 (twice what the sampler needs, for dynamic sampling) and held-out ones."""
    count = max(1, 2 * settings.steps * prompts_a_step(config))
    with console.status(f"writing {count + len(LEVELS) * settings.questions} clips (mp4, H.264)"):
        train = dataset.generate(settings.output / "clips" / "train", "L1", count, settings.seed)
        held_out = {
            level: dataset.generate(settings.output / "clips" / level, level, settings.questions, dataset.HELD_OUT_SEED)
            for level in LEVELS
        }
    return train, held_out


def _encoded(
    model: Any, processor: Any, held_out: Mapping[str, Sequence[VideoQA]], console: Console
) -> dict[str, list[Prompt]]:
    """The prompts of each level, read once for both evaluations: the vision tower is not trained."""
    family = family_of(model)

    def encode(question: VideoQA) -> Prompt:
        prompt = prompt_of(processor, question)
        return family.encode_vision(prompt) if family.reuses_vision else prompt

    with console.status("reading the held-out clips"):
        return {level: [encode(question) for question in questions] for level, questions in held_out.items()}


def _evaluate(
    model: Any,
    processor: Any,
    held_out: Mapping[str, Sequence[VideoQA]],
    prompts: Mapping[str, Sequence[Prompt]],
    when: str,
    console: Console,
) -> dict[str, list[Prediction]]:
    """Greedy answers, scored."""
    predictions: dict[str, list[Prediction]] = {level: [] for level in held_out}
    total = sum(len(questions) for questions in held_out.values())
    with Progress(console=console, disable=not console.is_terminal) as progress, evaluation_mode(model):
        task = progress.add_task(f"evaluating {when}", total=total)
        for level, questions in held_out.items():
            for start in range(0, len(questions), EVALUATION_BATCH):
                part = slice(start, start + EVALUATION_BATCH)
                settings: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "temperature": 0.0}
                groups = generate(model, processor, prompts[level][part], **settings)
                texts = processor.batch_decode([ids for (ids,) in groups], skip_special_tokens=True)
                predictions[level] += map(prediction_of, questions[part], texts)
                progress.advance(task, len(texts))
    return predictions


class RewardsMustVary(TrainerCallback):
    """Ends a run at its first step if all rewards are equal: every advantage is 0, and nothing would be learned."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kw: Any) -> None:
        """Raise ValueError at the first step whose rewards do not vary."""
        if logs and state.global_step == 1 and logs.get("reward_std", 1.0) == 0:
            raise ValueError("all rewards of the first step were equal, so nothing can be learned: try another --seed")


class Filming(TrainerCallback):
    """Records groups about the same questions before training, every few steps and after it; training is unchanged.

    `inspect` takes model, question and ``step=``, samples a group and records it.
    """

    def __init__(self, questions: Sequence[VideoQA], inspect: Callable[..., Any]) -> None:
        self._questions, self._inspect = questions[:FILMED_QUESTIONS], inspect

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the untrained policy."""
        self._record(state.global_step, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the policy every few steps and after the last one."""
        if state.global_step % FILM_EVERY == 0 or state.global_step == state.max_steps:
            self._record(state.global_step, kwargs["model"])

    def _record(self, step: int, model: Any) -> None:
        for question in self._questions:
            self._inspect(model, question, step=step)


@dataclass(frozen=True)
class Inspector:
    """Samples groups about held-out questions with a seed apart from training's; records each once a step."""

    processor: Any
    config: APPOConfig
    folder: RunFolder
    records: dict[tuple[str, int], RolloutRecord] = field(default_factory=dict)

    def __call__(self, model: Any, question: VideoQA, *, step: int) -> RolloutRecord:
        """The group that the model samples about the question at this step of training."""
        if (question.id, step) not in self.records:
            self.records[question.id, step] = record = self._inspect(model, question, step)
            self.folder.append_rollout(record)
        return self.records[question.id, step]

    def _inspect(self, model: Any, question: VideoQA, step: int) -> RolloutRecord:
        with evaluation_mode(model), torch.random.fork_rng():
            torch.manual_seed(self.config.seed)
            return inspect_question(
                model,
                self.processor,
                question,
                SAMPLING,
                max_new_tokens=MAX_NEW_TOKENS,
                instruction="",
                step=step,
                save_film=self.folder.save_film,
                **self.config.weight_settings,
            )


def _pairs(questions: Sequence[VideoQA], *predictions: Sequence[Prediction]) -> list[tuple[Any, ...]]:
    return list(zip(questions, *predictions, strict=True))


def _example_groups(
    inspect: Callable[[VideoQA], RolloutRecord],
    questions: Sequence[VideoQA],
    before: Sequence[Prediction],
    after: Sequence[Prediction],
) -> list[tuple[str, RolloutRecord]]:
    """A question that training won and one that is lost, each with a new group of the trained policy."""
    pairs = _pairs(questions, before, after)
    won = [q for q, old, new in pairs if not old.right and new.right]
    lost = [q for q, old, new in pairs if old.right and not new.right] or [q for q, _, new in pairs if not new.right]
    chosen = [("won over: wrong before training, right after", won), ("lost: wrong after training", lost)]
    return [(title, inspect(candidates[0])) for title, candidates in chosen if candidates]


def _write_evaluation(
    folder: RunFolder, result: DemoResult, before: Mapping[str, Any], after: Mapping[str, Any]
) -> None:
    data = {
        when: {
            level: {**asdict(summary), "predictions": [asdict(prediction) for prediction in predictions[level]]}
            for level, summary in summaries.items()
        }
        for when, summaries, predictions in (("before", result.before, before), ("after", result.after, after))
    }
    atomic_write(folder.path / "evaluation.json", json.dumps(data, indent=1) + "\n")


def _show(result: DemoResult, groups: Sequence[tuple[str, RolloutRecord]], folder: RunFolder, console: Console) -> None:
    groups = [(title, replace(record, video=Path(record.video).name)) for title, record in groups]
    table, settings = accuracy_table(result.before, result.after), ViewSettings.of(folder.config["training"])
    for title, record in groups:
        print_group(console, title, record, settings)
    console.print(table)
    write_picture(folder.path / "summary.svg", groups, table, settings)
    console.print(f"run folder: {folder.path} (metrics.jsonl, rollouts.jsonl, evaluation.json, summary.svg, policy/)")
    page = write_page(folder.path / PAGE, [load_run(folder.path)])
    console.print(f"open this page in a browser: {page}", style="bold", highlight=False, soft_wrap=True)


def write_picture(
    path: Path, groups: Sequence[tuple[str, RolloutRecord]], table: Table, settings: ViewSettings | None = None
) -> None:
    """Groups and table as an SVG picture of the terminal."""
    console = Console(record=True, file=io.StringIO(), width=PICTURE_WIDTH, force_terminal=True)
    for title, record in groups:
        print_group(console, title, record, settings)
    console.print(table)
    svg = console.export_svg(title="appo demo")
    # The picture must not fetch fonts: viewers use their own monospaced one.
    atomic_write(path, re.sub(r"@font-face {.*?}\s*", "", svg, flags=re.DOTALL))


def accuracy_table(before: Mapping[str, Accuracy], after: Mapping[str, Accuracy]) -> Table:
    """Accuracy of each level before and after training, with 95 % Wilson intervals."""
    table = Table(title="greedy accuracy on held-out questions")
    for name in ("level", "questions", "before", "after", "gain", "format before", "format after"):
        table.add_column(name, justify="left" if name == "level" else "right")
    for level, old in before.items():
        new = after[level]
        gain = Text(f"{100 * (new.mean - old.mean):+.1f}", style="bold green" if new.mean > old.mean else "bold red")
        formats = [f"{100 * result.parsed:.0f} %" for result in (old, new)]
        table.add_row(level, str(new.questions), _interval(old), _interval(new), gain, *formats)
    return table


def _interval(accuracy: Accuracy) -> str:
    return f"{100 * accuracy.mean:.1f} % ({100 * accuracy.low:.0f}-{100 * accuracy.high:.0f})"
