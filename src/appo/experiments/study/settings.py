"""The settings of a study: what may be meant, what decides what everybody is asked, which questions there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from appo.evaluation.evaluate import EvalSettings, questions_of
from appo.evaluation.predictions import CLIPS
from appo.experiments.figures import require_matplotlib
from appo.experiments.study.describing import DescribeSettings
from appo.experiments.study.endpoints import Calling
from appo.experiments.study.members import TRUTH, Perceiver, Reasoner, each_once, identity
from appo.experiments.study.words import DESCRIPTION_VERSION, REASONING_VERSION
from appo.models.loading import usual_dtype
from appo.models.names import SPOTLIGHT, checkpoint_of
from appo.rewards.templates import PROMPT_VERSION
from appo.types import VideoQA
from appo.video.reader import FrameSampling
from appo.world import generate, load_annotations
from appo.world.dataset import ANNOTATIONS, HELD_OUT_SEED
from appo.world.measure import SAMPLING
from appo.world.world import LEVELS

CLIPS_A_STUDY = 500


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
    level: str = "L1"  # of the embedded world's own clips, which are made where no annotations are given
    fps: float | None = None  # how frames are sampled; None: as `appo eval` does
    max_frames: int | None = None
    batch_size: int = 16  # questions a model is asked at once
    max_description: int = 512  # tokens at most
    max_answer: int = 1024
    dtype: str | None = None  # as in `appo eval`
    frame_cache: str | None = None
    calling: Mapping[str, Calling] = field(default_factory=dict)  # how endpoints are asked, by the reasoner's name
    budget: float | None = None  # dollars that all answers of the folder together may cost


def check(settings: StudySettings) -> None:
    """Raise ValueError for settings that cannot be meant, and where a package is missing."""
    require_matplotlib()
    each_once(settings.perceivers, "--perceiver")
    each_once(settings.reasoners, "--reasoner")
    if settings.level not in LEVELS:
        raise ValueError(f"--level {settings.level}: there are {', '.join(LEVELS)}")
    if settings.dataset != SPOTLIGHT:
        worldly = [p.name for p in settings.perceivers if p.source == TRUTH or p.noise]
        worldly += [r.name for r in settings.reasoners if r.is_rules]
        if worldly:
            raise ValueError(
                f"{worldly[0]}: truth, noise and rules are of the embedded world, not of {settings.dataset}"
            )
    if wrong := next((p for p in settings.perceivers if not 0 <= p.noise <= 1), None):
        raise ValueError(f"--perceiver {wrong.name}: noise is {wrong.noise}, a probability is 0 to 1")
    if settings.budget is not None:
        endpoints = [r.name for r in settings.reasoners if r.url is not None]
        if free := [name for name in endpoints if settings.calling.get(name, Calling()).prices is None]:
            raise ValueError(f"--budget needs the prices of {free[0]}: --price {free[0]}=READ,WRITTEN")


def describe_settings(settings: StudySettings) -> DescribeSettings:
    """How perceivers are asked, with the defaults that depend on the dataset."""
    frames = SAMPLING if settings.dataset == SPOTLIGHT else FrameSampling()
    most = frames.max_frames if settings.max_frames is None else settings.max_frames
    fps = frames.fps if settings.fps is None else settings.fps
    sampling = FrameSampling(fps, most, min(frames.min_frames, most))
    return DescribeSettings(
        sampling, settings.batch_size, settings.max_description, settings.dtype, settings.frame_cache
    )


def decisive(settings: StudySettings, describing: DescribeSettings) -> dict[str, Any]:
    """All that decides what everybody is asked, as it is written down and compared when a study goes on."""
    return {
        "study": True,
        "dataset": settings.dataset,
        "split": settings.split,
        "limit": settings.limit,
        "level": settings.level if settings.annotations is None else None,
        "fps": describing.sampling.fps,
        "max_frames": describing.sampling.max_frames,
        "batch_size": describing.batch_size,
        "description_version": DESCRIPTION_VERSION,
        "reasoning_version": REASONING_VERSION,
        "prompt_version": PROMPT_VERSION,
    }


def questions_to_ask(settings: StudySettings) -> list[VideoQA]:
    """The questions. Raises ValueError or OSError for what cannot be read or scored."""
    if settings.annotations is None and settings.dataset == SPOTLIGHT:
        count, folder = settings.limit or CLIPS_A_STUDY, settings.output / CLIPS / settings.level
        there = load_annotations(folder) if (folder / ANNOTATIONS).exists() else []
        return there if len(there) == count else generate(folder, settings.level, count, HELD_OUT_SEED)
    names = ("output", "dataset", "annotations", "videos", "split", "limit")
    return questions_of(EvalSettings(SPOTLIGHT, **{name: getattr(settings, name) for name in names}))


def members_of(settings: StudySettings) -> dict[str, dict[str, Any]]:
    """Who takes part -> all that decides what they say."""
    described: dict[str, Any] = {"max_tokens": settings.max_description, "dtype": settings.dtype or usual_dtype()}
    found = {
        f"perceiver {p.name}": identity(
            p, checkpoint_of(p.source) if p.is_model else "", described if p.is_model else {}
        )
        for p in settings.perceivers
    }
    for r in settings.reasoners:
        is_checkpoint = r.url is None and not r.is_rules
        own: dict[str, Any] = {} if r.is_rules else {"max_tokens": settings.max_answer}
        own |= {"dtype": settings.dtype or usual_dtype()} if is_checkpoint else {}
        found[f"reasoner {r.name}"] = identity(r, r.source if is_checkpoint else "", own)
    return found


def calling_of(settings: StudySettings, reasoner: Reasoner) -> Calling:
    """How an endpoint is asked."""
    return replace(settings.calling.get(reasoner.name, Calling()), max_tokens=settings.max_answer)
