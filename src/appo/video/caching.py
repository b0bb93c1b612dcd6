"""Sampled frames of a dataset, put into the cache before a run asks for them: `appo data check --frame-cache`.

Training and evaluation find them there if model and sampling are theirs (:mod:`appo.video.frame_cache`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from appo.types import VideoSource
from appo.video.frame_cache import FrameCache
from appo.video.reader import FrameSampling

# Seconds for a process to load transformers and the processor, and for one video.
LOAD_LIMIT, VIDEO_LIMIT = 600.0, 1800.0


@dataclass(frozen=True)
class Keeping:
    """Which frames are kept, and where.

    Attributes:
        folder: of the cache.
        model: Hugging Face folder or hub id, whose video processor chooses the frames.
        sampling: how many.
    """

    folder: str
    model: str
    sampling: FrameSampling


def keep(task: tuple[VideoSource, Keeping], allow: Callable[[float], None]) -> str:
    """Put the frames of one video into the cache, unless they are there.

    Args:
        task: what is shown, and where and how it is kept.
        allow: is told how many seconds it may take.

    Returns:
        What is wrong, in one line, or ""; nothing is raised.
    """
    source, keeping = task
    allow(LOAD_LIMIT)
    try:
        processor = _video_processor(keeping.model)
        allow(VIDEO_LIMIT)
        FrameCache(keeping.folder).read(source, processor, keeping.sampling)
    except Exception as error:  # of the model's folder, the decoder, the disk: each names what it is about
        return " ".join(str(error).split()) or type(error).__name__
    return ""


@cache
def _video_processor(model: str) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(model).video_processor
