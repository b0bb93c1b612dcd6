"""The matrix of combinations: what can be combined in a run, and small sets of cases in which everything meets.

A covering array of strength t holds every t values of any t dimensions together in some case: faults that lie where two
or three parts meet show in a few dozen runs instead of thousands.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields

# What a case can be made of; the first value of each is the plain one.
DIMENSIONS: dict[str, tuple[str, ...]] = {
    "method": ("grpo", "dapo", "appo"),
    "rows": ("video", "text", "picture path", "picture in memory", "mixed", "repeated video", "faulty"),
    "resampling": ("off", "on"),
    "updates": ("one", "steps_per_generation", "num_iterations"),
    "batch": ("one group", "two groups"),
    "peft": ("none", "lora"),
    "layout": ("packed", "chunks", "rows"),
    "truncation": ("kept", "masked"),
    "beta": ("0", "0.04"),
    "reward": ("plain", "with None"),
    "processes": ("one", "ddp", "fsdp2"),
    "tower": ("frozen", "trained"),
    "weights": ("plain", "relative"),
    "checkpointing": ("off", "on"),
    "resume": ("no", "yes"),
}

# Places in DIMENSIONS with a value each.
Tuple = tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        method: of training.
        rows: what the dataset's rows show.
        resampling: DAPO's dynamic sampling.
        updates: optimiser steps of a rollout: one; two of half of it each (``steps_per_generation``); two of all of it.
        batch: groups of a micro-batch, of which a step has two or one.
        peft: all of the language model is trained, or LoRA adapters with dropout.
        layout: groups packed behind one prompt, in chunks of one response, or as ordinary rows.
        truncation: whether responses that did not end are masked.
        beta: of the KL term, so with a reference model where it is not 0.
        reward: a number for every response, or None for some.
        processes: one, or two: whole models (DDP), or parameters in pieces (FSDP2, wrapped as the recipe has it).
        tower: the vision tower's parameters.
        weights: the paper's, or of relative attention, with another base and a mean of one, which all processes share.
        checkpointing: of gradients.
        resume: the run is stopped after its first step and goes on.
    """

    method: str = "grpo"
    rows: str = "video"
    resampling: str = "off"
    updates: str = "one"
    batch: str = "one group"
    peft: str = "none"
    layout: str = "packed"
    truncation: str = "kept"
    beta: str = "0"
    reward: str = "plain"
    processes: str = "one"
    tower: str = "frozen"
    weights: str = "plain"
    checkpointing: str = "off"
    resume: str = "no"

    def __str__(self) -> str:
        """The values that are not the plain ones, and the method."""
        plain = Case()
        named = {"layout", "rows", "processes", "updates", "batch"}
        words = [self.method]
        for one in fields(self)[1:]:
            value = getattr(self, one.name)
            if value != getattr(plain, one.name):
                words.append(value if one.name in named else f"{one.name} {value}")
        return ", ".join(words)


# --- covering arrays ------------------------------------------------------------------------------------------------


def tuples_of(case: Case, strength: int) -> Iterator[Tuple]:
    """What a case covers: its values at every `strength` places."""
    return itertools.combinations(tuple(enumerate(astuple(case))), strength)


def all_tuples(strength: int) -> set[Tuple]:
    """What there is to cover: every value at each of every `strength` places."""
    places = itertools.combinations(enumerate(DIMENSIONS.values()), strength)
    return {
        tuple(zip([place for place, _ in chosen], values, strict=True))
        for chosen in places
        for values in itertools.product(*[values for _, values in chosen])
    }


def covering_array(strength: int, seed: int = 0, tries: int = 12) -> list[Case]:
    """Cases that together hold every `strength` values of any `strength` dimensions. Greedy, and seeded.

    Each case begins with something not covered yet; its other values are chosen, place after place in a random order,
    so that they cover the most. The best of `tries` cases is taken.
    """
    chance = random.Random(seed)
    missing, cases = all_tuples(strength), []
    while missing:
        first = sorted(missing)
        candidates = [_candidate(chance.choice(first), missing, strength, chance) for _ in range(tries)]
        best = max(candidates, key=lambda case: sum(one in missing for one in tuples_of(case, strength)))
        missing.difference_update(tuples_of(best, strength))
        cases.append(best)
    return cases


def _candidate(begin: Tuple, missing: set[Tuple], strength: int, chance: random.Random) -> Case:
    """A case that holds `begin`."""
    chosen, choices = dict(begin), list(DIMENSIONS.values())
    rest = [place for place in range(len(choices)) if place not in chosen]
    chance.shuffle(rest)
    for place in rest:
        known = sorted(chosen.items())

        def covered(value: str, place: int = place, known: Sequence[tuple[int, str]] = known) -> int:
            others = itertools.combinations(known, strength - 1)
            return sum(tuple(sorted([*other, (place, value)])) in missing for other in others)

        values = chance.sample(choices[place], len(choices[place]))  # so that ties are broken by chance
        chosen[place] = max(values, key=covered)
    return Case(*(chosen[place] for place in range(len(choices))))


def random_cases(count: int, seed: int, known: Sequence[Case] = (), **fixed: str) -> list[Case]:
    """Other cases than the known ones, drawn at random, with some values fixed."""
    chance, found = random.Random(seed), list(known)
    while len(found) < len(known) + count:
        case = Case(**{name: chance.choice(values) for name, values in DIMENSIONS.items()} | fixed)
        if case not in found:
            found.append(case)
    return found[len(known) :]
