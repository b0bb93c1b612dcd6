"""Who takes part in a study, as the command line names them: perceivers and reasoners, each ``NAME=SOURCE``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from appo.models.loading import fingerprint
from appo.world.world import TASKS

TRUTH, NOTHING, RULES, OPENAI = "truth", "nothing", "rules", "openai:"
_NAME = re.compile(r"(?!.*__)[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")
_NOISE = re.compile(r"(.+)@([01]|0?\.\d+)")


@dataclass(frozen=True)
class Perceiver:
    """Who describes."""

    name: str  # in tables and files
    # a checkpoint (folder, hub id, adapter), ``spotlight`` (the tiny policy), ``truth`` (the embedded world's exact
    # description), or ``nothing`` (the floor: what reasoners make of the question alone)
    source: str
    noise: float = 0.0  # probability that an attribute of the embedded world is described wrongly

    @property
    def is_model(self) -> bool:
        """Whether it is a model that is given the video."""
        return self.source not in (TRUTH, NOTHING)


@dataclass(frozen=True)
class Reasoner:
    """Who answers."""

    name: str  # in tables and files
    source: str  # a checkpoint of a text model, or an endpoint's name for its model
    known: tuple[str, ...] = ()  # of rules: the tasks that they know; else none
    url: str | None = None  # where an endpoint is; empty: where the `openai` package looks for it; None: no endpoint

    @property
    def is_rules(self) -> bool:
        """Whether it answers by rules."""
        return bool(self.known)


def perceiver_of(text: str) -> Perceiver:
    """``[NAME=]SOURCE[@NOISE]``. Raises ValueError."""
    name, source = _split(text, "--perceiver", "vl7b=Qwen/Qwen2.5-VL-7B-Instruct")
    noisy = _NOISE.fullmatch(source)
    return Perceiver(name, noisy[1], float(noisy[2])) if noisy else Perceiver(name, source)


def reasoner_of(text: str) -> Reasoner:
    """``[NAME=]SOURCE``: a checkpoint, ``rules[:TASK,...]`` or ``openai:MODEL[@URL]``. Raises ValueError."""
    name, source = _split(text, "--reasoner", "o3=openai:o3")
    if source == RULES:
        return Reasoner(name, RULES, TASKS)
    if source.startswith(f"{RULES}:"):
        known = tuple(source.partition(":")[2].split(","))
        if unknown := [task for task in known if task not in TASKS]:
            raise ValueError(f"--reasoner {text}: there is no task {unknown[0]!r}; there are {', '.join(TASKS)}")
        return Reasoner(name, RULES, known)
    if source.startswith(OPENAI):
        model, _, url = source.removeprefix(OPENAI).partition("@http")
        if not model:
            raise ValueError(f"--reasoner {text}: names no model; write NAME=openai:MODEL@https://host/v1")
        return Reasoner(name, model, url=f"http{url}" if url else "")
    return Reasoner(name, source)


def each_once(members: Sequence[Perceiver] | Sequence[Reasoner], flag: str) -> None:
    """Raise ValueError if there is none, or two have one name, as far as a file system can tell."""
    names = [member.name.lower() for member in members]
    if not names:
        raise ValueError(f"a study needs at least one {flag}")
    if double := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{flag} {double} is there twice: give each a name of its own, NAME=...")


def identity(member: Perceiver | Reasoner, checkpoint: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides what a member says, as it is written down and compared: plain values.

    Args:
        member: of the study.
        checkpoint: what its weights are loaded from; empty where there are none.
        settings: of its asking.
    """
    own: dict[str, Any] = {"source": member.source} | ({"is": fingerprint(checkpoint)} if checkpoint else {})
    if isinstance(member, Perceiver):
        own |= {"noise": member.noise}
    elif member.is_rules:
        own |= {"known": list(member.known)}
    elif member.url is not None:
        own |= {"url": member.url}
    return {**own, **settings}


def _split(text: str, flag: str, example: str) -> tuple[str, str]:
    name, found, source = text.partition("=")
    if not found:
        name = source = text
    if not source or not _NAME.fullmatch(name):
        hint = "a name has letters, digits and . _ @ + -, no double _"
        raise ValueError(f"{flag} {text}: write NAME=SOURCE, such as {flag} {example} ({hint})")
    return name, source
