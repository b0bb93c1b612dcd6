"""The settings of a study: its members as the command line names them, its questions, what decides its results."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from appo.evaluation.predictions import CLIPS
from appo.evaluation.run import EvalSettings, frame_sampling, held_out_clips, questions_of
from appo.experiments.figures import require_matplotlib
from appo.experiments.study.words import DESCRIPTION_VERSION, REASONING_VERSION
from appo.models.loading import fingerprint, usual_dtype
from appo.models.names import SPOTLIGHT, checkpoint_of
from appo.rewards.templates import PROMPT_VERSION
from appo.types import VideoQA
from appo.video.reader import FrameSampling
from appo.world.world import LEVELS, TASKS

# --- members, each ``NAME=SOURCE`` -----------------------------------------------------------------------------------


TRUTH, NOTHING, RULES, OPENAI = "truth", "nothing", "rules", "openai:"
_NAME = re.compile(r"(?!.*__)[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")
_NOISE = re.compile(r"(.+)@([01]|0?\.\d+)")


@dataclass(frozen=True)
class Perceiver:
    """A member that describes videos."""

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
    """A member that answers from descriptions."""

    name: str  # in tables and files
    source: str  # a checkpoint of a text model, or an endpoint's name for its model
    known: tuple[str, ...] = ()  # of rules: the tasks that they know; else none
    url: str | None = None  # of an endpoint; empty: the `openai` package's default; None: no endpoint

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


def _check_names(members: Sequence[Perceiver] | Sequence[Reasoner], flag: str) -> None:
    """Raise ValueError if there is none, or two have the same name on some file system."""
    names = [member.name.lower() for member in members]
    if not names:
        raise ValueError(f"a study needs at least one {flag}")
    if double := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{flag} {double} is there twice: give each a name of its own, NAME=...")


def _split(text: str, flag: str, example: str) -> tuple[str, str]:
    name, found, source = text.partition("=")
    if not found:
        name = source = text
    if not source or not _NAME.fullmatch(name):
        hint = "a name has letters, digits and . _ @ + -, no double _"
        raise ValueError(f"{flag} {text}: write NAME=SOURCE, such as {flag} {example} ({hint})")
    return name, source


# --- the study -------------------------------------------------------------------------------------------------------


CLIPS_A_STUDY = 500


@dataclass(frozen=True)
class Calling:
    """The requests to an endpoint."""

    key_variable: str = "OPENAI_API_KEY"  # environment variable that holds the key
    requests_per_minute: float | None = None  # of one endpoint, retries included; None: as fast as it answers
    at_once: int = 8  # concurrent requests
    retries: int = 5  # of one request
    timeout: float = 120.0  # seconds until a request is retried
    prices: tuple[float, float] | None = None  # dollars per million tokens read and written; None: unknown


@dataclass(frozen=True)
class StudySettings:
    """What the flags of `appo study` set."""

    output: Path  # folder, new or of this study
    perceivers: tuple[Perceiver, ...]  # from weak to strong
    reasoners: tuple[Reasoner, ...]  # from weak to strong
    dataset: str = SPOTLIGHT  # the questions, as `appo eval` has them
    annotations: str | None = None
    videos: str | None = None
    split: str | None = None
    limit: int | None = None
    level: str = "L1"  # of generated clips, where no annotations are given
    video_fps: float | None = None  # how frames are sampled; None: as `appo eval` does
    video_max_frames: int | None = None
    batch_size: int = 16  # questions per batch
    max_description: int = 512  # tokens at most
    max_answer: int = 1024
    dtype: str | None = None  # as in `appo eval`
    frame_cache: str | None = None
    calling: Mapping[str, Calling] = field(default_factory=dict)  # by the reasoner's name
    budget: float | None = None  # dollars for all answers of the folder

    @property
    def sampling(self) -> FrameSampling:
        """Of frames, with the defaults of the dataset."""
        return frame_sampling(self.dataset == SPOTLIGHT, self.video_fps, self.video_max_frames)


def check(settings: StudySettings) -> None:
    """Raise ValueError for impossible settings and missing packages."""
    require_matplotlib()
    _check_names(settings.perceivers, "--perceiver")
    _check_names(settings.reasoners, "--reasoner")
    if settings.level not in LEVELS:
        raise ValueError(f"--level {settings.level}: there are {', '.join(LEVELS)}")
    if settings.dataset != SPOTLIGHT:
        of_world = [p.name for p in settings.perceivers if p.source == TRUTH or p.noise]
        of_world += [r.name for r in settings.reasoners if r.is_rules]
        if of_world:
            problem = f"truth, noise and rules are of the embedded world, not of {settings.dataset}"
            raise ValueError(f"{of_world[0]}: {problem}")
    if wrong := next((p for p in settings.perceivers if not 0 <= p.noise <= 1), None):
        raise ValueError(f"--perceiver {wrong.name}: noise is {wrong.noise}, a probability is 0 to 1")
    if settings.budget is not None:
        endpoints = [r.name for r in settings.reasoners if r.url is not None]
        if free := [name for name in endpoints if settings.calling.get(name, Calling()).prices is None]:
            raise ValueError(f"--budget needs the prices of {free[0]}: --price {free[0]}=READ,WRITTEN")


def study_identity(settings: StudySettings) -> dict[str, Any]:
    """All that decides the prompts: written to eval.json, and compared when a study is resumed."""
    sampling = settings.sampling
    return {
        "study": True,
        "dataset": settings.dataset,
        "split": settings.split,
        "limit": settings.limit,
        "level": settings.level if settings.annotations is None else None,
        "fps": sampling.fps,
        "max_frames": sampling.max_frames,
        "batch_size": settings.batch_size,
        "description_version": DESCRIPTION_VERSION,
        "reasoning_version": REASONING_VERSION,
        "prompt_version": PROMPT_VERSION,
    }


def study_questions(settings: StudySettings) -> list[VideoQA]:
    """The questions. Raises ValueError or OSError if they cannot be read or scored."""
    if settings.annotations is None and settings.dataset == SPOTLIGHT:
        folder = settings.output / CLIPS / settings.level
        return held_out_clips(folder, settings.level, settings.limit or CLIPS_A_STUDY)
    names = ("output", "dataset", "annotations", "videos", "split", "limit")
    return questions_of(EvalSettings(SPOTLIGHT, **{name: getattr(settings, name) for name in names}))


def member_identities(settings: StudySettings) -> dict[str, dict[str, Any]]:
    """``perceiver NAME`` or ``reasoner NAME`` -> all that decides the member's texts, as members.json has it."""
    dtype = settings.dtype or usual_dtype()
    found: dict[str, dict[str, Any]] = {}
    for p in settings.perceivers:
        own = found[f"perceiver {p.name}"] = {"source": p.source, "noise": p.noise}
        if p.is_model:
            own |= {"is": fingerprint(checkpoint_of(p.source)), "max_tokens": settings.max_description, "dtype": dtype}
    for r in settings.reasoners:
        own = found[f"reasoner {r.name}"] = {"source": r.source}
        if r.is_rules:
            own |= {"known": list(r.known)}
        elif r.url is not None:
            own |= {"url": r.url, "max_tokens": settings.max_answer}
        else:
            own |= {"is": fingerprint(r.source), "max_tokens": settings.max_answer, "dtype": dtype}
    return found
