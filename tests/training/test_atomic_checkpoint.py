"""Checkpoints on disk are complete or absent; what is damaged is named and passed over."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from appo.training.atomic_checkpoint import (
    PARTIAL,
    CheckpointError,
    last_complete,
    named_write_errors,
    problem,
    resumable,
    seal,
    start_partial,
    write_manifest,
)


def written(run: Path, step: int, *, resumable: bool = True) -> Path:
    """A checkpoint as a trainer writes it."""
    partial = start_partial(run) / f"checkpoint-{step}"
    (partial / "sub").mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"weights" * step)
    (partial / "sub" / "part").write_bytes(b"")
    write_manifest(partial, resumable=resumable)
    seal(partial, run / partial.name)
    return run / partial.name


def test_the_last_complete_checkpoint_is_found_by_its_step(tmp_path: Path) -> None:
    assert last_complete(tmp_path).path is None
    for step in (9, 10, 2):
        written(tmp_path, step)
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-11").touch()
    assert last_complete(tmp_path).path == tmp_path / "checkpoint-10"
    assert not (tmp_path / PARTIAL).exists()


def test_a_checkpoint_cut_anywhere_while_it_was_written_does_not_exist(tmp_path: Path) -> None:
    good = written(tmp_path, 1)
    for files in ((), ("model.safetensors",), ("model.safetensors", "manifest.json")):
        partial = start_partial(tmp_path) / "checkpoint-2"
        partial.mkdir()
        for name in files:
            (partial / name).write_bytes(b"half")
        assert last_complete(tmp_path).path == good
        assert last_complete(tmp_path).damaged == ()
    assert written(tmp_path, 2) == last_complete(tmp_path).path, "what a killed run left is in nobody's way"


DAMAGE = {
    "cut": (lambda c: (c / "model.safetensors").write_bytes(b"wei"), "model.safetensors has 3 bytes, not 14"),
    "gone": (lambda c: (c / "sub" / "part").unlink(), "sub/part is missing"),
    "no manifest": (lambda c: (c / "manifest.json").unlink(), "it has no manifest.json, so it is incomplete or not wr"),
    "half a manifest": (lambda c: (c / "manifest.json").write_text('{"files": {'), "its manifest.json is damaged"),
    "no sizes": (lambda c: (c / "manifest.json").write_text('{"files": 3}'), "its manifest.json is damaged"),
    "deleted": (shutil.rmtree, "there is no such folder"),
}


@pytest.mark.parametrize(("damage", "says"), DAMAGE.values(), ids=DAMAGE.keys())
def test_what_was_damaged_later_is_named_and_passed_over(tmp_path: Path, damage, says: str) -> None:
    good, bad = written(tmp_path, 1), written(tmp_path, 2)
    damage(bad)
    assert says in str(problem(bad))
    found = last_complete(tmp_path)
    assert found.path == good
    assert [str(bad) in line and says in line for line in found.damaged] == [True] * bad.exists()
    with pytest.raises(CheckpointError, match="checkpoint-2: cannot be resumed from: "):
        resumable(bad, tmp_path)


def test_a_model_alone_cannot_be_resumed_from(tmp_path: Path) -> None:
    assert problem(written(tmp_path, 1, resumable=False)) == "it holds the model only (save_only_model)"


def test_an_earlier_checkpoint_is_not_gone_back_to_over_later_ones(tmp_path: Path) -> None:
    early, _, _ = written(tmp_path, 5), written(tmp_path, 10), written(tmp_path, 7)
    with pytest.raises(CheckpointError, match=r"has gone on since \(checkpoint-7, checkpoint-10\); move or delete"):
        resumable(early, tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-7")
    (tmp_path / "checkpoint-10" / "model.safetensors").write_bytes(b"half")
    assert resumable(early, tmp_path) == early, "nothing is lost with a damaged one"


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    written(tmp_path, 3)
    (tmp_path / "checkpoint-3" / "model.safetensors").write_bytes(b"")
    assert problem(written(tmp_path, 3)) is None
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


@pytest.mark.parametrize("good", ["checkpoint-1", None])
def test_what_cannot_be_written_is_one_line_that_says_from_where_to_go_on(tmp_path: Path, good: str | None) -> None:
    if good:
        written(tmp_path, 1)
    with pytest.raises(CheckpointError) as raised, named_write_errors(tmp_path / "checkpoint-2"):
        start_partial(tmp_path)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    message = str(raised.value)
    assert "checkpoint-2: cannot be written (No space left on device)" in message
    assert ("checkpoint-1 is complete" if good else "there is no earlier checkpoint") in message
    assert "\n" not in message
    assert not (tmp_path / PARTIAL).exists(), "the space is given back"


def test_other_errors_are_not_blamed_on_the_disk(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="of ours"), named_write_errors(tmp_path / "checkpoint-2"):
        raise RuntimeError("a bug of ours")


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    refused = pytest.raises(
        CheckpointError, match=r"run/checkpoint-1: cannot be written \((Not a directory|File exists)\)"
    )
    with refused, named_write_errors(tmp_path / "run" / "checkpoint-1"):
        start_partial(tmp_path / "run")
