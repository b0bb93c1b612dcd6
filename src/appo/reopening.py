"""The run folder of `appo train`: a new one, or the one that is there, to go on where its last checkpoint is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appo.checkpoints import CheckpointError, last_complete, resumable
from appo.config import APPOConfig
from appo.records import CONFIG, RunFolder
from appo.resuming import LAST

# Settings that change where a run writes and what it shows, but none of its numbers.
_MAY_DIFFER = frozenset({
    "output_dir", "resume_from_checkpoint", "save_strategy", "save_steps", "save_total_limit", "report_to", "run_name",
    "project", "trackio_space_id", "logging_dir", "disable_tqdm", "log_level", "log_level_replica", "push_to_hub",
    "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision",
    "dataloader_num_workers", "dataloader_pin_memory", "decode_timeout", "max_faulty_videos",
})  # fmt: skip
_HORIZON = frozenset({"max_steps", "num_train_epochs"})


@dataclass(frozen=True)
class Opened:
    """A run's folder, the checkpoint it goes on from (None: from the beginning), and what to tell the user."""

    folder: RunFolder
    checkpoint: Path | None
    notes: tuple[str, ...] = ()


def open_run(config: APPOConfig, settings: Mapping[str, Any]) -> Opened:
    """The folder that the settings name, ready to be trained into.

    With ``resume_from_checkpoint: true`` (or ``last``) a run goes on from its last complete checkpoint, from its
    beginning if it was killed before the first one, and is begun if there is none. A path names a checkpoint.

    Args:
        config: the settings of training.
        settings: all settings, as they are recorded.

    Raises:
        appo.records.RecordError: the folder is used, or holds a run with other settings; each is named.
        appo.checkpoints.CheckpointError: the run cannot go on, and why.
    """
    path, wanted = Path(config.output_dir), str(config.resume_from_checkpoint or "false")
    to_last = wanted.lower() in LAST
    if wanted.lower() == "false" or (to_last and not (path / CONFIG).exists()):
        return Opened(RunFolder.create(path, settings), None)
    # How long a run is decides what its steps are, unless the learning rate stays as it is.
    constant = config.lr_scheduler_type in ("constant", "constant_with_warmup")
    folder = RunFolder.resume(path, settings, _MAY_DIFFER | _HORIZON if constant else _MAY_DIFFER)
    if not to_last:
        checkpoint: Path | None = resumable(Path(wanted), path)
        notes = [f"going on from {checkpoint}"]
    else:
        checkpoint, notes = _last(path, config)
    folder.append_resume(settings, checkpoint.name if checkpoint else None)
    if checkpoint is None:
        folder.rewind({})  # what belongs to a checkpoint is known once it is loaded
    return Opened(folder, checkpoint, tuple(notes))


def _last(path: Path, config: APPOConfig) -> tuple[Path | None, list[str]]:
    """The last complete checkpoint and what to say about it."""
    last = last_complete(path)
    if last.path is not None:
        return last.path, [*(f"passed over {damaged}" for damaged in last.damaged), f"going on from {last.path}"]
    if last.damaged:
        raise CheckpointError(
            f"{path}: no complete checkpoint ({'; '.join(last.damaged)}); move or delete what is damaged to begin again"
        )
    if config.save_strategy == "no":
        raise CheckpointError(f"{path}: the run writes no checkpoints (save_strategy is no); begin again elsewhere")
    return None, ["no checkpoint yet: from the beginning"]
