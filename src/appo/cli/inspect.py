"""One video and one question, any checkpoint: a group of its answers as a run to look at, without training."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from appo.cli.evaluate import LONGEST_RESPONSE, SPOTLIGHT
from appo.evaluation.inspection import inspect_question
from appo.models.loading import load_model, usual_dtype
from appo.models.names import checkpoint_of
from appo.reports.seen_run import SeenRun
from appo.rewards.templates import INSTRUCTION
from appo.types import VideoQA, VideoSource
from appo.video.reader import FrameSampling
from appo.world.measure import MAX_NEW_TOKENS, SAMPLING, WORLD_WEIGHTS


@dataclass(frozen=True)
class Asked:
    """What the flags of `appo spotlight --model` set; None: a default that depends on model or machine.

    Attributes:
        model: a Hugging Face folder or hub id, of a whole model or of an adapter, or ``spotlight``: the tiny policy.
        video: path of the video file.
        question: as asked, options not included.
        answer: the gold answer, which splits winners from losers; "": unknown.
        options: the choices; with them the answer is a letter, else words.
        group: G, responses to sample.
        fps: frames sampled a second.
        max_frames: frames sampled at most.
        max_new_tokens: longest response.
        instruction: closes the prompt; None: asks for the format (the tiny policy: nothing).
        seed: of the sampling.
        dtype: of the weights; None: bfloat16 on a GPU, else float32.
        trust_remote_code: run the code that a checkpoint brings.
    """

    model: str
    video: str
    question: str
    answer: str = ""
    options: tuple[str, ...] = ()
    group: int = 8
    fps: float | None = None
    max_frames: int | None = None
    max_new_tokens: int | None = None
    instruction: str | None = None
    seed: int = 0
    dtype: str | None = None
    trust_remote_code: bool = False


def inspect_video(asked: Asked) -> SeenRun:
    """Sample a group about the video and see what it looked at.

    Raises:
        ValueError, OSError: an impossible setting, checkpoint or video; one line each.
    """
    tiny = asked.model == SPOTLIGHT
    usual = SAMPLING if tiny else FrameSampling()
    most = asked.max_frames or usual.max_frames
    sampling = FrameSampling(asked.fps or usual.fps, most, min(usual.min_frames, most))
    kind = "letter" if asked.options else "word"
    video = VideoSource(asked.video)
    question = VideoQA(Path(asked.video).stem, video, asked.question, asked.answer, kind, asked.options)
    gpu = torch.cuda.is_available()
    model, processor = load_model(
        checkpoint_of(asked.model),
        dtype=asked.dtype or usual_dtype(),
        trust_remote_code=asked.trust_remote_code,
    )
    model = model.to("cuda" if gpu else "cpu").eval()
    torch.manual_seed(asked.seed)
    weights: dict[str, Any] = WORLD_WEIGHTS if tiny else {}
    films: dict[str, bytes] = {}
    record = inspect_question(
        model,
        processor,
        question,
        sampling,
        max_new_tokens=asked.max_new_tokens or (MAX_NEW_TOKENS if tiny else LONGEST_RESPONSE),
        responses=asked.group,
        instruction=("" if tiny else INSTRUCTION) if asked.instruction is None else asked.instruction,
        keep_film=partial(_keep, films),
        **weights,
    )
    settings = {field.name: getattr(asked, field.name) for field in fields(asked)}
    settings |= {"num_generations": asked.group, "video_fps": sampling.fps, "video_max_frames": most, **weights}
    return SeenRun(Path(asked.video).name, settings=settings, groups=[record], films=films)


def _keep(films: dict[str, bytes], picture: bytes) -> str:
    films["film"] = picture
    return "film"
