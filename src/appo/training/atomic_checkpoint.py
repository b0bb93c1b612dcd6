"""Checkpoints on disk: complete or absent, whatever happens while one is written.

_partial/            what is being written; never read, emptied before the next one is begun
checkpoint-STEP/     complete: it got this name by one rename, when everything in it was on the disk
    ...              transformers' own files: model, optimiser, scheduler, random states
    state-RANK.pt    what transformers leaves out, one file a process: see appo/training/trainer_state.py
    manifest.json    step, and the size of every file, so that one damaged later is recognised
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from appo.files import rename_folder

LAST = ("true", "last")  # of ``resume_from_checkpoint``: the last complete checkpoint
PARTIAL, MANIFEST = "_partial", "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(ValueError):
    """A checkpoint cannot be written or resumed from. One line that names it, what is wrong and the fix."""


@dataclass(frozen=True)
class LastCheckpoint:
    """What `last_complete` found: the newest complete checkpoint, and why newer ones were passed over."""

    path: Path | None
    damaged: tuple[str, ...]


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint taken after so many optimiser steps."""
    return f"checkpoint-{step}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name, -1 where the name has none."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


# --- writing -----------------------------------------------------------------------------------------------------


def start_partial(folder: Path) -> Path:
    """An empty folder to write into, under the run's folder; what a killed run left there is deleted."""
    partial = folder / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def write_manifest(checkpoint: Path, *, resumable: bool = True) -> None:
    """List the files of a checkpoint that is otherwise complete. ``resumable``: it has more than the model."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    sizes = {file.relative_to(checkpoint).as_posix(): file.stat().st_size for file in files}
    text = json.dumps({"resumable": resumable, "files": sizes}, indent=1) + "\n"
    (checkpoint / MANIFEST).write_text(text, encoding="utf-8")


def seal(written: Path, final: Path) -> None:
    """Give a written folder its name, in the place of what had it; delete ``_partial``."""
    if final.exists():
        final.rename(written.with_name(f"{written.name}.replaced"))
    rename_folder(written, final)
    shutil.rmtree(final.parent / PARTIAL, ignore_errors=True)


@contextmanager
def named_write_errors(final: Path) -> Iterator[None]:
    """Turn what a full disk or a missing right raises, in any library, into one line; the half-written is deleted.

    Raises:
        CheckpointError: what could not be written, why, and from where the run can go on.
    """
    try:
        yield
    except Exception as error:
        if not _is_write_error(error):
            raise
        shutil.rmtree(final.parent / PARTIAL, ignore_errors=True)
        last = last_complete(final.parent).path
        good = f"{last.name} is complete" if last else "there is no earlier checkpoint"
        raise CheckpointError(
            f"{final}: cannot be written ({_reason(error)}); {good}; check rights and free space, then resume"
        ) from error


@contextmanager
def whole_folder(final: Path, *, is_writer: bool) -> Iterator[Path]:
    """A folder that all processes write into within ``with``, and that gets its name when all of them have.

    Args:
        final: what it is to be; after an error it is what it was.
        is_writer: whether this process makes and renames it; one does.

    Raises:
        CheckpointError: it cannot be written.
    """
    from appo.rollout.collectives import barrier  # loads torch, which finding a checkpoint does not need

    with named_write_errors(final):
        if is_writer:
            start_partial(final.parent)
        barrier()
        written = final.parent / PARTIAL / final.name
        yield written
        barrier()
        if is_writer:
            seal(written, final)
        barrier()


def _is_write_error(error: Exception) -> bool:
    """Whether Python, safetensors or torch could not write a file."""
    in_torch = isinstance(error, RuntimeError) and re.search("PytorchStreamWriter|inline_container", str(error))
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError" or bool(in_torch)


def _reason(error: Exception) -> str:
    """The reason in a few words; torch replaces the system's by its own, which is then its cause or context."""
    for one in (error, error.__cause__, error.__context__):
        if isinstance(one, OSError) and one.strerror:
            return one.strerror
    return re.sub(r"\s+", " ", str(error)).strip()[:160] or type(error).__name__


# --- finding -----------------------------------------------------------------------------------------------------


def problem(checkpoint: Path) -> str | None:
    """Why a run cannot be resumed from a checkpoint; None: it can."""
    if not checkpoint.is_dir():
        return "there is no such folder"
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: int(size) for name, size in manifest["files"].items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it is incomplete or not written by appo"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} is damaged"
    for name, size in sizes.items():
        file = checkpoint / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            return f"{name} is missing" if found is None else f"{name} has {found} bytes, not {size}"
    return None if manifest.get("resumable") else "it holds the model only (save_only_model)"


def last_complete(folder: Path) -> LastCheckpoint:
    """The newest checkpoint of a run that can be resumed from."""
    damaged: list[str] = []
    for checkpoint in sorted(_checkpoints(folder), key=step_of, reverse=True):
        if (wrong := problem(checkpoint)) is None:
            return LastCheckpoint(checkpoint, tuple(damaged))
        damaged.append(f"{checkpoint}: {wrong}")
    return LastCheckpoint(None, tuple(damaged))


def resumable(checkpoint: Path, folder: Path) -> Path:
    """A checkpoint the user named, if the run in ``folder`` can go on from it.

    Raises:
        CheckpointError: it is not complete, or later ones are, which going on would overwrite one by one.
    """
    if wrong := problem(checkpoint):
        raise CheckpointError(f"{checkpoint}: cannot be resumed from: {wrong}")
    later = [other for other in _checkpoints(folder) if step_of(other) > step_of(checkpoint) and not problem(other)]
    if later:
        names = ", ".join(sorted((other.name for other in later), key=lambda name: step_of(Path(name))))
        raise CheckpointError(
            f"{checkpoint}: the run has gone on since ({names}); move or delete those, or resume from the last one"
        )
    return checkpoint


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if path.is_dir() and step_of(path) >= 0]
