"""The texts of a study: prompts, descriptions taken from responses, scenes of the embedded world, rules that read them.

A perceiver gets the question without its options: it cannot name the letter of one. A reasoner never gets the video.
Standard library only.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from appo.rewards.templates import lettered
from appo.types import VideoQA
from appo.world.world import COLOURS, DISTRACTORS, MAX_SECONDS, SHAPES, TASKS

# --- prompts and descriptions ----------------------------------------------------------------------------------------


# Increased whenever the prompts below, or `description_of`, change.
DESCRIPTION_VERSION = 1
REASONING_VERSION = 1

DESCRIBE = (
    "Somebody who cannot see this video will be asked: {question}\n"
    "Describe what the video shows as far as it matters for that, with the times in seconds at which it is seen."
    " Describe only: do not answer the question."
)
REASON = (
    "A video, described by somebody who saw it:\n{description}\n\n{question}\n\n"
    "Answer from this description alone, even where it leaves you to guess. Give your final answer inside <answer> and"
    " </answer>: {wanted}."
)
WANTED = {
    True: "only the letter of the right option",
    False: "only the word, number or words asked for",
}
NOTHING = "(nothing)"

_THOUGHT = re.compile(r"<think>(.*?)(?:</think>|\Z)", re.DOTALL)
_ANSWER = re.compile(r"<(answer|time)>.*?(?:</\1>|\Z)", re.DOTALL)
_TAG = re.compile(r"</?(?:think|answer|time)>")
# How an answer is announced, by the tiny policy's teacher (`appo.world.teacher.CONCLUSIONS`) and by others.
_CONCLUSION = re.compile(r"\banswer\b|\btherefore\b|\bthat settles it\b|\bi will say\b|\\boxed", re.IGNORECASE)


def describing_prompt(question: VideoQA) -> str:
    """The prompt of a perceiver, beside the video."""
    return DESCRIBE.format(question=question.question)


def reasoning_prompt(question: VideoQA, description: str) -> str:
    """The prompt of a reasoner."""
    text = "\n".join([question.question, *lettered(question.options)])
    return REASON.format(description=description or NOTHING, question=text, wanted=WANTED[bool(question.options)])


def description_of(response: str) -> str:
    """The description in a response, without its answer and every sentence that announces one.

    Of a response of only a thought and an answer, it is the thought without its last sentence, which concludes.
    """
    outside = _ANSWER.sub(" ", _THOUGHT.sub(" ", response))
    sentences = _sentences(_TAG.sub(" ", outside))
    if not sentences:
        sentences = _sentences(_TAG.sub(" ", " ".join(_THOUGHT.findall(response))))[:-1]
    return " ".join(sentence for sentence in sentences if not _CONCLUSION.search(sentence))


def _sentences(text: str) -> list[str]:
    """Not empty, without outer white space; a full stop within a number ends none."""
    parts = re.split(r"(?<=[.!?])\s+|\n+", text)
    return [" ".join(part.split()) for part in parts if part.strip(" \t\r\n.!?")]


# --- scenes of the embedded world in words ---------------------------------------------------------------------------


SENTENCE = "there is the {colour} {shape} at {second} ."
SECONDS = tuple(str(second) for second in range(MAX_SECONDS))
_WORD = re.compile(r"[a-z]+|\d+")


class Event(NamedTuple):
    """The attributes of one event in a description; empty: not described."""

    shape: str = ""
    colour: str = ""
    second: str = ""


def scene_in_words(metadata: Mapping[str, Any]) -> str:
    """The exact description of a scene, by a question's metadata: one sentence per event, in order of time."""
    return " ".join(SENTENCE.format(**event) for event in metadata["events"])


def blurred(description: str, share: float, seed: str, seconds: int) -> str:
    """A description in which each attribute is replaced by a wrong one with probability ``share``.

    Equal words are replaced alike, and a word that is wrong at a small share is equally wrong at all larger ones. Wrong
    seconds lie within the clip's ``seconds``; words of no attribute stay.
    """

    def replaced(match: re.Match[str]) -> str:
        word = match[0]
        kind: Sequence[str] = next((names for names in (SHAPES, COLOURS, SECONDS[:seconds]) if word in names), ())
        rng = random.Random(f"{seed}/{word}")
        if not kind or rng.random() >= share:
            return word
        return rng.choice([name for name in kind if name != word])

    return _WORD.sub(replaced, description)


def events_in(description: str) -> list[Event]:
    """The events of a description in order, each merged from all sentences about it.

    A sentence is about a known event if it repeats some of its attributes and contradicts none; one that names a single
    attribute («its colour is pink») is about the first event. Wanderers are left out.
    """
    events: list[Event] = []
    for sentence in re.split(r"[.!?](?:\s|$)|\n", description.lower()):
        words = _WORD.findall(sentence)
        found = Event(*(next((word for word in words if word in names), "") for names in (SHAPES, COLOURS, SECONDS)))
        wanders = any(a in COLOURS and b in DISTRACTORS for a, b in itertools.pairwise(words))
        if wanders or not any(found):
            continue
        agreeing = [i for i, event in enumerate(events) if not _contradict(event, found)]
        place = next((i for i in agreeing if set(filter(None, found)) & set(events[i])), None)
        if place is None and 0 in agreeing and sum(map(bool, found)) == 1:
            place = 0
        if place is None:
            events.append(found)
        else:
            events[place] = Event(*(new or old for new, old in zip(found, events[place], strict=True)))
    return events


def _contradict(one: Event, other: Event) -> bool:
    return any(a and b and a != b for a, b in zip(one, other, strict=True))


# --- the exact reasoner of the embedded world ------------------------------------------------------------------------


_QUESTIONS = {
    "colour": re.compile(r"what colour is the (\w+) \?"),
    "shape": re.compile(r"what shape is the (\w+) one \?"),
    "first": re.compile(r"which came first , the (\w+) or the (\w+) \?"),
    "when": re.compile(r"when does the (\w+) appear \?"),
}
# The given attribute of a task and the wanted one.
_ATTRIBUTES = {"colour": ("shape", "colour"), "shape": ("colour", "shape"), "when": ("shape", "second")}


def rule_answer(question: str, description: str, known: Collection[str] = TASKS) -> str:
    """The answer of one word; a guess, equal for equal texts, where the description does not hold it.

    Args:
        question: of the embedded world.
        description: any text; only shapes, colours and seconds matter.
        known: tasks that are answered by rules; other answers are guesses.

    Raises:
        ValueError: the question is not of the embedded world.
    """
    for task, pattern in _QUESTIONS.items():
        if match := pattern.fullmatch(question):
            names, events = match.groups(), events_in(description)
            found = ""
            if task in known:
                found = _earlier(events, names) if task == "first" else _look_up(events, names[0], *_ATTRIBUTES[task])
            choices = {"colour": COLOURS, "shape": SHAPES, "first": names, "when": SECONDS}[task]
            return found or random.Random(f"{question}/{description}").choice(choices)
    raise ValueError(f"the rules answer questions of the embedded world, and {question!r} is none")


def _look_up(events: Sequence[Event], name: str, by: str, wanted: str) -> str:
    """The wanted attribute of the first event with a given one; empty if it is not described."""
    values = (getattr(event, wanted) for event in events if getattr(event, by) == name)
    return next(filter(None, values), "")


def _earlier(events: Sequence[Event], names: Sequence[str]) -> str:
    """The earlier of the two, or the only one that is described; empty if neither is."""
    seconds = {name: int(second) for name in names if (second := _look_up(events, name, "shape", "second"))}
    if not seconds or (len(seconds) == 2 and len(set(seconds.values())) == 1):
        return ""
    return min(seconds, key=lambda name: seconds[name])
