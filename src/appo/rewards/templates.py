"""The prompt templates and the parsers of their answers.

A prompt requests ``<think>...</think><answer>...</answer>``, for grounded questions followed by ``<time>...</time>``.
The parser accepts exactly that: a more lenient parser would reward a policy for leaving the format.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from appo.types import VideoQA

# Raised by one whenever prompts or parsing change: scores of two versions do not compare.
PROMPT_VERSION = 1
PARSER_VERSION = 1

INSTRUCTION = (
    "First reason about what the video shows inside <think> and </think>."
    " Then give your final answer inside <answer> and </answer>:"
    " only the letter of the right option, or only the words asked for if there are no options."
)
GROUNDED_INSTRUCTION = (
    f"{INSTRUCTION} Last, give the time in seconds in which the answer can be seen inside <time> and </time>,"
    " as [start, end]; if it is seen several times, as [start, end], [start, end]."
)

# What closes the prompt for each of `FORMATS`.
INSTRUCTIONS = {"answer": INSTRUCTION, "grounded": GROUNDED_INSTRUCTION}

_BLOCKS = ("think", "answer")
_GROUNDED_BLOCKS = ("think", "answer", "time")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LETTER_ALONE = re.compile(r"\(?([A-Za-z])\)?[.:]?")
_LETTER_LABEL = re.compile(r"(?:\(([A-Z])\)|([A-Z])[.):])[.:]?\s*")

_SECONDS = r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(?:\s*(?:s|secs?|seconds?)\b)?"
_PAIR = rf"\s*{_SECONDS}\s*(?:,|-|–|to)\s*{_SECONDS}\s*"
_SPAN = re.compile(rf"\[{_PAIR}\]|\({_PAIR}\)|{_SECONDS}\s*(?:-|–|to)\s*{_SECONDS}")
_DIVIDER = re.compile(r"\s*(?:[,;]\s*(?:and\b\s*)?|and\b\s*|\n\s*)")
_LIST_OPENING = re.compile(r"\[\s*[\[(]")


@dataclass(frozen=True)
class ParsedResponse:
    """A response of the format; its parts without surrounding white space, ``time`` empty where there is none."""

    think: str
    answer: str
    time: str = ""


def build_messages(qa: VideoQA, *, instruction: str = INSTRUCTION) -> list[dict[str, Any]]:
    """The chat of one question: a single user turn of video, image (if any) and text.

    Args:
        qa: the question with its options.
        instruction: what closes the text; ``""`` leaves it out.

    Returns:
        Messages for a chat template: ``[{"role": "user", "content": [part, ...]}]``; the video part is
        :meth:`appo.types.VideoSource.to_part`.

    Raises:
        ValueError: the question has neither video nor image, or too many options to letter.
    """
    if not (qa.video or qa.image):
        raise ValueError(f"question {qa.id!r} has neither a video nor an image: give one of the two")
    video = [qa.video.to_part()] if qa.video else []
    image = [{"type": "image", "image": qa.image}] if qa.image else []
    text = "\n".join(filter(None, [qa.question, *lettered(qa.options), instruction]))
    return [{"role": "user", "content": [*video, *image, {"type": "text", "text": text}]}]


def parse_response(text: str) -> ParsedResponse | None:
    """The two parts of a response, or None if it is not exactly of the format.

    Only white space is around or between the two blocks, each tag is there once, in order and in lower case, and the
    answer is not empty. Linear in the length of the text.
    """
    blocks = _split_blocks(text, _BLOCKS)
    return ParsedResponse(*blocks) if blocks and blocks[1] else None


def parse_grounded_response(text: str) -> ParsedResponse | None:
    """The same for grounded questions: ``<think>...</think><answer>...</answer><time>...</time>``.

    As strict as `parse_response`, and the time must be spans that `parse_spans` can read.
    """
    blocks = _split_blocks(text, _GROUNDED_BLOCKS)
    return ParsedResponse(*blocks) if blocks and blocks[1] and parse_spans(blocks[2]) else None


# The parsers, by the names in the column `response_format`.
FORMATS: dict[str, Callable[[str], ParsedResponse | None]] = {
    "answer": parse_response,
    "grounded": parse_grounded_response,
}


def parse_spans(text: str) -> list[tuple[Fraction, Fraction]] | None:
    """The time spans of a text that has nothing else, in seconds and exactly as written; or None.

    One span is ``[3.2, 5]``, ``(3.2, 5)``, ``3.2 - 5`` or ``3.2 to 5``; the last two may stand in brackets too. A time
    is digits with or without a decimal point, and may carry its unit: ``s``, ``sec`` or ``seconds``. Several spans are
    divided by a comma, a semicolon, ``and`` or a line break; if they are in brackets, so may be the whole list. They
    may overlap. None for anything else, such as negative times, times of more than nine digits before or behind the
    point, ``1:05``, and a span that ends before it starts. Linear in the length of the text.
    """
    text = text.strip()
    if _LIST_OPENING.match(text) and text.endswith("]"):
        text = text[1:-1].strip()
    spans: list[tuple[Fraction, Fraction]] = []
    place = 0
    while match := _SPAN.match(text, place):
        start, end = (Fraction(time) for time in match.groups() if time)
        if end < start:
            return None
        spans.append((start, end))
        if match.end() == len(text):
            return spans
        divider = _DIVIDER.match(text, match.end())
        if divider is None:
            return None
        place = divider.end()
    return None


def _split_blocks(text: str, names: Sequence[str]) -> list[str] | None:
    """The text in ``<name>...</name>`` of each name, if the text is these blocks in order and nothing else."""
    text = text.strip()
    tags = [tag for name in names for tag in (f"<{name}>", f"</{name}>")]
    if any(text.count(tag) != 1 for tag in tags):
        return None
    # Each tag is there once: in order, the blocks are neither nested nor doubled.
    starts = [text.find(tag) for tag in tags]
    ends = [start + len(tag) for start, tag in zip(starts, tags, strict=True)]
    if starts != sorted(starts) or starts[0] != 0 or ends[-1] != len(text):
        return None
    if any(text[end:start].strip() for end, start in zip(ends[1:-1:2], starts[2::2], strict=True)):
        return None
    return [text[end:start].strip() for end, start in zip(ends[::2], starts[1::2], strict=True)]


def lettered(options: Sequence[str]) -> list[str]:
    """The options in a prompt, ``"A. ..."``; unchanged if they have their letters already."""
    if len(options) > len(_LETTERS):
        raise ValueError(f"{len(options)} options cannot be lettered: at most {len(_LETTERS)} are supported")
    if _are_lettered(options):
        return list(options)
    return [f"{letter}. {option}" for letter, option in zip(_LETTERS, options, strict=False)]


def answer_letter(answer: str, options: Sequence[str]) -> str | None:
    """The letter that an answer to a multiple-choice question names, or None if it names none.

    Accepted are ``B``, ``b``, ``(B)``, ``B.``, ``B. text`` and the text of one option, but no letter beyond the options
    and no letter with the text of *another* option. A letter alone is a letter even where it is also the text of an
    option. Without options every letter is valid.
    """
    answer = answer.strip()
    valid = _LETTERS[: len(options)] or _LETTERS
    if alone := _LETTER_ALONE.fullmatch(answer):
        letter = alone[1].upper()
        return letter if letter in valid else None
    by_text = _letter_of_text(answer, options)
    if by_text or not (label := _LETTER_LABEL.match(answer)):
        return by_text
    letter = label[1] or label[2]
    contradicted = _letter_of_text(answer[label.end() :], options) not in (None, letter)
    return letter if letter in valid and not contradicted else None


def option_texts(options: Sequence[str]) -> list[str]:
    """The options without their letters, if they have them."""
    if not _are_lettered(options):
        return list(options)
    return [_LETTER_LABEL.sub("", option, count=1) for option in options]


def normalize_words(text: str) -> str:
    """Text for comparison: without case, doubled or outer white space, and closing punctuation."""
    words = " ".join(text.casefold().split())
    return words.rstrip(" .,;:!?") or words


def _letter_of_text(text: str, options: Sequence[str]) -> str | None:
    """The letter of the only option with this text, or None."""
    wanted = normalize_words(text)
    found = [i for i, option in enumerate(option_texts(options)) if normalize_words(option) == wanted]
    return _LETTERS[found[0]] if len(found) == 1 and found[0] < len(_LETTERS) else None


def _are_lettered(options: Sequence[str]) -> bool:
    """Whether the options have the letters A, B, C ... in order."""
    labels = [_LETTER_LABEL.match(option) for option in options]
    letters = [label and (label[1] or label[2]) for label in labels]
    return letters == list(_LETTERS[: len(options)])
