"""What a response about the embedded world says it sees, apart from its answer, and which of its words decide.

Read from the words alone: the tiny policy was taught a grammar (`appo.world.teacher`) that names shape, colour and
second of what it looks at, and then repeats them. Descriptions of wanderers, of events that «do not matter» and the
conclusion are left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from appo.world.world import COLOURS, DISTRACTORS, MAX_SECONDS, SHAPES

SECONDS = tuple(str(second) for second in range(MAX_SECONDS))
NAMES = frozenset((*SHAPES, *COLOURS, *SECONDS))
# How the teacher's sentences about other events go on.
ASIDES = ("is not it", "beside the point", "leave out")


@dataclass(frozen=True)
class Description:
    """All shapes, colours and seconds that a response says it sees, as words."""

    shapes: frozenset[str]
    colours: frozenset[str]
    seconds: frozenset[str]


def describe(text: str) -> Description:
    """What is named between <think> and the conclusion; nothing where there is no <think>."""
    thought = text.partition("<think>")[2].partition("</think>")[0]
    sentences = [sentence.split() for sentence in thought.split(".") if sentence.strip()]
    named = {word for sentence in sentences[:-1] if _is_claim(sentence) for word in sentence}
    return Description(*(frozenset(named.intersection(names)) for names in (SHAPES, COLOURS, SECONDS)))


def described_rightly(metadata: Mapping[str, Any], text: str) -> tuple[bool, bool]:
    """Whether a response says rightly *what* the event asked about looks like, and *when* it is.

    Right means: its true shape and colour (its second) are named, and nothing else is. In this world an event lasts one
    second, so *when* is also a temporal IoU of 1, and anything else one of at most 1/2.

    Args:
        metadata: of a question of the embedded world.
        text: the response.
    """
    event, said = metadata["events"][metadata["asked"]], describe(text)
    what = said.shapes == {event["shape"]} and said.colours == {event["colour"]}
    return what, said.seconds == {str(event["second"])}


def decisive_words(words: Sequence[str]) -> list[bool]:
    """Which words of a response decide its answer: the oracle of credit.

    Those that name a shape, colour or second in the sentence that commits to an event (the first that claims any) and
    in the one after it, which reports; and the word in <answer>. Everything else is paraphrase, or repeats them.
    """
    decisive, committed = [False] * len(words), -1
    for number, sentence in enumerate(_sentences(words)):
        claims = _is_claim([words[place] for place in sentence])
        named = [place for place in sentence if claims and words[place] in NAMES]
        if committed < 0 and named:
            committed = number
        for place in named if number <= committed + 1 else ():
            decisive[place] = True
    opened = words.index("<answer>") + 1 if "<answer>" in words else len(words)
    closed = words.index("</answer>", opened) if "</answer>" in words[opened:] else len(words)
    decisive[opened:closed] = [True] * (closed - opened)
    return decisive


def _sentences(words: Sequence[str]) -> list[list[int]]:
    """The places of each sentence's words, up to the full stop or the end of the thought."""
    sentences: list[list[int]] = [[]]
    for place, word in enumerate(words):
        sentences[-1].append(place)
        if word in (".", "</think>"):
            sentences.append([])
    return sentences


def _is_claim(sentence: Sequence[str]) -> bool:
    """Whether a sentence is about the event looked at, not about a wanderer or another event."""
    wanders = any(a in COLOURS and b in DISTRACTORS for a, b in itertools.pairwise(sentence))
    return not wanders and not any(aside in " ".join(sentence) for aside in ASIDES)
