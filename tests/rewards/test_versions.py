"""Prompts and parsers have versions: what changes them without a new version fails here.

If a test of this file fails and the change is wanted, raise the version in `templates` and write the digest that
the message names beside it. Scores of the old version do not compare with those of the new one.
Only where the texts read here became more (`TABLE`, `PIECES`), the digest changes under the same version.
"""

from __future__ import annotations

import hashlib
import json
from itertools import product
from typing import Any

from appo.rewards.answer_parsing import lenient_answer
from appo.rewards.scorers import KINDS
from appo.rewards.templates import FORMATS, INSTRUCTIONS, PARSER_VERSION, PROMPT_VERSION, build_messages, parse_spans
from appo.types import VideoQA, VideoSource
from tests.rewards.test_answer_parsing import PIECES, QUESTIONS, TABLE

PROMPT_DIGESTS = {1: "4ec1ddaba8605bf0"}
PARSER_DIGESTS = {1: "a6b45c413f52df07"}

ASKED = [
    VideoQA("1", VideoSource("clip.mp4"), "What falls?", "B", "letter", ("a red cup", "a blue ball")),
    VideoQA("2", VideoSource("clip.mp4"), "What falls?", "B", "letter", ("A. a red cup", "B. a blue ball")),
    VideoQA("3", VideoSource("clip.mp4"), "How many?", "3", "number"),
    VideoQA("4", VideoSource("clip.mp4"), "What now?", "left", image="now.png"),
    VideoQA("5", None, "What is it?", "a plan", "text", image="plan.png"),
    VideoQA("6", VideoSource("clip.mp4", 1.5, 4.0), "Where is it?", "A", "letter", ("here", "there")),
    VideoQA("7", VideoSource("frames", frames_fps=3.0), "Who left?", "A", "letter", ("he", "she")),
]
SPANS = ["[1, 4]", "(1, 4)", "1 - 4", "1s to 4s", "[1, 4], [6, 8]", "[4, 1]", "1:00 - 2:00", "1, 4", ""]


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def prompts() -> list[Any]:
    """What is asked, in every format."""
    return [build_messages(question, instruction=text) for text in INSTRUCTIONS.values() for question in ASKED]


def readings() -> list[Any]:
    """What is read out of texts, and what it scores: strictly in every format, leniently, spans and kinds."""
    corpus = [text for _, text, _, _ in TABLE]
    corpus += ["".join(pieces) for pieces in product(PIECES, PIECES[::3])]
    corpus += [f"<think>{first}</think><answer>{second}</answer>" for first, second in product(PIECES[::4], PIECES)]
    corpus += [f"<think>a</think><answer>B</answer><time>{spans}</time>" for spans in SPANS]
    found: list[Any] = [[str(parse_spans(text)) for text in SPANS]]
    for text in corpus:
        strict = [str(parse(text)) for parse in FORMATS.values()]
        lenient = [lenient_answer(text, question) for question in QUESTIONS]
        scores = [
            round(KINDS[question.kind](question.answer, question.options)(read.answer), 9)
            for question, read in zip(QUESTIONS, lenient, strict=True)
            if question.kind != "text"  # ROUGE is a library's
        ]
        found.append([strict, [[read.answer, read.time] for read in lenient], scores])
    return found


def test_prompts_change_with_their_version_only() -> None:
    assert PROMPT_DIGESTS.get(PROMPT_VERSION) == digest(prompts()), (
        f"prompts changed: raise PROMPT_VERSION and add {digest(prompts())!r} to PROMPT_DIGESTS"
    )


def test_parsers_change_with_their_version_only() -> None:
    assert PARSER_DIGESTS.get(PARSER_VERSION) == digest(readings()), (
        f"parsers changed: raise PARSER_VERSION and add {digest(readings())!r} to PARSER_DIGESTS"
    )
