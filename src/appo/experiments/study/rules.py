"""The exact reasoner of the embedded world: reads the words of a description and answers by rules. Stdlib only.

It is right wherever the description holds the answer and nothing that contradicts it; else it guesses, always alike
for the same words. Told to know some tasks only, it guesses at the others: a weaker reasoner.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Sequence

from appo.experiments.study.scenes import SECONDS, Event, events_in
from appo.world.world import COLOURS, SHAPES, TASKS

_QUESTIONS = {
    "colour": re.compile(r"what colour is the (\w+) \?"),
    "shape": re.compile(r"what shape is the (\w+) one \?"),
    "first": re.compile(r"which came first , the (\w+) or the (\w+) \?"),
    "when": re.compile(r"when does the (\w+) appear \?"),
}
_LOOKED_UP = {"colour": ("shape", "colour"), "shape": ("colour", "shape"), "when": ("shape", "second")}  # by what, what


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
            names, events = match.groups(), events_in(description)
            found = ""
            if task in known:
                found = _earlier(events, names) if task == "first" else _look_up(events, names[0], *_LOOKED_UP[task])
            choices = {"colour": COLOURS, "shape": SHAPES, "first": names, "when": SECONDS}[task]
            return found or random.Random(f"{question}/{description}").choice(choices)
    raise ValueError(f"the rules answer questions of the embedded world, and {question!r} is none")


def _look_up(events: Sequence[Event], name: str, by: str, wanted: str) -> str:
    """An attribute of the first event that has another; empty where it is not said."""
    values = (getattr(event, wanted) for event in events if getattr(event, by) == name)
    return next(filter(None, values), "")


def _earlier(events: Sequence[Event], names: Sequence[str]) -> str:
    """The earlier of the two; the one that is told of at all where the other is not."""
    seconds = {name: int(said) for name in names if (said := _look_up(events, name, "shape", "second"))}
    if not seconds or (len(seconds) == 2 and len(set(seconds.values())) == 1):
        return ""
    return min(seconds, key=lambda name: seconds[name])
