"""The prompt template and the parser of its answer: two halves of one contract.

The prompt asks for ``<think>...</think><answer>...</answer>``; the parser accepts exactly that and nothing else,
because a parser more forgiving than its prompt pays a policy for leaving the format.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from appo.types import VideoQA

INSTRUCTION = (
    "First reason about what the video shows inside <think> and </think>."
    " Then give your final answer inside <answer> and </answer>:"
    " only the letter of the right option, or only the words asked for if there are no options."
)

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LETTER_ALONE = re.compile(r"\(?([A-Za-z])\)?[.:]?")
_LETTER_LABEL = re.compile(r"(?:\(([A-Z])\)|([A-Z])[.):])[.:]?\s*")


@dataclass(frozen=True)
class ParsedResponse:
    """A response that kept to the format; both parts without surrounding white space."""

    think: str
    answer: str


def build_messages(qa: VideoQA, *, instruction: str = INSTRUCTION) -> list[dict[str, Any]]:
    """The chat of one question: a single user turn of video, image (if any) and text.

    Args:
        qa: the question with its options.
        instruction: what closes the text; ``""`` leaves it out.

    Returns:
        Messages for a chat template: ``[{"role": "user", "content": [part, ...]}]``.

    Raises:
        ValueError: the question has neither video nor image, or too many options to letter.
    """
    if not (qa.video or qa.image):
        raise ValueError(f"question {qa.id!r} has neither a video nor an image: give one of the two")
    content = []
    if qa.video:
        content.append({"type": "video", "video": qa.video})
    if qa.image:
        content.append({"type": "image", "image": qa.image})
    lines = [qa.question, *lettered(qa.options), instruction]
    content.append({"type": "text", "text": "\n".join(line for line in lines if line)})
    return [{"role": "user", "content": content}]


def parse_response(text: str) -> ParsedResponse | None:
    """Split a response into its two parts, or None if it is not exactly of the format asked for.

    Strict: nothing but white space around or between the two blocks, each tag once, in order and in lower case,
    and an answer that is not empty. Linear in the length of the text.
    """
    text = text.strip()
    if any(text.count(tag) != 1 for tag in _TAGS):
        return None
    # Each tag is there once, so if the four lie in order, the blocks can be neither nested nor doubled.
    think_start, think_end, answer_start, answer_end = (text.find(tag) for tag in _TAGS)
    if not think_start == 0 < think_end < answer_start < answer_end == len(text) - len("</answer>"):
        return None
    if text[think_end + len("</think>") : answer_start].strip():
        return None
    answer = text[answer_start + len("<answer>") : answer_end].strip()
    think = text[len("<think>") : think_end].strip()
    return ParsedResponse(think, answer) if answer else None


def lettered(options: Sequence[str]) -> list[str]:
    """The options as the model sees them, ``"A. ..."``; unchanged if they carry their letters already."""
    if len(options) > len(_LETTERS):
        raise ValueError(f"{len(options)} options cannot be lettered: at most {len(_LETTERS)} are supported")
    if _are_lettered(options):
        return list(options)
    return [f"{letter}. {option}" for letter, option in zip(_LETTERS, options, strict=False)]


def answer_letter(answer: str, options: Sequence[str]) -> str | None:
    """The letter that an answer to a multiple-choice question names, or None if it names none.

    Understood are ``B``, ``b``, ``(B)``, ``B.``, ``B. text`` and the text of one option. A letter beyond the options
    and a letter with the text of *another* option name none. A letter on its own is read as a letter even where
    it is also the text of an option. Without options every letter is valid.
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
    """The options without their letters, if they carry them."""
    if not _are_lettered(options):
        return list(options)
    return [_LETTER_LABEL.sub("", option, count=1) for option in options]


def normalize_words(text: str) -> str:
    """Text as it is compared: without case, doubled or outer white space, and closing punctuation."""
    words = " ".join(text.casefold().split())
    return words.rstrip(" .,;:!?") or words


def _letter_of_text(text: str, options: Sequence[str]) -> str | None:
    """The letter of the only option with this text, or None."""
    wanted = normalize_words(text)
    found = [i for i, option in enumerate(option_texts(options)) if normalize_words(option) == wanted]
    return _LETTERS[found[0]] if len(found) == 1 and found[0] < len(_LETTERS) else None


def _are_lettered(options: Sequence[str]) -> bool:
    """Whether the options carry the letters A, B, C ... in order."""
    labels = [_LETTER_LABEL.match(option) for option in options]
    letters = [label and (label[1] or label[2]) for label in labels]
    return letters == list(_LETTERS[: len(options)])
