"""One row of an annotation file: its place, getters whose errors name it, letters of options."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

# Categories of a row's faults; those that need its video are in `appo.data.validation`.
UNREADABLE, DUPLICATE = "unreadable row", "duplicate"
OUT_OF_RANGE, NO_OPTION = "answer out of range", "options without the answer"

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of options
LONGEST = 1000  # characters of a message; the middle of a longer one is left out


class RowError(ValueError):
    """A row cannot be used. The message names place, problem and fix in one line; `category` is one of those above."""

    def __init__(self, message: str, category: str = UNREADABLE) -> None:
        # Half characters must not end the program when they are printed.
        line = " ".join(message.encode("utf-8", "backslashreplace").decode().split())
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST // 2 - 5]} ... {line[-LONGEST // 2 :]}")
        self.category = category


@dataclass(frozen=True)
class Row:
    """One row."""

    place: str  # file and line, or index, or video
    fields: Mapping[str, Any] = field(default_factory=dict)  # its values
    index: int = 0  # its number in its file, from 0
    fault: RowError | OSError | None = None  # why it cannot be read; raised in place of its question

    def error(self, problem: str, fix: str, category: str = UNREADABLE) -> RowError:
        """An error with this row's place, to be raised."""
        return RowError(f"{self.place}: {problem}; {fix}", category)

    def faulty(self, problem: str, fix: str) -> Row:
        """This row as one that cannot be read."""
        return replace(self, fields={}, fault=self.error(problem, fix))

    def value(self, name: str) -> Any:
        """A field that must be there and not be empty."""
        value = self.fields.get(name)
        if value is None or value == "":
            problem = f"`{name}` is empty" if name in self.fields else f"there is no field `{name}`"
            raise self.error(problem, f"add it (the row has {', '.join(self.fields) or 'no fields'})")
        return value

    def text(self, name: str) -> str:
        """A text that is not empty; numbers are written out."""
        value = self.fields.get(name)
        return value if _is_plain(value) else self._text(name, self.value(name))

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts."""
        values = self.value(name)
        if not isinstance(values, list):
            raise self.error(f"`{name}` is {values!r}", "write it as a list of texts")
        return tuple([value if _is_plain(value) else self._text(name, value) for value in values])

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

    def clip(self, name: str, pair: Any = None) -> tuple[float, float]:
        """(start, end) seconds of the part of a video that is used, of a field or given."""
        ((start, end),) = self.spans(name, [self.value(name) if pair is None else pair])
        if start == end:
            raise self.error(f"`{name}` is {[start, end]}, which is no time", "write [start, end] seconds")
        return start, end

    def event_frames(self) -> tuple[int, ...] | None:
        """The frame indices that ``event_frames`` in the ``metadata`` lists; None where it is not there."""
        frames = self.part("metadata").fields.get("event_frames")
        if frames is None:
            return None
        if not isinstance(frames, list) or any(type(frame) is not int for frame in frames):
            raise self.error(f"`event_frames` in `metadata` is {frames!r}", "write a list of frame indices")
        return tuple(frames)

    def part(self, name: str) -> Row:
        """The object in a field as a row of its own, with the same errors; {} where there is none."""
        fields = self.fields.get(name) or {}
        if not isinstance(fields, dict):
            raise self.error(f"`{name}` is {fields!r}", "write an object {...}")
        return replace(self, fields=fields)

    def letter_at(self, name: str, options: Sequence[str]) -> str:
        """The letter of an answer given as an index from 0."""
        number = self.number(name)
        if number not in range(min(len(options), len(LETTERS))):
            fix = f"give the index of an option, 0 to {len(options) - 1}"
            raise self.error(f"`{name}` is {self.value(name)!r}", fix, OUT_OF_RANGE)
        return LETTERS[int(number)]

    def letter_of(self, name: str, options: Sequence[str]) -> str:
        """The letter of an answer given as the text of an option."""
        text = self.text(name).strip()
        stripped = [option.strip() for option in options]
        if text not in stripped[: len(LETTERS)]:
            problem = f"`{name}` is {text!r}, none of the options {list(options)!r}"
            raise self.error(problem, "correct one of the two", NO_OPTION)
        return LETTERS[stripped.index(text)]

    def metadata(self, *names: str) -> dict[str, Any]:
        """Those of the named fields that the row has."""
        return {name: self.fields[name] for name in names if self.fields.get(name) is not None}

    def _text(self, name: str, value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value).strip():
            raise self.error(f"`{name}` holds {value!r}", "write a text that is not empty")
        text = str(value)
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise self.error(f"`{name}` holds half a character ({text!a})", "write whole characters, in UTF-8")
        return text

    def _number(self, name: str, value: Any) -> float:
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise self.error(f"`{name}` holds {value!r}", "write a number")
        return number


def _is_plain(value: Any) -> TypeGuard[str]:
    """Whether a value is a text as most are, that needs no further check: a short cut."""
    return type(value) is str and value.isascii() and not value.isspace() and value != ""
