"""Annotation files -> rows with their places: JSON lists, JSON lines and csv, local or behind a URL.

All but a JSON *object* is read row by row, so that a file of any size takes the memory of a row. A row that cannot be
read carries its fault, so that the other rows are read nevertheless.
"""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TextIO, cast

from appo.data.row import Row, RowError

CHUNK = 1 << 20  # characters of a JSON list read at once
ONE_OF_TWO = "leave one of the two"
_SUFFIXES = (".json", ".jsonl", ".csv")


class RepeatedKeyError(ValueError):
    """A JSON object has a key twice; Python would silently keep the last value."""

    def __init__(self, key: str, fields: Mapping[str, Any]) -> None:
        super().__init__(f"the key `{key}` stands twice")
        self.fields = fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise RepeatedKeyError(_repeated([key for key, _ in pairs]), fields)
    return fields


def _repeated(names: Sequence[str]) -> str:
    """The first name that is there more than once, or ""."""
    return next((name for name, count in Counter(names).items() if count > 1), "")


_DECODER = json.JSONDecoder()
_UNIQUE = json.JSONDecoder(object_pairs_hook=_unique)


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
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else os.path.join(folder, name)


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
    """The rows of a file, by its suffix: ``.jsonl`` JSON lines, ``.json`` one JSON list, ``.csv``.

    Rows that cannot be read carry their fault. A JSON list ends at the first place that is no JSON.

    Raises:
        OSError: there is no such file, or it cannot be read.
    """
    read = _json_lines if path.endswith(".jsonl") else _csv_rows if path.endswith(".csv") else _json_list
    with open_text(path) as file:
        yield from read(path, file)


def with_fields(rows: Iterator[Row], more: Callable[[Row], Mapping[str, Any]]) -> Iterator[Row]:
    """Rows with more fields, from other files; a RowError of `more` becomes the row's fault."""
    for row in rows:
        if row.fault is None:
            try:
                row = Row(row.place, {**row.fields, **more(row)}, row.index)
            except RowError as error:
                row = Row(row.place, index=row.index, fault=error)
        yield row


def read_object(path: str) -> dict[str, Any]:
    """A file that is one JSON object, read as a whole."""
    with open_text(path) as file:
        try:
            value = _UNIQUE.decode(file.read())
        except RepeatedKeyError as error:
            raise ValueError(f"{path}: {error} in {json.dumps(error.fields)[:60]}; {ONE_OF_TWO}") from None
        except ValueError as error:
            raise ValueError(f"{path}: no JSON ({error}); download or write it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}; an object {{key: ...}} is expected")
    return value


def open_text(path: str) -> AbstractContextManager[TextIO]:
    """Open a text file, local or behind a URL; a byte order mark is skipped. Raises OSError.

    A byte that is not UTF-8 becomes half a character, so that it spoils its own row only (see `_foreign_byte`).
    """
    options: dict[str, Any] = {"encoding": "utf-8-sig", "errors": "surrogateescape", "newline": ""}
    with _named(path):
        opened = _fsspec().open(path, "r", **options).open() if is_url(path) else open(path, **options)  # noqa: SIM115
    return cast("AbstractContextManager[TextIO]", opened)


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Every error becomes an OSError that names the path: each file system has its own errors."""
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
    lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
    for index, (number, line) in enumerate(lines):
        place = f"{path}, line {number}"
        try:
            yield _row(place, index, _UNIQUE.decode(line), line)
        except RepeatedKeyError as error:
            yield _row(place, index, error, line)
        except (ValueError, RecursionError) as error:
            yield Row(place, index=index).faulty(f"no JSON ({error})", "write one JSON object a line")


def _json_list(path: str, file: TextIO) -> Iterator[Row]:
    """The objects of one JSON list, decoded one after the other."""
    scanner, index = _Scanner(file), 0

    def broken(problem: str) -> Row:
        fix = "write one list [{...}, ...], or name JSON lines `.jsonl`"
        return Row(f"{path}, index {index}", index=index).faulty(f"{problem}; nothing behind it can be read", fix)

    if scanner.mark() != "[":
        yield broken("the file does not start with `[`")
        return
    mark = scanner.mark()
    while mark != "]":
        if not mark:
            yield broken("the list does not end")
            return
        try:
            value, text = scanner.value()
        except (ValueError, RecursionError) as error:
            yield broken(f"no JSON ({getattr(error, 'msg', error)})")
            return
        yield _row(f"{path}, index {index}", index, value, text)
        index += 1
        mark = scanner.mark()
        if mark == ",":
            mark = scanner.mark()
        elif mark != "]":
            yield broken(f"`,` or `]` is expected, not {mark!r}" if mark else "the list does not end")
            return
    if rest := scanner.mark():
        yield broken(f"there is {rest!r} behind the list")


class _Scanner:
    """The text of a file; only what has not been decoded is in memory."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._text, self._at, self._size = file, "", 0, CHUNK

    def mark(self) -> str:
        """Skip white space and return the next character; "" at the end."""
        while True:
            while self._at < len(self._text):
                self._at += 1
                if not self._text[self._at - 1].isspace():
                    return self._text[self._at - 1]
            if not self._more():
                return ""

    def value(self) -> tuple[Any, str]:
        """The value that starts at the last mark, or its `RepeatedKeyError`; and its text."""
        self._at -= 1
        repeated: RepeatedKeyError | None = None
        while True:
            try:
                value, end = (_DECODER if repeated else _UNIQUE).raw_decode(self._text, self._at)
            except RepeatedKeyError as error:
                repeated = error  # the end of the value is needed nevertheless
            except json.JSONDecodeError:
                if not self._more():
                    raise
            else:
                if end == len(self._text) and self._more():  # a number may go on
                    continue
                self._size = CHUNK
                text, self._at = self._text[self._at : end], end
                return repeated or value, text

    def _more(self) -> bool:
        chunk = self._file.read(self._size)
        self._text, self._at = self._text[self._at :] + chunk, 0
        self._size *= 2  # so that a value of any length is tried a few times only
        return bool(chunk)


def _csv_rows(path: str, file: TextIO) -> Iterator[Row]:
    reader = csv.reader(file, strict=True)
    header: list[str] | None = None
    index = 0
    while True:
        first = reader.line_num + 1
        try:
            values = next(reader, None)
        except csv.Error as error:  # the reader goes on with the next line
            lines = f"line {first}" if reader.line_num <= first else f"lines {first} to {reader.line_num}"
            yield Row(f"{path}, {lines}", index=index).faulty(f"no csv ({error})", "write it again")
            index += 1
            continue
        if values is None:
            return
        if header is None:
            header = values
            if name := _repeated([name for name in header if name]):
                yield Row(f"{path}, line {first}").faulty(f"the column `{name}` stands twice", ONE_OF_TWO)
                return
        elif values:
            place = f"{path}, line {reader.line_num}"
            if len(values) == len(header):
                yield _row(place, index, dict(zip(header, values, strict=True)), "".join(values))
            else:
                problem = "the row has not as many columns as the header"
                yield Row(place, index=index).faulty(problem, "quote commas within texts")
            index += 1


def _row(place: str, index: int, fields: Any, text: str) -> Row:
    """The row that was read from a text, or its fault."""
    if isinstance(fields, RepeatedKeyError):
        return Row(place, index=index).faulty(str(fields), ONE_OF_TWO)
    if byte := _foreign_byte(text):
        return Row(place, index=index).faulty(f"not UTF-8 text (byte {byte})", "convert the file to UTF-8")
    if not isinstance(fields, dict):
        problem = f"holds {json.dumps(fields)[:60]}, which is no object"
        return Row(place, index=index).faulty(problem, "write {field: value, ...}")
    return Row(place, fields, index)


def _foreign_byte(text: str) -> str:
    """The first byte of a text that is not UTF-8, as `open_text` lets it through, or ""."""
    if text.isascii():
        return ""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"0x{ord(text[error.start]) & 0xFF:02x}"
    return ""
