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
from appo.evaluation.inference import InferenceSettings, answer
from appo.evaluation.predictions import CLIPS, EvaluationFolder, batches
from appo.evaluation.tables import answer_progress, score
from appo.models.loading import fingerprint, load_model, usual_dtype, usual_place
from appo.models.names import SPOTLIGHT, checkpoint_of
from appo.rewards.templates import INSTRUCTIONS, PROMPT_VERSION
from appo.types import VideoQA
from appo.video.frame_cache import cache_in
from appo.video.reader import FrameSampling
from appo.world import generate, load_annotations
from appo.world.dataset import ANNOTATIONS, HELD_OUT_SEED
from appo.world.policy import MAX_NEW_TOKENS, SAMPLING
from appo.world.world import LEVELS

CLIPS_A_LEVEL = 200  # of the embedded world, where no annotations are given
LONGEST_RESPONSE = 1024
MAX_NAMED_ERRORS = 5


@dataclass(frozen=True)
class EvalSettings:
    """What the flags of `appo eval` set; None: a default that depends on model, dataset or machine."""

    model: str  # a Hugging Face folder or hub id, of a whole model or of an adapter, or ``spotlight``
    output: Path  # folder of the evaluation, new or to be resumed
    dataset: str = SPOTLIGHT  # one of :data:`appo.data.DATASETS`
    # annotation file or folder; none (spotlight only): held-out clips are made in ``output``
    annotations: str | None = None
    videos: str | None = None  # folder that the annotations' video paths start from
    split: str | None = None  # part of the dataset
    limit: int | None = None  # number of questions, evenly spaced over the dataset
    num_generations: int | None = None  # K, responses per question; None: one, greedy
    temperature: float | None = None  # of the K samples
    batch_size: int = 16  # questions per batch
    max_completion_length: int | None = None  # longest response
    video_fps: float | None = None  # frames sampled per second
    video_max_frames: int | None = None  # most frames sampled of a video
    frame_cache: str | None = None  # folder that caches sampled frames
    instruction: str | None = None  # closes every prompt; None: that of the official score's format
    seed: int = 0  # of the K samples
    dtype: str | None = None  # of the weights
    trust_remote_code: bool = False  # run the code that a checkpoint brings
    retry: bool = False  # retry questions whose video or image could not be read


def evaluate(settings: EvalSettings, console: Console) -> Path:
    """Answer what is not answered yet, score everything, print the table; returns the folder.

    Raises:
        ValueError, OSError: an impossible setting, dataset, checkpoint or folder; one line each.
    """
    inference = _inference_settings(settings)
    identity = _identity(settings, inference)
    EvaluationFolder.check(settings.output, identity)
    questions = questions_of(settings)
    folder = EvaluationFolder.start(settings.output, identity, questions)
    with folder.locked():
        _answer(folder, questions, settings, inference, console)
    card = score(folder)
    folder.write("scores.json", card.to_json())
    folder.write("scores.md", card.sheet().markdown())
    card.sheet().print(console)
    _name_errors(folder, questions)
    return folder.path


def _inference_settings(settings: EvalSettings) -> InferenceSettings:
    """With the defaults that depend on model and dataset."""
    if settings.temperature is not None and settings.num_generations is None:
        raise ValueError(
            "--temperature is of samples: give --num-generations K as well, or leave it out for greedy responses"
        )
    if settings.temperature is not None and not settings.temperature > 0:
        raise ValueError(
            f"--temperature is {settings.temperature}: it must be above 0; leave out --num-generations for greedy"
        )
    tiny = settings.model == SPOTLIGHT
    usual = INSTRUCTIONS[response_format_of(settings.dataset)]
    instruction = ("" if tiny else usual) if settings.instruction is None else settings.instruction
    return InferenceSettings(
        sampling=frame_sampling(settings.dataset == SPOTLIGHT, settings.video_fps, settings.video_max_frames),
        max_new_tokens=settings.max_completion_length or (MAX_NEW_TOKENS if tiny else LONGEST_RESPONSE),
        instruction=instruction,
        samples=settings.num_generations or 1,
        temperature=0.0 if settings.num_generations is None else settings.temperature or 1.0,
        seed=settings.seed,
    )


def frame_sampling(is_world: bool, fps: float | None, max_frames: int | None) -> FrameSampling:
    """With the defaults of the embedded world's clips or of videos; at least one frame, at most `max_frames`."""
    usual = SAMPLING if is_world else FrameSampling()
    most = usual.max_frames if max_frames is None else max_frames
    return FrameSampling(usual.fps if fps is None else fps, most, min(usual.min_frames, most))


def _identity(settings: EvalSettings, inference: InferenceSettings) -> dict[str, Any]:
    """All that decides the answers: written to eval.json, and compared when an evaluation is resumed."""
    return {
        "model": settings.model,
        "model_is": fingerprint(checkpoint_of(settings.model)),
        "dataset": settings.dataset,
        "split": settings.split,
        "limit": settings.limit,
        "samples": inference.samples,
        "temperature": inference.temperature,
        "seed": inference.seed,
        "batch_size": settings.batch_size,
        "max_new_tokens": inference.max_new_tokens,
        "fps": inference.sampling.fps,
        "max_frames": inference.sampling.max_frames,
        "instruction": inference.instruction,
        "prompt_version": PROMPT_VERSION,
        "dtype": settings.dtype or usual_dtype(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def questions_of(settings: EvalSettings) -> list[VideoQA]:
    """The questions: ids once each, gold answers that can be scored, at least one video exists.

    Raises:
        ValueError, OSError: see :func:`appo.data.read`, or one of these does not hold.
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
    """Clips of every level that no run has trained on; written once."""
    count = CLIPS_A_LEVEL if limit is None else min(CLIPS_A_LEVEL, -(-limit // len(LEVELS)))
    return [question for level in LEVELS for question in held_out_clips(folder / level, level, count)]


def held_out_clips(folder: Path, level: str, count: int) -> list[VideoQA]:
    """Held-out questions of a level of the embedded world; their clips are written unless they exist."""
    exists = (folder / ANNOTATIONS).exists()  # written after all clips
    questions: list[VideoQA] = load_annotations(folder) if exists else []
    return questions if len(questions) == count else generate(folder, level, count, HELD_OUT_SEED)


def _spaced(questions: Sequence[VideoQA], limit: int | None) -> list[VideoQA]:
    """`limit` questions from all over the dataset, as levels and tasks often follow one another."""
    count = len(questions) if limit is None else min(limit, len(questions))
    return [questions[index * len(questions) // count] for index in range(count)]


def _answer(
    folder: EvaluationFolder,
    questions: Sequence[VideoQA],
    settings: EvalSettings,
    inference: InferenceSettings,
    console: Console,
) -> None:
    """Answer what is left; a finished evaluation loads no model."""
    there = folder.resume(questions, settings.batch_size, retry=settings.retry)
    left = [batch for batch in batches(questions, settings.batch_size) if batch[0] not in there]
    if not left:
        return
    if there:
        folder.check_versions()
    done = sum(len(replies) for replies in there.values())
    model, processor = load_model(
        checkpoint_of(settings.model),
        dtype=settings.dtype or usual_dtype(),
        trust_remote_code=settings.trust_remote_code,
        **usual_place(),
    )
    with answer_progress(console, len(questions), done) as update:
        for answered in answer(model, processor, left, inference, cache_in(settings.frame_cache)):
            folder.append(answered.index, answered.replies, answered.seconds)
            done += len(answered.replies)
            update(done)
    folder.resume(questions, settings.batch_size)  # answers to retried questions move to their place in the order


def _name_errors(folder: EvaluationFolder, questions: Sequence[VideoQA]) -> None:
    """Print to standard error which questions have no answer, and how to retry them."""
    missing = [reply for reply in folder.replies(questions) if reply is not None and reply.error]
    for reply in missing[:MAX_NAMED_ERRORS]:
        print(f"appo: question {reply.id!r} was not asked: {reply.error}", file=sys.stderr)
    if missing:
        more = (
            f", {len(missing) - MAX_NAMED_ERRORS} more in predictions.jsonl" if len(missing) > MAX_NAMED_ERRORS else ""
        )
        print(
            f"appo: {len(missing)} of {len(questions)} questions have no prediction and count as wrong{more}; repair"
            " the files and run the same command with --retry",
            file=sys.stderr,
        )
