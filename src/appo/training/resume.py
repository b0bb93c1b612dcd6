"""The run folder of `appo train`: a new one, or the one that is there, to go on where its last checkpoint is."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from appo.reports.jsonl import check_unused
from appo.reports.run_folder import CONFIG, FRAMES, RunFolder
from appo.rollout.collectives import is_main_process
from appo.training.atomic_checkpoint import LAST, CheckpointError, last_complete, resumable
from appo.training.config import APPOConfig

CLIPS = "clips"  # of the embedded world, in the run folder

# Settings that change where a run writes and what it shows, but none of its numbers.
_MAY_DIFFER = frozenset({
    "output_dir", "resume_from_checkpoint", "save_strategy", "save_steps", "save_total_limit", "report_to", "run_name",
    "project", "trackio_space_id", "logging_dir", "disable_tqdm", "log_level", "log_level_replica", "push_to_hub",
    "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision",
    "dataloader_num_workers", "dataloader_pin_memory", "decode_timeout", "max_faulty_videos",
})  # fmt: skip
_HORIZON = frozenset({"max_steps", "num_train_epochs"})


@dataclass(frozen=True)
class Found:
    """A run's folder before anything is written into it."""

    folder: RunFolder  # of the run
    is_new: bool  # the run has not been begun
    existed: bool = True  # the folder itself is there
    checkpoint: Path | None = None  # that a begun run goes on from; None: from the beginning
    notes: tuple[str, ...] = ()  # what to tell the user


def find_run(config: APPOConfig, settings: Mapping[str, Any]) -> Found:
    """The folder that the settings name, if it can be trained into; nothing is written yet (`begin_run`).

    With ``resume_from_checkpoint: true`` (or ``last``) a run goes on from its last complete checkpoint, from its
    beginning if it was killed before the first one, and is begun if there is none. A path names a checkpoint.

    Args:
        config: the settings of training.
        settings: all settings, as they are recorded.

    Raises:
        appo.reports.run_folder.RecordError: the folder is used, or holds a run with other settings; each is named.
        appo.training.atomic_checkpoint.CheckpointError: the run cannot go on, and why.
    """
    path, wanted = Path(config.output_dir), str(config.resume_from_checkpoint or "false")
    to_last = wanted.lower() in LAST
    if wanted.lower() == "false" or (to_last and not (path / CONFIG).exists()):
        check_unused(path)
        return Found(RunFolder(path), is_new=True, existed=path.exists())
    # How long a run is decides what its steps are, unless the learning rate stays as it is.
    constant = config.lr_scheduler_type in ("constant", "constant_with_warmup")
    folder = RunFolder.resume(path, settings, _MAY_DIFFER | _HORIZON if constant else _MAY_DIFFER)
    if not to_last:
        checkpoint: Path | None = resumable(Path(wanted), path)
        notes = [f"going on from {checkpoint}"]
    else:
        checkpoint, notes = _last(path, config)
    return Found(folder, is_new=False, checkpoint=checkpoint, notes=tuple(notes))


def begin_run(found: Found, settings: Mapping[str, Any]) -> None:
    """Write down that the run begins, or goes on.

    Raises:
        RecordError: it cannot be written, or something else has been written into the folder since.
    """
    if found.is_new:
        RunFolder.create(found.folder.path, settings)
        return
    found.folder.append_resume(settings, found.checkpoint.name if found.checkpoint else None)
    if found.checkpoint is None:
        found.folder.rewind({})  # what belongs to a checkpoint is known once it is loaded


@contextlib.contextmanager
def undone_on_error(found: Found) -> Iterator[None]:
    """A new run that ends in an error before it recorded anything leaves nothing, so that it can be started again."""
    try:
        yield
    except BaseException:
        if found.is_new and is_main_process():
            with contextlib.suppress(OSError):  # what went wrong first is what is said
                _undo(found.folder, found.existed)
        raise


def _undo(folder: RunFolder, existed: bool) -> None:
    """Delete what starting a run makes, if nothing else is there: settings, generated clips, no picture yet."""
    names = {entry.name for entry in folder.path.iterdir()}
    made = {CONFIG, FRAMES, CLIPS}
    if names - made or (folder.frames.is_dir() and any(folder.frames.iterdir())):
        return
    for name in names:
        path = folder.path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not existed:
        folder.path.rmdir()


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
