"""`appo train`: a configuration (YAML, flags, or both) becomes a run folder with a trained policy in it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from transformers import PrinterCallback

from appo.data import load, response_format_of, rows_of
from appo.models.loading import load_model
from appo.models.names import SPOTLIGHT, checkpoint_of
from appo.reports.run_folder import RunFolder
from appo.rewards.functions import PAPER_REWARDS, reward_functions
from appo.rollout.collectives import is_main_process, run_on_main_process
from appo.training.arguments import TrainScript
from appo.training.atomic_checkpoint import whole_folder
from appo.training.callbacks import StopOnSignal, TrainingBar
from appo.training.config import APPOConfig
from appo.training.lora import adapter_config, loading_settings
from appo.training.out_of_memory import named_memory_errors
from appo.training.resume import CLIPS, Found, begin_run, find_run, undone_on_error
from appo.training.rollout_logger import Recorder
from appo.training.sft import VideoSFTTrainer, make_sft_trainer
from appo.training.start_checks import check_data
from appo.training.trainer import APPOTrainer
from appo.training.trainer_state import WholeCheckpoints
from appo.world import generate, planned


def train(script: TrainScript, config: APPOConfig, console: Console) -> Path:
    """Train, recording everything; returns the run folder, which holds the trained policy in ``policy/``.

    Raises:
        ValueError, appo.video.reader.VideoError, appo.training.vision_check.BlindPolicyError: one line each.
        appo.training.callbacks.Interrupted: by ctrl-C or SIGTERM; there is a checkpoint.
    """
    peft_config = adapter_config(script)
    settings = {"script": asdict(script), "training": config.to_dict()}
    found = run_on_main_process(partial(find_run, config, settings))
    config.resume_from_checkpoint = found.checkpoint and str(found.checkpoint)
    console.quiet = console.quiet or not is_main_process()
    for note in found.notes:
        console.print(note, highlight=False, soft_wrap=True)
    with undone_on_error(found):
        trainer = _trainer(script, config, found.folder, peft_config)
        run_on_main_process(partial(_begin, found, settings, script, config.seed))
        with StopOnSignal() as stop:
            trainer.add_callback(stop)
            fit(trainer, console)
    stop.raise_if_stopped(trainer)
    save_policy(trainer, found.folder.path / "policy")
    return found.folder.path


def _trainer(
    script: TrainScript, config: APPOConfig, folder: RunFolder, peft_config: Any
) -> APPOTrainer | VideoSFTTrainer:
    """All that the settings name, checked and loaded; nothing is written."""
    rows = _rows(script, "" if script.model == SPOTLIGHT else None, folder, config.seed)
    model, processor = load_model(
        checkpoint_of(script.model),
        trust_remote_code=config.trust_remote_code,
        **loading_settings(script),
        **(config.model_init_kwargs or {}),
    )
    set_pixels(processor, script)
    if config.method == "sft":
        return make_sft_trainer(
            model, processor, rows, config, folder, reasoning=script.sft_reasoning, peft_config=peft_config
        )
    return make_trainer(model, processor, rows, config, folder, script.rewards, peft_config)


def _begin(found: Found, settings: Mapping[str, Any], script: TrainScript, seed: int) -> None:
    """The first that is written: the run's settings, and the clips of the embedded world."""
    begin_run(found, settings)
    if script.annotations is None:
        generate(found.folder.path / CLIPS, script.level, script.clips, seed)


def _rows(script: TrainScript, instruction: str | None, folder: RunFolder, seed: int) -> Dataset:
    """The rows that the settings name, or questions about clips of the embedded world that `_begin` generates."""
    instruction = instruction if script.instruction is None else script.instruction
    return subset(_all_rows(script, instruction, folder, seed), script.limit, script.limit_seed)


def _all_rows(script: TrainScript, instruction: str | None, folder: RunFolder, seed: int) -> Dataset:
    check_data(asdict(script))
    if script.annotations is not None:
        where = (script.annotations, script.videos, script.split)
        return load(script.dataset, *where, response_format=script.response_format, instruction=instruction)
    clips = planned(folder.path / CLIPS, script.level, script.clips, seed)
    return rows_of(clips, instruction, response_format_of(script.dataset, script.response_format))


def subset(rows: Dataset, limit: int | None, seed: int) -> Dataset:
    """`limit` rows drawn without replacement, in the order of the file; all of them if it is None.

    Raises:
        ValueError: there are not as many, or it asks for none.
    """
    if limit is None:
        return rows
    if not 1 <= limit <= len(rows):
        raise ValueError(f"limit is {limit}, but there are {len(rows)} rows: choose from 1 to {len(rows)}")
    return rows.select(sorted(random.Random(seed).sample(range(len(rows)), limit)))


def set_pixels(processor: Any, script: TrainScript) -> None:
    """Have the processor scale frames and pictures as the settings say; it is saved with the policy, and does so there.

    Raises:
        ValueError: the fewest pixels are more than the most, or the processor has one size for all.
    """
    video, image = processor.video_processor, processor.image_processor
    _set_size(video, script.video_min_pixels, script.video_max_pixels, "video")
    _set_size(image, None, script.image_max_pixels, "image")


def _set_size(processor: Any, least: int | None, most: int | None, name: str) -> None:
    if least is None and most is None:
        return
    if not all(name in (processor.size or {}) for name in ("shortest_edge", "longest_edge")):
        raise ValueError(f"{type(processor).__name__} has one size: leave {name}_max_pixels and {name}_min_pixels out")
    least = processor.size["shortest_edge"] if least is None else least
    most = processor.size["longest_edge"] if most is None else most
    if least > most:
        raise ValueError(f"{name}_max_pixels ({most}) is less than {name}_min_pixels ({least}): set both")
    processor.size = type(processor.size)(shortest_edge=least, longest_edge=most)


def make_trainer(
    model: Any,
    processor: Any,
    rows: Dataset,
    config: APPOConfig,
    folder: RunFolder,
    rewards: Sequence[str] = tuple(PAPER_REWARDS),
    peft_config: Any = None,
) -> APPOTrainer:
    """A trainer with these rewards (the paper's two, with its weights, by default) that records its run."""
    functions = reward_functions(rewards)
    if config.reward_weights is None and list(rewards) == list(PAPER_REWARDS):
        config.reward_weights = list(PAPER_REWARDS.values())
    trainer = APPOTrainer(
        model, functions, config, train_dataset=rows, processing_class=processor, peft_config=peft_config
    )
    trainer.remove_callback(PrinterCallback)
    Recorder(folder, trainer)
    return trainer


def save_policy(trainer: WholeCheckpoints, folder: Path) -> None:
    """Write the trained policy and its processor: a folder that is complete or absent.

    Raises:
        appo.training.atomic_checkpoint.CheckpointError: it cannot be written.
    """
    with whole_folder(folder, is_writer=trainer.args.should_save) as written:
        trainer.save_model(str(written))


def fit(trainer: APPOTrainer | VideoSFTTrainer, console: Console) -> None:
    """Train under a progress bar, which is taken down however training ends."""
    bar = TrainingBar(console)
    trainer.add_callback(bar)
    try:
        with named_memory_errors(trainer.args):
            trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    finally:
        bar.close()
