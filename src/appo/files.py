"""Files and folders that are whole or absent, whatever ends the writing: a kill, a full disk, a power cut."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

PART = ".part"  # how the name of a file ends that is being written


def atomic_write(file: Path, content: str | bytes) -> None:
    """Write beside the file, then rename: its name leads to what was there before or to all of the content.

    Args:
        file: to write; its folder exists.
        content: bytes, or text that becomes UTF-8.

    Raises:
        OSError: it cannot be written, by its own name; nothing is left beside it.
    """
    part = file.with_name(f"{file.name}.{uuid4().hex}{PART}")
    try:
        with part.open("xb") as handle:
            handle.write(content.encode() if isinstance(content, str) else content)
            handle.flush()
            os.fsync(handle.fileno())
        part.replace(file)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def rename_folder(written: Path, final: Path) -> None:
    """Give a folder its name once everything in it is on the disk.

    Raises:
        OSError: it cannot be synced or renamed; a folder of that name that is not empty stays as it is.
    """
    files = [path for path in written.rglob("*") if path.is_file()]
    for path in (*files, *{file.parent for file in files}):
        _sync(path)
    written.rename(final)
    _sync(final.parent)


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
