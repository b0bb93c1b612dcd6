"""`appo train`: a configuration (YAML, flags, or both) becomes a run folder with a trained policy in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from datasets import Dataset
from rich.console import Console
from transformers import PrinterCallback
from trl import TrlParser

from appo.config import APPOConfig
from appo.data import load, rows_of
from appo.display import TrainingBar
from appo.models import load_model
from appo.recording import Recorder
from appo.records import RunFolder
from appo.rewards import reward_functions
from appo.spotlight import generate, policy_path
from appo.trainer import APPOTrainer

SPOTLIGHT = "spotlight"
PAPER_REWARDS = {"accuracy": 0.9, "format": 0.1}  # APPO sec. 4


@dataclass
class TrainScript:
    """What to train on what; everything else is a setting of :class:`appo.APPOConfig`."""

    model: str = field(
        default=SPOTLIGHT,
        metadata={"help": "A Hugging Face folder or hub id, or 'spotlight': the embedded tiny policy."},
    )
    dataset: str = field(
        default=SPOTLIGHT,
        metadata={"help": "A name of appo.data.DATASETS; 'jsonl': your own questions (docs/data.md)."},
    )
    annotations: str | None = field(
        default=None,
        metadata={"help": "Annotation file or folder; none (spotlight only): clips are made in output_dir/clips."},
    )
    videos: str | None = field(
        default=None,
        metadata={"help": "Folder that the annotations' video paths start from; default: where the annotations lie."},
    )
    split: str | None = field(default=None, metadata={"help": "Part of the dataset (docs/data.md)."})
    rewards: list[str] = field(
        default_factory=lambda: list(PAPER_REWARDS),
        metadata={"help": "accuracy, format, temporal_iou, or your own as module:function; weights: reward_weights."},
    )
    level: str = field(default="L1", metadata={"help": "Level of generated clips: L1, L2 or L3."})
    clips: int = field(default=256, metadata={"help": "How many clips to generate."})
    response_format: str | None = field(
        default=None,
        metadata={"help": "answer or grounded (with the time); default: what the dataset's official score needs."},
    )
    instruction: str | None = field(
        default=None,
        metadata={"help": "Appended to every question; default: asks for the format, nothing for the tiny policy."},
    )


class OneLineParser(TrlParser):
    """TRL's parser (flags = YAML = dataclass) whose errors are one line, not two hundred lines of usage."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError instead of printing the usage."""
        raise ValueError(f"{message}; `appo train --help` shows an example")


def parse(arguments: Sequence[str]) -> tuple[TrainScript, APPOConfig]:
    """Settings from ``--config FILE`` and flags; a flag wins over the file.

    Raises:
        ValueError: an unknown or impossible setting, named.
        OSError: the file cannot be read.
    """
    script, config = OneLineParser((TrainScript, APPOConfig)).parse_args_and_config(list(arguments))
    return script, config


def train(script: TrainScript, config: APPOConfig, console: Console) -> Path:
    """Train, recording everything; returns the run folder, which holds the trained policy in ``policy/``.

    Raises:
        ValueError, appo.records.RecordError, appo.video.VideoError, appo.sight.BlindPolicyError: one line each.
    """
    folder = RunFolder.create(config.output_dir, {"script": asdict(script), "training": config.to_dict()})
    tiny = script.model == SPOTLIGHT
    rows = _rows(script, "" if tiny else None, folder, config.seed)
    model, processor = load_model(
        policy_path() if tiny else script.model,
        trust_remote_code=config.trust_remote_code,
        **(config.model_init_kwargs or {}),
    )
    trainer = make_trainer(model, processor, rows, config, folder, script.rewards)
    fit(trainer, console)
    trainer.save_model(str(folder.path / "policy"))
    return folder.path


def _rows(script: TrainScript, instruction: str | None, folder: RunFolder, seed: int) -> Dataset:
    """The dataset that the settings name, or freshly generated clips of the embedded world."""
    instruction = instruction if script.instruction is None else script.instruction
    if script.annotations is not None:
        where = (script.annotations, script.videos, script.split)
        return load(script.dataset, *where, response_format=script.response_format, instruction=instruction)
    if script.dataset != SPOTLIGHT:
        raise ValueError(f"dataset {script.dataset} is read from files: set `annotations` (and `videos`)")
    if script.videos is not None or script.split is not None:
        raise ValueError(
            "`videos` and `split` are about a dataset's files: set `annotations` as well, or leave them out"
        )
    return rows_of(generate(folder.path / "clips", script.level, script.clips, seed), instruction)


def make_trainer(
    model: Any,
    processor: Any,
    rows: Dataset,
    config: APPOConfig,
    folder: RunFolder,
    rewards: Sequence[str] = tuple(PAPER_REWARDS),
) -> APPOTrainer:
    """A trainer with these rewards (the paper's two, with its weights, unless told otherwise) that records its run."""
    functions = reward_functions(rewards)
    if config.reward_weights is None and list(rewards) == list(PAPER_REWARDS):
        config.reward_weights = list(PAPER_REWARDS.values())
    trainer = APPOTrainer(model, functions, config, train_dataset=rows, processing_class=processor)
    trainer.remove_callback(PrinterCallback)
    Recorder(folder, trainer)
    return trainer


def fit(trainer: APPOTrainer, console: Console) -> None:
    """Train under a progress bar, which is taken down however training ends."""
    bar = TrainingBar(console)
    trainer.add_callback(bar)
    try:
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    finally:
        bar.close()
