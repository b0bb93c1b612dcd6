"""Scenes and questions. Standard library only; everything follows from a seed.

A clip is a muted background with moving distractors, a clock bar along the bottom edge, and a few *events*: a
coloured glyph that appears in one of four cells for exactly one second. A question needs one event (or the order of
two); the others mislead.

One second is one frame of the language model: clips are sampled at 2 frames per second and Qwen2.5-VL
merges two sampled frames into one temporal patch.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

SHAPES = ("star", "heart", "cross", "moon", "arrow", "diamond", "triangle", "square")
COLOURS = ("red", "green", "blue", "yellow", "pink", "cyan", "orange", "purple")
DISTRACTORS = ("ball", "ring", "bar")
TASKS = ("colour", "shape", "first", "when")

MAX_SECONDS = 12  # the clock bar has this many segments, so a second is drawn alike in short and long clips
CELLS = 4  # 2 x 2, one merged vision token each

FAMILIAR_TEXTURES = ("plain", "gradient", "stripes", "checks")
NEW_TEXTURES = ("clouds", "waves", "rays")

# Every shape and every colour misses one partner: 8 of 64 pairs, in neither level 1 nor the warm start.
HELD_OUT_PAIRS = frozenset((SHAPES[i], COLOURS[(3 * i + 1) % 8]) for i in range(8))


@dataclass(frozen=True)
class Dials:
    """How hard a clip is."""

    seconds: int = 8  # length of the clip, at most `MAX_SECONDS`
    events: tuple[int, int] = (2, 3)  # smallest and largest number of events
    distractors: tuple[int, int] = (1, 2)  # smallest and largest number of wandering shapes
    textures: tuple[str, ...] = FAMILIAR_TEXTURES  # background families to draw from
    noise: float = 0.0  # standard deviation of pixel noise, in grey levels of 255
    held_out: float = 0.0  # probability that an event is one of `HELD_OUT_PAIRS`; 0 excludes them altogether


# The ladder of SEED-Bench-R1: in distribution, new surroundings, and a harder task in new surroundings.
LEVELS = {
    "L1": Dials(),
    "L2": Dials(textures=NEW_TEXTURES, noise=10.0, held_out=0.5),
    "L3": Dials(seconds=12, events=(3, 4), distractors=(3, 4), textures=NEW_TEXTURES, noise=10.0, held_out=0.5),
}


@dataclass(frozen=True)
class Event:
    """A glyph of one colour in one cell (0-3, row by row) during one second.

    `dx`, `dy` in [-1, 1] move it within its cell, `size` in [0, 1] goes from small to large.
    """

    shape: str
    colour: str
    second: int
    cell: int
    dx: float
    dy: float
    size: float


@dataclass(frozen=True)
class Distractor:
    """A small shape that bounces between the edges: start in [0, 1]², speed in widths a second."""

    shape: str
    colour: str
    x: float
    y: float
    vx: float
    vy: float

    def position(self, seconds: float) -> tuple[float, float]:
        """Where it is, (x, y) in [0, 1]², after `seconds`."""
        return _bounce(self.x + self.vx * seconds), _bounce(self.y + self.vy * seconds)


@dataclass(frozen=True)
class Scene:
    """One clip before it is drawn. `events` are in order of time; `pixel_seed` fixes background and noise."""

    seconds: int
    events: tuple[Event, ...]
    distractors: tuple[Distractor, ...]
    texture: str
    noise: float
    pixel_seed: int


@dataclass(frozen=True)
class Question:
    """A question about a scene."""

    task: str  # one of `TASKS`
    text: str  # its words
    answer: str  # one word
    target: int  # index of the event that gives the answer
    evidence: tuple[int, ...]  # indices of all events that are needed, `target` first


def dials_of(level: str) -> Dials:
    """The difficulty of a level of `LEVELS`. Raises ValueError if there is none of the name."""
    if level not in LEVELS:
        raise ValueError(f"unknown level {level!r}; there are {', '.join(LEVELS)}")
    return LEVELS[level]


def make_scene(dials: Dials, rng: random.Random) -> Scene:
    """Draw a scene. Its events differ in shape, colour and second, and no distractor shares their colours.

    Raises:
        ValueError: when the dials ask for more seconds or events than there can be.
    """
    if not 1 <= dials.seconds <= MAX_SECONDS:
        raise ValueError(f"a clip lasts 1 to {MAX_SECONDS} seconds, got seconds={dials.seconds}")
    if dials.events[1] > min(dials.seconds, 6):
        raise ValueError(f"at most {min(dials.seconds, 6)} events fit, got events={dials.events}")
    pairs = _draw_pairs(rng.randint(*dials.events), dials.held_out, rng)
    seconds = sorted(rng.sample(range(dials.seconds), len(pairs)))
    events = tuple(
        Event(shape, colour, second, rng.randrange(CELLS), _unit(rng), _unit(rng), round(rng.random(), 3))
        for (shape, colour), second in zip(pairs, seconds, strict=True)
    )
    free = [colour for colour in COLOURS if colour not in {event.colour for event in events}]
    distractors = tuple(_draw_distractor(free, rng) for _ in range(rng.randint(*dials.distractors)))
    texture = rng.choice(dials.textures)
    return Scene(dials.seconds, events, distractors, texture, dials.noise, rng.getrandbits(32))


def make_question(scene: Scene, task: str, rng: random.Random) -> Question:
    """Ask about one event of the scene; «first» names two and the earlier one answers."""
    events = scene.events
    if task == "first":
        early, late = sorted(rng.sample(range(len(events)), 2))
        names = [events[early].shape, events[late].shape]
        rng.shuffle(names)
        text = f"which came first , the {names[0]} or the {names[1]} ?"
        return Question(task, text, events[early].shape, early, (early, late))
    target = rng.randrange(len(events))
    event = events[target]
    text = {
        "colour": f"what colour is the {event.shape} ?",
        "shape": f"what shape is the {event.colour} one ?",
        "when": f"when does the {event.shape} appear ?",
    }[task]
    return Question(task, text, answer_of(event, task), target, (target,))


def answer_of(event: Event, task: str) -> str:
    """The answer to a task according to this event, right or wrong."""
    return {"colour": event.colour, "shape": event.shape, "first": event.shape, "when": str(event.second)}[task]


def _draw_pairs(count: int, held_out: float, rng: random.Random) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    while len(pairs) < count:
        if rng.random() < held_out:
            pair = rng.choice(sorted(HELD_OUT_PAIRS))
        else:
            pair = (rng.choice(SHAPES), rng.choice(COLOURS))
            if pair in HELD_OUT_PAIRS:
                continue
        if all(pair[0] != shape and pair[1] != colour for shape, colour in pairs):
            pairs.append(pair)
    return pairs


def _draw_distractor(colours: list[str], rng: random.Random) -> Distractor:
    place = [round(rng.random(), 3) for _ in range(2)]
    speed = [rng.choice((-1, 1)) * round(rng.uniform(0.05, 0.3), 3) for _ in range(2)]
    return Distractor(rng.choice(DISTRACTORS), rng.choice(colours), *place, *speed)


def _unit(rng: random.Random) -> float:
    return round(rng.uniform(-1, 1), 3)


def _bounce(x: float) -> float:
    return 1.0 - abs(x % 2.0 - 1.0)
