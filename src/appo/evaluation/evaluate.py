"""`appo eval`: a model answers a dataset; the folder of the evaluation, its scores and their table."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from appo.data import answerable, media_of, response_format_of
from appo.evaluation.inference import Asking, answer
from appo.evaluation.predictions import CLIPS, EvaluationFolder, batches
from appo.evaluation.scoreboard import Progressing
from appo.evaluation.scorecard import score
from appo.models.loading import fingerprint, load_model, usual_dtype, usual_place
from appo.models.names import SPOTLIGHT, checkpoint_of
from appo.rewards.templates import INSTRUCTIONS, PROMPT_VERSION
from appo.types import VideoQA
from appo.video.frame_cache import cache_in
from appo.video.reader import FrameSampling
from appo.world import generate, load_annotations
from appo.world.dataset import ANNOTATIONS, HELD_OUT_SEED
from appo.world.measure import MAX_NEW_TOKENS, SAMPLING
from appo.world.world import LEVELS

CLIPS_A_LEVEL = 200  # of the embedded world, where no annotations are given
LONGEST_RESPONSE = 1024
NAMED_ERRORS = 5


@dataclass(frozen=True)
class EvalSettings:
    """What the flags of `appo eval` set; None: a default that depends on model, dataset or machine.

    Attributes:
        model: a Hugging Face folder or hub id, of a whole model or of an adapter, or ``spotlight``.
        output: folder of the evaluation; one that was begun is gone on with.
        dataset: one of :data:`appo.data.DATASETS`.
        annotations: annotation file or folder; none (spotlight only): held-out clips are made in ``output``.
        videos: folder that the annotations' video paths start from.
        split: part of the dataset.
        limit: so many questions, evenly spaced over the dataset.
        sample: K, responses to each question; None: one, greedy.
        temperature: of the K samples.
        batch_size: questions answered at once.
        max_new_tokens: longest response.
        fps: frames sampled a second.
        max_frames: frames sampled of a video at most.
        frame_cache: folder in which sampled frames are kept for other runs.
        instruction: closes every prompt; None: the one that asks for the format of the official score.
        seed: of the K samples.
        dtype: of the weights.
        trust_remote_code: run the code that a checkpoint brings.
        retry: ask the questions again whose video or image could not be read.
    """

    model: str
    output: Path
    dataset: str = SPOTLIGHT
    annotations: str | None = None
    videos: str | None = None
    split: str | None = None
    limit: int | None = None
    sample: int | None = None
    temperature: float | None = None
    batch_size: int = 16
    max_new_tokens: int | None = None
    fps: float | None = None
    max_frames: int | None = None
    frame_cache: str | None = None
    instruction: str | None = None
    seed: int = 0
    dtype: str | None = None
    trust_remote_code: bool = False
    retry: bool = False


def evaluate(settings: EvalSettings, console: Console) -> Path:
    """Answer what is not answered yet, score all, print the table; returns the folder.

    Raises:
        ValueError, OSError: an impossible setting, dataset, checkpoint or folder; one line each.
    """
    asking = _asking(settings)
    decisive = _decisive(settings, asking)
    EvaluationFolder.check(settings.output, decisive)
    questions = questions_of(settings)
    folder = EvaluationFolder.start(settings.output, decisive, questions)
    with folder.alone():
        _answer(folder, questions, settings, asking, console)
    card = score(folder)
    folder.write("scores.json", card.to_json())
    folder.write("scores.md", card.sheet().markdown())
    card.sheet().print(console)
    _name_errors(folder, questions)
    return folder.path


def _asking(settings: EvalSettings) -> Asking:
    """How questions are asked, with the defaults that depend on model and dataset."""
    if settings.temperature is not None and settings.sample is None:
        raise ValueError(
            "--temperature is of samples: give --num-generations K as well, or leave it out for greedy responses"
        )
    if settings.temperature is not None and not settings.temperature > 0:
        raise ValueError(
            f"--temperature is {settings.temperature}: it must be above 0; leave out --num-generations for greedy"
        )
    tiny, world = settings.model == SPOTLIGHT, settings.dataset == SPOTLIGHT
    frames = SAMPLING if world else FrameSampling()
    max_frames = frames.max_frames if settings.max_frames is None else settings.max_frames
    fps = frames.fps if settings.fps is None else settings.fps
    usual = INSTRUCTIONS[response_format_of(settings.dataset)]
    instruction = ("" if tiny else usual) if settings.instruction is None else settings.instruction
    return Asking(
        sampling=FrameSampling(fps, max_frames, min(frames.min_frames, max_frames)),
        max_new_tokens=settings.max_new_tokens or (MAX_NEW_TOKENS if tiny else LONGEST_RESPONSE),
        instruction=instruction,
        samples=settings.sample or 1,
        temperature=0.0 if settings.sample is None else settings.temperature or 1.0,
        seed=settings.seed,
    )


def _decisive(settings: EvalSettings, asking: Asking) -> dict[str, Any]:
    """All that decides the answers, as it is written down and compared when an evaluation goes on."""
    return {
        "model": settings.model,
        "model_is": fingerprint(checkpoint_of(settings.model)),
        "dataset": settings.dataset,
        "split": settings.split,
        "limit": settings.limit,
        "samples": asking.samples,
        "temperature": asking.temperature,
        "seed": asking.seed,
        "batch_size": settings.batch_size,
        "max_new_tokens": asking.max_new_tokens,
        "fps": asking.sampling.fps,
        "max_frames": asking.sampling.max_frames,
        "instruction": asking.instruction,
        "prompt_version": PROMPT_VERSION,
        "dtype": settings.dtype or usual_dtype(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def questions_of(settings: EvalSettings) -> list[VideoQA]:
    """What is asked: ids once each, gold answers that can be scored, at least one video there.

    Raises:
        ValueError, OSError: see :func:`appo.data.read`, or one of the above does not hold.
    """
    if settings.annotations is not None:
        rows = answerable(settings.dataset, settings.annotations, settings.videos, settings.split)
        questions = [question for _, question in rows]
    elif settings.dataset != SPOTLIGHT:
        raise ValueError(f"dataset {settings.dataset} is read from files: give --annotations (and --videos)")
    elif settings.videos is not None or settings.split is not None:
        raise ValueError("--videos and --split are about a dataset's files: give --annotations as well")
    else:
        questions = _held_out(settings.output / CLIPS, settings.limit)
    if not questions:
        part = f" of split {settings.split!r}" if settings.split else ""
        raise ValueError(f"{settings.annotations}: holds no question{part}")
    chosen = _spaced(questions, settings.limit)
    media = [Path(path) for question in chosen for path, _ in media_of(question)]
    if not any(path.exists() for path in media):
        raise FileNotFoundError(f"none of the videos is there, such as {media[0]}; check --videos, where paths start")
    return chosen


def _held_out(folder: Path, limit: int | None) -> list[VideoQA]:
    """Clips of every level that no run has trained on; made once."""
    count = CLIPS_A_LEVEL if limit is None else min(CLIPS_A_LEVEL, -(-limit // len(LEVELS)))
    questions: list[VideoQA] = []
    for level in LEVELS:
        made = (folder / level / ANNOTATIONS).exists()  # written after all clips
        there = load_annotations(folder / level) if made else []
        questions += there if len(there) == count else generate(folder / level, level, count, HELD_OUT_SEED)
    return questions


def _spaced(questions: Sequence[VideoQA], limit: int | None) -> list[VideoQA]:
    """`limit` questions from all over the dataset, as levels and tasks often follow one another."""
    count = len(questions) if limit is None else min(limit, len(questions))
    return [questions[index * len(questions) // count] for index in range(count)]


def _answer(
    folder: EvaluationFolder, questions: Sequence[VideoQA], settings: EvalSettings, asking: Asking, console: Console
) -> None:
    """Ask what is left; a finished evaluation loads no model."""
    kept = folder.resume(questions, settings.batch_size, retry=settings.retry)
    left = [batch for batch in batches(questions, settings.batch_size) if batch[0] not in kept]
    if not left:
        return
    if kept:
        folder.refuse_other_versions()
    done = sum(len(replies) for replies in kept.values())
    model, processor = load_model(
        checkpoint_of(settings.model),
        dtype=settings.dtype or usual_dtype(),
        trust_remote_code=settings.trust_remote_code,
        **usual_place(),
    )
    with Progressing(console, len(questions), done) as progress:
        for answered in answer(model, processor, left, asking, cache_in(settings.frame_cache)):
            folder.append(answered.index, answered.replies, answered.seconds)
            done += len(answered.replies)
            progress.update(done)
    folder.resume(questions, settings.batch_size)  # what was asked again takes its place in the order


def _name_errors(folder: EvaluationFolder, questions: Sequence[VideoQA]) -> None:
    """Say on standard error which questions could not be asked, and how to ask them again."""
    missing = [reply for reply in folder.replies(questions) if reply is not None and reply.error]
    for reply in missing[:NAMED_ERRORS]:
        print(f"appo: question {reply.id!r} was not asked: {reply.error}", file=sys.stderr)
    if missing:
        more = f", {len(missing) - NAMED_ERRORS} more in predictions.jsonl" if len(missing) > NAMED_ERRORS else ""
        print(
            f"appo: {len(missing)} of {len(questions)} questions have no prediction and count as wrong{more}; repair"
            " the files and run the same command with --retry",
            file=sys.stderr,
        )
