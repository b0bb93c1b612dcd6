"""Scenes of the embedded world in words: exact, blurred, and read back. Standard library only.

What is said of an event are its shape, its colour and the second in which it is there.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from appo.world.world import COLOURS, DISTRACTORS, MAX_SECONDS, SHAPES

SENTENCE = "there is the {colour} {shape} at {second} ."
SECONDS = tuple(str(second) for second in range(MAX_SECONDS))
_WORD = re.compile(r"[a-z]+|\d+")


class Event(NamedTuple):
    """What a description says of one event; empty: not said."""

    shape: str = ""
    colour: str = ""
    second: str = ""


def scene_in_words(metadata: Mapping[str, Any]) -> str:
    """The exact description of a scene: a sentence an event, in order of time.

    Args:
        metadata: of a question of the embedded world.
    """
    return " ".join(SENTENCE.format(**event) for event in metadata["events"])


def blurred(description: str, share: float, seed: str, seconds: int) -> str:
    """A description in which each attribute is, with probability ``share``, a wrong one.

    A word that is said twice is wrong in both places alike, and what is wrong at a small share is just as wrong at all
    larger ones.

    Args:
        description: words of the embedded world; all others stay.
        share: 0 to 1.
        seed: of the question.
        seconds: length of the clip; wrong seconds lie within it.
    """

    def seen(match: re.Match[str]) -> str:
        word = match[0]
        kind: Sequence[str] = next((names for names in (SHAPES, COLOURS, SECONDS[:seconds]) if word in names), ())
        rng = random.Random(f"{seed}/{word}")
        if not kind or rng.random() >= share:
            return word
        return rng.choice([name for name in kind if name != word])

    return _WORD.sub(seen, description)


def events_in(description: str) -> list[Event]:
    """The events that a description tells of, in order; what several sentences say of one event is put together.

    A sentence goes on about an event if it repeats something of it and contradicts nothing; one that names a single
    attribute («its colour is pink») is about the first event. Wanderers are left out.
    """
    events: list[Event] = []
    for sentence in re.split(r"[.!?](?:\s|$)|\n", description.lower()):
        words = _WORD.findall(sentence)
        said = Event(*(next((word for word in words if word in names), "") for names in (SHAPES, COLOURS, SECONDS)))
        wanders = any(a in COLOURS and b in DISTRACTORS for a, b in itertools.pairwise(words))
        if wanders or not any(said):
            continue
        agreeing = [i for i, event in enumerate(events) if not _contradict(event, said)]
        place = next((i for i in agreeing if set(filter(None, said)) & set(events[i])), None)
        if place is None and 0 in agreeing and sum(map(bool, said)) == 1:
            place = 0
        if place is None:
            events.append(said)
        else:
            events[place] = Event(*(new or old for new, old in zip(said, events[place], strict=True)))
    return events


def _contradict(one: Event, other: Event) -> bool:
    return any(a and b and a != b for a, b in zip(one, other, strict=True))
