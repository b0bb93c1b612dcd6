"""What the multiple-choice datasets share: options and the letter of the right one."""

from __future__ import annotations

from appo.data.row import NO_OPTION, OUT_OF_RANGE, Row

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def letter_at(row: Row, name: str, options: tuple[str, ...]) -> str:
    """The letter of an answer given as an index from 0."""
    number = row.number(name)
    if number not in range(min(len(options), len(LETTERS))):
        fix = f"give the index of an option, 0 to {len(options) - 1}"
        raise row.error(f"`{name}` is {row.value(name)!r}", fix, OUT_OF_RANGE)
    return LETTERS[int(number)]


def letter_of(row: Row, name: str, options: tuple[str, ...]) -> str:
    """The letter of an answer given as the text of an option."""
    text = row.text(name).strip()
    stripped = [option.strip() for option in options]
    if text not in stripped[: len(LETTERS)]:
        problem = f"`{name}` is {text!r}, none of the options {list(options)!r}"
        raise row.error(problem, "correct one of the two", NO_OPTION)
    return LETTERS[stripped.index(text)]


def five_options(row: Row) -> tuple[str, ...]:
    """The columns a0 to a4 of NExT-QA and NExT-GQA."""
    return tuple(row.text(f"a{index}") for index in range(5))
