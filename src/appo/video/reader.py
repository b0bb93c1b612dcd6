"""A video becomes sampled frames, their times and metadata: a file or a folder of pictures, the whole or a clip of it.

A clip is read as if it were a video of its own: the processor's rule and the model's times count its frames alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import numpy.typing as npt

from appo.types import ClipError as ClipError
from appo.types import VideoError as VideoError
from appo.types import VideoSource
from appo.video.frame_sampling import CorruptVideoError as CorruptVideoError
from appo.video.frame_sampling import EmptyVideoError as EmptyVideoError
from appo.video.frame_sampling import FrameSampling as FrameSampling
from appo.video.frame_sampling import MissingVideoError as MissingVideoError
from appo.video.frame_sampling import NoVideoStreamError as NoVideoStreamError
from appo.video.frame_sampling import SampledVideo as SampledVideo
from appo.video.frame_sampling import Timeline, choose_frames
from appo.video.frame_sampling import TooFewFramesError as TooFewFramesError
from appo.video.frame_sampling import ZeroDurationError as ZeroDurationError
from appo.video.frame_sampling import lm_frame_timestamps as lm_frame_timestamps
from appo.video.image_sequence import folder_timeline, list_pictures, read_pictures
from appo.video.pyav_reader import decode, read_timeline

# Calls `probe` or `decode_frames`: in this process, or in a worker that can be given up (`decode_worker`).
Call = Callable[..., Any]


@dataclass(frozen=True)
class ProbedVideo:
    """A source that was found; nothing is decoded yet."""

    path: Path  # the file or folder
    pictures: list[Path]  # of a folder, in order
    timeline: Timeline  # of the file or folder, or of the clip of it


def probe(source: VideoSource) -> ProbedVideo:
    """Find a source and read its times. Raises VideoError as `read_video`."""
    path = local_path(source)
    pictures = list_pictures(path) if source.frames_fps else []
    whole = folder_timeline(path, pictures, source.frames_fps) if source.frames_fps else read_timeline(str(path))
    return ProbedVideo(path, pictures, whole if source.is_whole else whole.cut(source))


def decode_frames(
    source: VideoSource, probed: ProbedVideo, chosen: Sequence[int]
) -> tuple[npt.NDArray[np.uint8], tuple[float, ...]]:
    """The chosen frames, uint8 (T, H, W, 3), and their seconds (T,). Raises VideoError as `read_video`."""
    if source.frames_fps:
        frames_THWC = read_pictures([probed.pictures[probed.timeline.first + index] for index in chosen])
        return frames_THWC, tuple(index / source.frames_fps for index in chosen)
    return decode(str(probed.path), chosen, probed.timeline)


def call_inline(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in this process."""
    return function(*arguments)


def read_video(
    source: VideoSource | str | os.PathLike[str],
    video_processor: Any,
    sampling: FrameSampling,
    call: Call = call_inline,
) -> SampledVideo:
    """Decode the frames that the model's video processor chooses.

    Args:
        source: a path alone means the whole file.
        video_processor: a video processor of transformers; only its ``sample_frames`` rule is used.
        sampling: how many frames to take.
        call: where the file is opened and decoded.

    Returns:
        The sampled frames. Memory is bounded by the sample, not by the length of the video.

    Raises:
        VideoError: the video is missing, empty, damaged, too short or without duration, or the clip is no time of it.
        ValueError: `sampling` does not fit the processor.
    """
    if not isinstance(source, VideoSource):
        source = VideoSource(os.fspath(source))
    probed: ProbedVideo = call(probe, source)
    fps, total = probed.timeline.fps, len(probed.timeline.times)
    chosen = choose_frames(source, total, fps, video_processor, sampling)
    frames_THWC, timestamps_T = call(decode_frames, source, probed, chosen)
    return SampledVideo(source.path, frames_THWC, timestamps_T, fps, total, chosen)


def local_path(source: VideoSource) -> Path:
    """The absolute path of a file that is not empty, or of a folder. FFmpeg would read ``a:b.mp4`` as an address.

    Raises:
        MissingVideoError: there is none, or no local one, or a file where a folder should be or the reverse.
        EmptyVideoError: the file has 0 bytes.
    """
    given = source.path
    address = urlsplit(given)
    if "://" in given and address.scheme != "file":
        raise MissingVideoError(given, "is an address, not a file", "download it and pass the local path")
    local = Path(url2pathname(address.path) if address.scheme == "file" else given)
    try:
        size = local.stat().st_size
        is_folder = local.is_dir()
        if not is_folder:
            local.open("rb").close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MissingVideoError(given, f"cannot be opened ({reason})", "check the path") from error
    if is_folder and source.frames_fps is None:
        fix = "pass the path of a video file, or say at how many frames per second its pictures were taken (frames_fps)"
        raise MissingVideoError(given, "is a folder", fix)
    if not is_folder and source.frames_fps is not None:
        fix = "leave frames_fps out, or pass the folder"
        raise MissingVideoError(given, "is a file, while frames_fps speaks of a folder of pictures", fix)
    if size == 0 and not is_folder:
        raise EmptyVideoError(given, "is empty (0 bytes)", "download or copy it again")
    return local.absolute()
