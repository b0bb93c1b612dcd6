"""The exact reasoner of the embedded world: reads the words of a description and answers by rules. Stdlib only.

It is right wherever the description holds the answer and nothing that contradicts it; else it guesses, always alike
for the same words. Told to know some tasks only, it guesses at the others: a weaker reasoner.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Sequence

from appo.experiments.study.scenes import SECONDS, Seen, events_in
from appo.world.world import COLOURS, SHAPES, TASKS

_QUESTIONS = {
    "colour": re.compile(r"what colour is the (\w+) \?"),
    "shape": re.compile(r"what shape is the (\w+) one \?"),
    "first": re.compile(r"which came first , the (\w+) or the (\w+) \?"),
    "when": re.compile(r"when does the (\w+) appear \?"),
}


def rule_answer(question: str, description: str, known: Collection[str] = TASKS) -> str:
    """The answer of one word.

    Args:
        question: of the embedded world.
        description: anybody's words; those that name no shape, colour or second say nothing here.
        known: tasks that are answered by rules; at others it guesses.

    Raises:
        ValueError: the question is none of the embedded world's.
    """
    for task, pattern in _QUESTIONS.items():
        if match := pattern.fullmatch(question):
            found = _FOUND[task](events_in(description), match.groups()) if task in known else ""
            return found or random.Random(f"{question}/{description}").choice(_values(task, match.groups()))
    raise ValueError(f"the rules answer questions of the embedded world, and {question!r} is none")


def _colour(events: Sequence[Seen], names: Sequence[str]) -> str:
    return next((event.colour for event in events if event.shape == names[0] and event.colour), "")


def _shape(events: Sequence[Seen], names: Sequence[str]) -> str:
    return next((event.shape for event in events if event.colour == names[0] and event.shape), "")


def _when(events: Sequence[Seen], names: Sequence[str]) -> str:
    return next((event.second for event in events if event.shape == names[0] and event.second), "")


def _first(events: Sequence[Seen], names: Sequence[str]) -> str:
    """The earlier of the two; the one that is told of at all where the other is not."""
    seconds = {name: int(said) for name in names if (said := _when(events, [name]))}
    if not seconds or (len(seconds) == 2 and len(set(seconds.values())) == 1):
        return ""
    return min(seconds, key=lambda name: seconds[name])


_FOUND: dict[str, Callable[[Sequence[Seen], Sequence[str]], str]] = {
    "colour": _colour,
    "shape": _shape,
    "first": _first,
    "when": _when,
}


def _values(task: str, names: Sequence[str]) -> Sequence[str]:
    return {"colour": COLOURS, "shape": SHAPES, "first": names, "when": SECONDS}[task]
