"""Files of JSON lines that survive a kill: a line is written at once, a torn last one is tolerated."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class RecordError(ValueError):
    """A run folder cannot be written or read. One line that names the path, what is wrong and the fix."""


class TornLineWarning(UserWarning):
    """The last line of a file was left unfinished, as by a killed run; it was skipped."""


def append_line(file: Path, data: Any) -> None:
    """Add one JSON line and hand it to the operating system at once."""
    line = json.dumps(data, allow_nan=False, separators=(",", ":")) + "\n"
    try:
        _mend_end(file)
        with file.open("ab") as handle:
            handle.write(line.encode("ascii"))
    except OSError as error:
        raise unwritable(file, error) from error


def _mend_end(file: Path) -> None:
    """Complete or remove the torn last line of a killed run, before the next line is appended."""
    if not file.exists() or not file.stat().st_size:
        return
    with file.open("r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        if handle.read() == b"\n":
            return
        handle.seek(0)
        content = handle.read()
        start = content.rfind(b"\n") + 1
        if parse_line(content[start:]) is not None:
            handle.write(b"\n")
            return
        handle.truncate(start)
    warnings.warn(f"{file}: the torn last line was removed", TornLineWarning, stacklevel=4)


def read_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each line; blank lines are skipped, and so is a torn last line."""
    try:
        if not file.exists():
            return
        with file.open("rb") as handle:
            for number, line in enumerate(handle, start=1):
                data = parse_line(line)
                if data is not None:
                    yield number, data
                elif line.strip():
                    if any(rest.strip() for rest in handle):
                        raise damaged(file, number, "no JSON object")
                    message = f"{file}, line {number}: the last line is torn and was skipped"
                    warnings.warn(message, TornLineWarning, stacklevel=3)
    except OSError as error:
        raise RecordError(f"{file}: cannot be read ({reason(error)}); check the path and its rights") from error


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line, or None."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def sync(file: Path) -> int:
    """Sync a file to the disk; returns its size in bytes, 0 if there is none. Raises RecordError."""
    try:
        if not file.exists():
            return 0
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
            return file.stat().st_size
    except OSError as error:
        raise unwritable(file, error) from error


def cut(file: Path, size: int) -> None:
    """Truncate a file to its first bytes. Raises RecordError if it has fewer, or cannot be written."""
    found = file.stat().st_size if file.exists() else 0
    if found < size:
        raise RecordError(f"{file}: has {found} bytes, but had {size} when the checkpoint was taken; restore the file")
    try:
        if found > size:
            os.truncate(file, size)
    except OSError as error:
        raise unwritable(file, error) from error


def damaged(file: Path, number: int, problem: str) -> RecordError:
    """The error about a damaged line."""
    return RecordError(f"{file}, line {number}: damaged ({problem}); delete this line or restore the file")


def check_unused(folder: Path) -> None:
    """Raise RecordError unless a run can start in the folder: it is not there yet, or empty."""
    try:
        used = folder.exists() and any(folder.iterdir())
    except OSError as error:
        raise unwritable(folder, error) from error
    if used:
        raise RecordError(f"{folder}: the run folder is not empty; choose another one, or move or delete this one")


def unwritable(path: Path, error: OSError) -> RecordError:
    """The error about a full disk or a missing right."""
    return RecordError(f"{path}: cannot be written ({reason(error)}); check its rights and the free space")


def reason(error: OSError) -> str:
    """The system's message."""
    return error.strerror or type(error).__name__
