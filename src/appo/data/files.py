"""Annotation files -> rows that know where they stand: JSON lists, JSON lines and csv, here or behind a URL.

All but a JSON *object* is read row by row, so that a file of any size takes the memory of a row.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

CHUNK = 1 << 20  # characters of a JSON list read at once
_SUFFIXES = (".json", ".jsonl", ".csv")


@dataclass(frozen=True)
class Row:
    """One row of an annotation file, and where it stands; what it lacks is named by the errors of its getters."""

    place: str
    fields: Mapping[str, Any]

    def error(self, problem: str, fix: str) -> ValueError:
        """The error of this row: place, what is wrong, what to do."""
        return ValueError(f"{self.place}: {problem}; {fix}")

    def value(self, name: str) -> Any:
        """A field that must be there and hold something."""
        value = self.fields.get(name)
        if value is None or value == "":
            problem = f"`{name}` is empty" if name in self.fields else f"there is no field `{name}`"
            raise self.error(problem, f"add it (the row has {', '.join(self.fields) or 'no fields'})")
        return value

    def text(self, name: str) -> str:
        """A text that is not empty; numbers are written out."""
        return self._text(name, self.value(name))

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts."""
        values = self.value(name)
        if not isinstance(values, list):
            raise self.error(f"`{name}` is {values!r}", "write it as a list of texts")
        return tuple(self._text(name, value) for value in values)

    def number(self, name: str) -> float:
        """A finite number, also one written as text (as csv has it)."""
        return self._number(name, self.value(name))

    def spans(self, name: str, pairs: Any = None) -> tuple[tuple[float, float], ...]:
        """(start, end) pairs of seconds, of a field or given; starts a little before 0 (rounding) become 0."""
        pairs = self.value(name) if pairs is None else pairs
        if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            raise self.error(f"`{name}` is {pairs!r}", "write it as a list of [start, end] seconds")
        spans = tuple((max(0.0, self._number(name, start)), self._number(name, end)) for start, end in pairs)
        for start, end in spans:
            if end < start:
                raise self.error(f"`{name}` has a span from {start} to {end} seconds", "put its start before its end")
        return spans

    def metadata(self, *names: str) -> dict[str, Any]:
        """Those of the named fields that the row has."""
        return {name: self.fields[name] for name in names if self.fields.get(name) is not None}

    def _text(self, name: str, value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value).strip():
            raise self.error(f"`{name}` holds {value!r}", "write a text that is not empty")
        text = str(value)
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise self.error(f"`{name}` holds half a character ({text!a})", "write whole characters")
        return text

    def _number(self, name: str, value: Any) -> float:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise self.error(f"`{name}` holds {value!r}", "write a number")
        return number


def is_url(path: str) -> bool:
    """Whether a path is read through fsspec (``hf://datasets/...``, ``s3://...``)."""
    return "://" in path


def is_file(path: str) -> bool:
    """Whether a path names an annotation file rather than a folder of them, by its suffix."""
    return path.endswith(_SUFFIXES)


def file_in(annotations: str, name: str) -> str:
    """The file itself, or the one of this name in the folder."""
    if is_file(annotations):
        return annotations
    if not is_url(annotations) and Path(annotations).is_file():
        raise ValueError(f"{annotations}: name annotation files .json, .jsonl or .csv, which says how they are read")
    return join(annotations, name)


def join(folder: str, name: str) -> str:
    """A path in a folder; folders may be URLs, names may be absolute."""
    name = name.removeprefix("./")
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else str(Path(folder) / name)


def parent(path: str) -> str:
    """The folder of a file."""
    return path.rsplit("/", 1)[0] if is_url(path) else str(Path(path).parent)


def stem(path: str) -> str:
    """The name of a file without folder and suffix."""
    return path.replace("\\", "/").rsplit("/", 1)[-1].rsplit(".", 1)[0]


def exists(path: str) -> bool:
    """Whether there is such a file or folder."""
    if not is_url(path):
        return Path(path).exists()
    with _named(path):
        return bool(_fsspec().url_to_fs(path)[0].exists(path))


def rows_of_file(path: str) -> Iterator[Row]:
    """The rows of a file, read as its suffix says: ``.jsonl`` JSON lines, ``.json`` one JSON list, ``.csv``.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is not of its format; names file and line.
    """
    read = _json_lines if path.endswith(".jsonl") else _csv_rows if path.endswith(".csv") else _json_list
    with open_text(path) as file:
        try:
            yield from read(path, file)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error}); convert it to UTF-8") from None


def read_object(path: str) -> dict[str, Any]:
    """A file that is one JSON object, read as a whole."""
    with open_text(path) as file:
        try:
            value = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path}: no JSON ({error}); download or write it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}; an object {{key: ...}} is expected")
    return value


def open_text(path: str) -> AbstractContextManager[TextIO]:
    """Open a text file, local or behind a URL; a byte order mark is skipped.

    Raises:
        OSError: it cannot be opened.
    """
    how: dict[str, Any] = {"encoding": "utf-8-sig", "newline": ""}
    with _named(path):
        opened = _fsspec().open(path, "r", **how).open() if is_url(path) else open(path, **how)  # noqa: SIM115
    return cast("AbstractContextManager[TextIO]", opened)


@contextmanager
def _named(path: str) -> Iterator[None]:
    """What goes wrong with a path becomes an OSError that names it: each file system has errors of its own."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file; check the path of the annotations") from None
    except Exception as error:
        if not is_url(path):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise OSError(f"{path}: cannot be opened ({reason}); correct the URL, or download the file") from error


def _fsspec() -> Any:
    import fsspec.core  # type: ignore[import-untyped]

    return fsspec.core


def _json_lines(path: str, file: TextIO) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: no JSON ({error}); write one JSON object a line") from None
        yield _row(place, fields)


def _json_list(path: str, file: TextIO) -> Iterator[Row]:
    """The objects of one JSON list, decoded one after the other."""
    scanner, index = _Scanner(file), 0

    def wrong(problem: str) -> ValueError:
        return ValueError(
            f"{path}, index {index}: {problem}; write one list [{{...}}, ...], or name JSON lines `.jsonl`"
        )

    if scanner.mark() != "[":
        raise wrong("the file does not start with `[`")
    mark = scanner.mark()
    while mark != "]":
        if mark != "{":
            raise wrong(f"an object is expected, not {mark!r}" if mark else "the list does not end")
        try:
            fields = scanner.value()
        except (ValueError, RecursionError) as error:
            raise wrong(f"no JSON ({getattr(error, 'msg', error)})") from None
        yield _row(f"{path}, index {index}", fields)
        index += 1
        mark = scanner.mark()
        if mark == ",":
            mark = scanner.mark()
        elif mark != "]":
            raise wrong(f"`,` or `]` is expected, not {mark!r}" if mark else "the list does not end")
    if rest := scanner.mark():
        raise wrong(f"there is {rest!r} behind the list")


class _Scanner:
    """The text of a file, of which only what has not been decoded is held."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._text, self._at, self._size = file, "", 0, CHUNK

    def mark(self) -> str:
        """Step over white space and one character, which is returned; "" at the end."""
        while True:
            while self._at < len(self._text):
                self._at += 1
                if not self._text[self._at - 1].isspace():
                    return self._text[self._at - 1]
            if not self._more():
                return ""

    def value(self) -> Any:
        """Decode the value that starts at the last mark."""
        self._at -= 1
        while True:
            try:
                value, self._at = json.JSONDecoder().raw_decode(self._text, self._at)
            except json.JSONDecodeError:
                if not self._more():
                    raise
            else:
                self._size = CHUNK
                return value

    def _more(self) -> bool:
        chunk = self._file.read(self._size)
        self._text, self._at = self._text[self._at :] + chunk, 0
        self._size *= 2  # so that a value of any length is tried a few times only
        return bool(chunk)


def _csv_rows(path: str, file: TextIO) -> Iterator[Row]:
    reader = csv.DictReader(file, strict=True)
    try:
        for fields in reader:
            row = Row(f"{path}, line {reader.line_num}", fields)
            if None in fields or None in fields.values():
                raise row.error("the row has not as many columns as the header", "quote commas within texts")
            yield row
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: no csv ({error}); write it again") from None


def _row(place: str, fields: Any) -> Row:
    if not isinstance(fields, dict):
        raise ValueError(f"{place}: holds a {type(fields).__name__}; write an object {{field: value, ...}}")
    return Row(place, fields)
