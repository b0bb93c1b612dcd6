"""Files written whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from appo.files import atomic_write
from tests.support.full_disk import largest_file


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a.txt", "ä\n")
    assert (tmp_path / "a.txt").read_bytes() == "ä\n".encode()
    atomic_write(tmp_path / "a.txt", b"\x00")
    assert (tmp_path / "a.txt").read_bytes() == b"\x00"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_others_may_read_it_as_they_may_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    atomic_write(tmp_path / "whole", "")
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("before", [None, "old"])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, before: str | None) -> None:
    file = tmp_path / "a.txt"
    if before:
        file.write_text(before)
    with largest_file(100), pytest.raises(OSError, match="File too large") as caught:
        atomic_write(file, "x" * 200)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(file))
    assert {one.name: one.read_text() for one in tmp_path.iterdir()} == ({"a.txt": before} if before else {})


def test_until_it_is_whole_its_name_leads_to_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the moment of the sync everything is written, and the name is still that of the old file."""
    file = tmp_path / "a.txt"
    file.write_text("old")
    sizes: list[tuple[str, int]] = []

    def sync(descriptor: int) -> None:
        sizes.append((file.read_text(), os.fstat(descriptor).st_size))

    monkeypatch.setattr(os, "fsync", sync)
    atomic_write(file, "new!")
    assert sizes == [("old", 4)]
    assert file.read_text() == "new!"
