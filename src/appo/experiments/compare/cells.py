"""One cell of a comparison: one method, one seed, trained and evaluated; its numbers as plain values.

Shape suffixes: G responses of one group, F frames.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from appo.data import rows_of
from appo.experiments.compare.measurements import (
    HeldOut,
    averaged,
    described_rightly,
    encoded,
    group_perception,
    measure_attention,
    sampled,
)
from appo.experiments.compare.methods import Control, Variant, World, variant_of
from appo.experiments.demo import DemoSettings, demo_config
from appo.models.families import family_of
from appo.models.loading import load_model
from appo.models.log_probs import log_probs_at
from appo.reports.run_folder import RunFolder
from appo.rewards.functions import PAPER_REWARDS, reward_functions, score_answer
from appo.rewards.templates import parse_response
from appo.rollout.pipeline import RolloutPipeline
from appo.training.config import APPOConfig
from appo.training.sft import make_sft_trainer
from appo.training.trainer import APPOTrainer
from appo.types import Group, VideoQA

MEASURED_QUESTIONS, MEASURED_RESPONSES = 48, 8  # held-out ones of L1 on which attention is measured after training
CURVES = {  # name in a cell -> name in TRL's logs
    "accuracy": "compared/accuracy", "reward": "reward", "generated": "compared/generated", "entropy": "entropy",
    "grad_norm": "grad_norm", "loss": "loss", "mean_weight": "appo/mean_weight", "chosen": "appo/chosen_share",
    "replaced": "resampling/replaced_groups", "recall": "compared/recall", "crucial": "compared/crucial",
    "winners": "compared/winners", "losers": "compared/losers",
}  # fmt: skip


class ComparedPipeline(RolloutPipeline):
    """A rollout that counts its tokens, measures its attention, and may take weights from a control."""

    control: Control | None = None
    world: World
    generated, first_round = 0, True

    def __call__(self, *args: Any, **kwargs: Any) -> list[Group]:
        """One rollout."""
        self.first_round = True
        groups = super().__call__(*args, **kwargs)
        self.log({"compared/generated": (float(self.generated), 1.0)})
        if self.control is not None:
            with torch.no_grad():
                groups = [replace(group, weights=self.control(group, self.world)) for group in groups]
        threshold = self.weigher.settings["threshold"]
        found = [group_perception(group, self.weigher.accuracy_column, threshold) for group in groups]
        for name, value in averaged(found).items():
            self.log({f"compared/{name}": (value, 1.0)})
        return groups

    def reward(self, groups: Sequence[Group]) -> list[Group]:
        """The rewards; logs the first round's accuracy."""
        rewarded = super().reward(groups)
        self.generated += sum(len(sample.ids) for group in rewarded for sample in group.samples)
        if self.first_round:
            right = torch.cat([group.rewards_GR[:, self.weigher.accuracy_column] for group in rewarded])
            self.log({"compared/accuracy": (float(right.mean()), 1.0)})
            self.first_round = False
        return rewarded


def _compared(trainer: APPOTrainer, control: Control | None) -> None:
    """Replace the trainer's pipeline by a `ComparedPipeline`."""
    pipeline = ComparedPipeline(**vars(trainer.pipeline))
    pipeline.settings = replace(pipeline.settings, in_update=False)  # controls and measurements read the scores

    def log_probs_of(scores: Any) -> Any:
        return log_probs_at(trainer.base_model, scores, temperature=trainer.temperature)

    generator = torch.Generator().manual_seed(trainer.args.seed)
    pipeline.control, pipeline.world = control, World(pipeline.weigher, log_probs_of, trainer._tokenizer, generator)
    trainer.pipeline = pipeline


class Curves(TrainerCallback):
    """The numbers of every step: TRL's logs, and the wall and processor seconds since training began."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start both clocks."""
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kw: Any) -> None:
        """Store a step's numbers."""
        if logs and "loss" in logs:
            wall, processor = time.perf_counter() - self._wall, time.process_time() - self._processor
            own = {name: float(logs[source]) for name, source in CURVES.items() if logs.get(source) is not None}
            self.steps.append({"step": state.global_step, "seconds": wall, "own_seconds": processor, **own})


@dataclass(frozen=True)
class Conditions:
    """What all cells of a comparison have in common."""

    steps: int  # optimiser steps
    policy: Path  # folder of the policy that all start from
    held_out: Mapping[str, Sequence[VideoQA]]  # questions to evaluate, by level
    encoded: Path  # folder for the held-out questions, encoded once by that policy's vision tower


def run_cell(
    name: str, seed: int, conditions: Conditions, rows: Sequence[VideoQA], scratch: Path, weight: float = 1.0
) -> dict[str, Any]:
    """Train one method with one seed and evaluate it.

    Args:
        name: as :func:`appo.experiments.compare.methods.variant_of` takes it.
        seed: of sampling and of the order of prompts.
        conditions: shared by all cells.
        rows: questions to train on.
        scratch: an empty folder for the trainer's files.
        weight: multiplies the learning rate (of variants that need another's mean weight).

    Returns:
        ``curve`` (one dictionary per step), ``levels`` (`evaluated`), ``perception`` after training, ``learning_rate``
        and seconds of training and evaluation.
    """
    variant = variant_of(name)
    model, processor = load_model(conditions.policy)
    held_out = {
        level: encoded(conditions.encoded / f"{level}.pt", questions, model, processor)
        for level, questions in conditions.held_out.items()
    }
    tower = [parameter.clone() for parameter in family_of(model).tower.parameters()]
    start = time.perf_counter()
    config = config_of(name, seed, conditions.steps, scratch)
    config.learning_rate *= weight
    curve = _train(variant, model, processor, rows, config) if variant.method else []
    trained = time.perf_counter()
    assert all(map(torch.equal, tower, family_of(model).tower.parameters())), "held-out features are of another tower"
    model.eval()
    first = HeldOut(held_out["L1"].questions[:MEASURED_QUESTIONS], held_out["L1"].prompts[:MEASURED_QUESTIONS])
    return {
        "learning_rate": config.learning_rate,
        "curve": curve,
        "levels": {level: evaluated(model, processor, questions) for level, questions in held_out.items()},
        "perception": measure_attention(model, processor, first, MEASURED_RESPONSES, 0, config.weight_settings),
        "training_seconds": trained - start,
        "evaluation_seconds": time.perf_counter() - trained,
    }


def evaluated(model: Any, processor: Any, held_out: HeldOut) -> dict[str, str]:
    """One 1 or 0 per question, in order: ``right``, well ``formed``, ``what`` and ``when`` described rightly."""
    ids = [ids for (ids,) in sampled(model, processor, held_out.prompts)]
    texts = processor.batch_decode(ids, skip_special_tokens=True)
    pairs = list(zip(held_out.questions, texts, strict=True))
    described = [described_rightly(question.metadata, text) for question, text in pairs]
    return {
        "right": _bits([score_answer(text, question.answer, question.kind) >= 1.0 for question, text in pairs]),
        "formed": _bits([parse_response(text) is not None for text in texts]),
        "what": _bits([what for what, _ in described]),
        "when": _bits([when for _, when in described]),
    }


def _bits(values: Sequence[bool]) -> str:
    return "".join("1" if value else "0" for value in values)


def config_of(name: str, seed: int, steps: int, scratch: Path) -> APPOConfig:
    """The demo's settings with the variant's changes. Raises ValueError for an impossible value."""
    variant = variant_of(name)
    try:
        return demo_config(DemoSettings(scratch, variant.method or "dapo", steps, seed), **variant.settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"method {name}: {' '.join(str(error).split())}") from error


def setting_of(name: str, setting: str, steps: int = 1) -> Any:
    """The value that a setting has with a variant trained for so many steps."""
    return getattr(config_of(name, 0, steps, Path("unused")), setting)


def _train(variant: Variant, model: Any, processor: Any, questions: Sequence[VideoQA], config: APPOConfig) -> Any:
    curves, rows = Curves(), rows_of(questions, "")
    trainer: Any
    if variant.method == "sft":
        folder = RunFolder.create(Path(config.output_dir), {})
        trainer = make_sft_trainer(model, processor, rows, config, folder, reasoning=variant.reasoning)
    else:
        config.reward_weights = list(PAPER_REWARDS.values())
        trainer = APPOTrainer(
            model,
            reward_functions(list(PAPER_REWARDS)),
            config,
            train_dataset=rows,
            processing_class=processor,
        )
        _compared(trainer, variant.control)
        trainer.remove_callback(PrinterCallback)
    trainer.add_callback(curves)
    trainer.train()
    return curves.steps


def mean_weight(cell: Mapping[str, Any]) -> float:
    """The mean over the steps of a finished cell's mean token weight."""
    weights = [step["mean_weight"] for step in cell["curve"]]
    return float(Tensor(weights).double().mean())
