"""Files that are whole or absent, whatever happens while they are written: a kill, a full disk, a power cut."""

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
        with suppress(OSError):
            part.unlink()
        raise OSError(error.errno, error.strerror, str(file)) from error
