"""Response -> its answer: strictly, for rewards and headline scores, or leniently, for evaluation only.

Strict parsing takes the prompt's own format (`FORMATS`). The lenient score, beside the strict one, shows how much of a
low score is the format. Lenient parsing does not know the gold answer, never raises, never scores below the strict
one, and takes time linear in the length of the response.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from appo.rewards.scorers import parse_number
from appo.rewards.templates import (
    FORMATS,
    ParsedResponse,
    answer_letter,
    normalize_words,
    option_texts,
    parse_grounded_response,
    parse_response,
    parse_spans,
)

if TYPE_CHECKING:
    from appo.types import VideoQA

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_TAG = re.compile(r"</?(?:think|answer|time)>", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\s{0,3}\{(?:\\(?:text|textbf|mathrm|mathbf)\s{0,3}\{)?([^{}]*)\}")
_ANSWER_IS = re.compile(r"\banswer[*_]{0,2}(?:\s{1,3}(?:is|would\s{1,3}be)\b\s{0,3}[:=]?|\s{0,3}[:=])", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[\w)*])[.!?]\s")
_LETTER = re.compile(r"(?<![\w'’-])([A-Z])(?![\w'’-])(\s{1,3}[a-z])?")
_NUMBER = re.compile(r"(?<![\w.,])[-+−]?[$€£¥]?[0-9][0-9,]{0,63}(?:\.[0-9]{1,63})?(?:[eE][+-]?[0-9]{1,2})?")
_SECONDS = r"[0-9]{1,9}(?:\.[0-9]{1,9})?(?:\s{0,3}(?:s|secs?|seconds?)\b)?"
_SPAN = re.compile(rf"[\[(][^\[\]()]{{1,80}}[\])]|(?<![\w.:]){_SECONDS}\s{{0,3}}(?:-|–|to)\s{{0,3}}{_SECONDS}(?![\w:])")
_WRAPPING = " \t\r\n*_`\"'“”«»$"
_LONGEST_ANSWER = 200  # characters of an answer behind «the answer is»
_LONGEST_SEARCHED = 10_000  # characters, from the end, in which answers and times are searched
_Tags = list[tuple[int, int, str]]  # start, end and lower-case name of each tag


def strict_answer(text: str, response_format: str | None = None) -> ParsedResponse | None:
    """A response's parts if it is exactly of a format, one of `FORMATS` (None: ``answer``); else None.

    Raises:
        ValueError: there is no such format.
    """
    response_format = "answer" if response_format is None else response_format
    if not isinstance(response_format, str) or response_format not in FORMATS:
        raise ValueError(f"`response_format` is {response_format!r}: it must be one of {', '.join(FORMATS)}")
    return FORMATS[response_format](text)


def lenient_answer(text: str, question: VideoQA) -> ParsedResponse:
    """The answer of a response in any format, and for a question with spans the time.

    The answer is searched in the last ``<answer>``, closed or not; else behind the thought; else in the whole response.
    There, in the last ``\\boxed{}``, or behind the last ``answer is`` or ``Answer:``. Of a text that is more than the
    answer, the only letter or option's text is taken (for a number the only number); two of them are no answer.
    ``think`` stays empty, and so does ``time`` where there is none.
    """
    parsed = parse_grounded_response(text) or parse_response(text)
    tags = [(match.start(), match.end(), match[0].lower()) for match in _TAG.finditer(text)]
    body = _after_thought(text, tags)
    answer = parsed.answer if parsed else _pointed_at(_last_block(text, tags, "<answer>") or body)
    if not parsed and question.kind == "word":
        answer = _SENTENCE_END.split(answer, maxsplit=1)[0].strip(_WRAPPING + ".")
    time = _time(_last_block(text, tags, "<time>") or body)
    return ParsedResponse("", _of_kind(answer, question), time if question.spans else "")


def _last_block(text: str, tags: _Tags, name: str) -> str:
    """The text from the last opening tag of a name with text behind it to the next tag, if any."""
    for index in range(len(tags) - 1, -1, -1):
        if tags[index][2] == name:
            end = tags[index + 1][0] if index + 1 < len(tags) else len(text)
            if found := text[tags[index][1] : end].strip():
                return found
    return ""


def _after_thought(text: str, tags: _Tags) -> str:
    """The text behind the last ``</think>``, or all of it where nothing is there; tags left out."""
    start = max((end for _, end, name in tags if name == "</think>"), default=0)
    return _TAG.sub(" ", text[start:]).strip() or _TAG.sub(" ", text).strip()


def _pointed_at(text: str) -> str:
    """The part of a text that it calls its answer; the whole text where there is none."""
    if boxed := _BOXED.findall(text):
        return str(boxed[-1])
    ends = [match.end() for match in _ANSWER_IS.finditer(text)]
    rest = text[ends[-1] : ends[-1] + _LONGEST_ANSWER].strip(_WRAPPING) if ends else ""
    return rest.partition("\n")[0] or text


def _of_kind(answer: str, question: VideoQA) -> str:
    """The only letter, number or option in an answer; unchanged where it is one already, or has none or several."""
    options = question.options
    if question.kind == "letter" and not answer_letter(answer, options):
        find = _only_letter
    elif question.kind in ("number", "regression", "mra") and not parse_number(answer):
        find = _only_number
    elif question.kind == "word" and normalize_words(answer) not in map(normalize_words, option_texts(options)):
        find = _only_option
    else:
        return answer
    pointed = _pointed_at(answer)[-_LONGEST_SEARCHED:]
    first_sentence = _SENTENCE_END.split(pointed, maxsplit=1)[0]
    return find(pointed, options) or find(first_sentence, options) or answer


def _only_letter(text: str, options: Sequence[str]) -> str | None:
    """The one letter that a text names, by letter, option's text or both; None for none or several.

    A capital A before a word may be an article (and I a pronoun), which names nothing.
    """
    text = text.strip(_WRAPPING)
    if letter := answer_letter(text, options):
        return letter
    valid = _LETTERS[: len(options)] or _LETTERS
    found = [(match[1], match[1] in "AI" and bool(match[2])) for match in _LETTER.finditer(text) if match[1] in valid]
    named = {letter for letter, _ in found}
    sure = {letter for letter, is_word in found if not is_word}
    if sure and len(named) > 1:
        return None
    by_text = {_LETTERS[place] for place in _mentioned(text, options)}
    return (sure | by_text).pop() if len(sure | by_text) == 1 else None


def _only_option(text: str, options: Sequence[str]) -> str | None:
    """The only option whose words are in a text."""
    places = _mentioned(text, options)
    return option_texts(options)[places[0]] if len(places) == 1 else None


def _mentioned(text: str, options: Sequence[str]) -> list[int]:
    """Indices of the options whose words are in a text; words within a longer option's are not counted."""
    text = normalize_words(text)
    wanted = [normalize_words(option) for option in option_texts(options)]
    places: list[int] = []
    for words in sorted(set(filter(None, wanted)), key=len, reverse=True):
        text, count = re.subn(rf"(?<!\w){re.escape(words)}(?!\w)", "\0", text)
        places += [place for place, option in enumerate(wanted) if count and option == words]
    return places


def _only_number(text: str, options: Sequence[str]) -> str | None:
    """The one number in a text, in figures and without its unit."""
    found = {
        number: match[0].rstrip(",")
        for match in _NUMBER.finditer(text)
        if (number := parse_number(match[0].rstrip(",")))
    }
    return found.popitem()[1] if len(found) == 1 else None


def _time(text: str) -> str:
    """The time spans of a text, for `parse_spans`; empty where there are none."""
    if parse_spans(text):
        return text
    return ", ".join(match[0] for match in _SPAN.finditer(text[-_LONGEST_SEARCHED:]) if parse_spans(match[0]))
