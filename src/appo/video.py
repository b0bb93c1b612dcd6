"""A video file becomes sampled frames, their times and metadata for the processor; decoded once, by PyAV.

Which frames are sampled is decided by the model's own video processor, so its rule is never rewritten here.
What cannot be decoded completely raises a typed error of one line: a repeated, missing or grey frame would be
trained on without anybody noticing.

Shape suffixes: T sampled frames, H height, W width, C = 3 colours (RGB).
"""

from __future__ import annotations

import copy
import math
import os
import re
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import av
import numpy as np
import numpy.typing as npt

# A container's average rate is trusted when it explains the frames' own times this well, else the times win.
RATE_TOLERANCE = 0.01
# Matroska states how long each track is. A file that ends earlier than this share of it has been cut off.
LENGTH_TOLERANCE = 0.05

_ATTACHED_PICTURE = int(av.stream.Disposition.attached_pic)
_DURATION_TAG = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)")
_REENCODE = "encode it again, e.g. with ffmpeg"


class VideoError(ValueError):
    """A video cannot be used. The message names the file, what is wrong and the fix, in one line."""

    def __init__(self, path: str, problem: str, fix: str) -> None:
        super().__init__(path, problem, fix)
        self.path = path

    def __str__(self) -> str:
        path, problem, fix = self.args
        return f"{path}: {problem}; {fix}"


class MissingVideoError(VideoError):
    """There is no readable file at the path."""


class EmptyVideoError(VideoError):
    """The file has 0 bytes."""


class CorruptVideoError(VideoError):
    """The file is no video, was cut off, or holds damaged frames."""


class NoVideoStreamError(VideoError):
    """The file has sound (or a cover picture) only."""


class TooFewFramesError(VideoError):
    """The file has fewer frames than the model merges into one of its own."""


class ZeroDurationError(VideoError):
    """All frames are shown at the same time."""


@dataclass(frozen=True)
class FrameSampling:
    """How many frames are taken of a video.

    Attributes:
        fps: frames per second wanted (the paper: 1 or 2).
        max_frames: never more than this many (the paper: 16; 100 for grounding).
        min_frames: at least this many, as far as the video has them.
    """

    fps: float = 2.0
    max_frames: int = 16
    min_frames: int = 4

    def __post_init__(self) -> None:
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"fps must be a positive number of frames per second, not {self.fps}")
        if not 1 <= self.min_frames <= self.max_frames:
            raise ValueError(
                f"1 <= min_frames <= max_frames must hold, not min_frames={self.min_frames} and"
                f" max_frames={self.max_frames}"
            )


@dataclass(frozen=True)
class SampledVideo:
    """The sampled frames of one video file.

    Attributes:
        path: the file, as given.
        frames_THWC: uint8 (T, H, W, 3), RGB, turned upright.
        timestamps_T: seconds of each sampled frame since the video's first frame, from the file's own clock.
        fps: frames per second of the whole file (not of the sample).
        total_frames: frames of the whole file.
        frame_indices: which of the file's frames were sampled.
    """

    path: str
    frames_THWC: npt.NDArray[np.uint8]
    timestamps_T: tuple[float, ...]
    fps: float
    total_frames: int
    frame_indices: tuple[int, ...]

    @property
    def metadata(self) -> dict[str, Any]:
        """The ``video_metadata`` entry of this video; pass it together with ``do_sample_frames=False``.

        The fields are those of transformers' ``VideoMetadata``, whose ``sampled_fps`` (frames sampled / all
        frames * fps) then gives the processor the true ``second_per_grid_ts``.
        """
        return {
            "total_num_frames": self.total_frames,
            "fps": self.fps,
            "width": self.frames_THWC.shape[2],
            "height": self.frames_THWC.shape[1],
            "duration": self.total_frames / self.fps,
            "video_backend": "pyav",
            "frames_indices": list(self.frame_indices),
        }


@dataclass(frozen=True)
class _Clock:
    """What the packets say before any is decoded: number of frames, frames per second, first time stamp."""

    total_frames: int
    fps: float
    start: int


def read_video(path: str | os.PathLike[str], video_processor: Any, sampling: FrameSampling) -> SampledVideo:
    """Decode the frames of a file that the model's video processor chooses.

    Args:
        path: a file, also as ``file://`` address.
        video_processor: a video processor of transformers; only its ``sample_frames`` rule is used.
        sampling: how many frames to take.

    Returns:
        The sampled frames. Memory is bounded by the sample, not by the length of the file.

    Raises:
        VideoError: the file is missing, empty, damaged, without video, too short or without duration.
        ValueError: `sampling` does not fit the processor.
    """
    file = _existing_file(path)
    clock = _read_clock(file)
    frame_indices = _choose_frames(file, video_processor, clock, sampling)
    frames_THWC, timestamps_T = _decode(file, frame_indices, clock)
    return SampledVideo(os.fspath(path), frames_THWC, timestamps_T, clock.fps, clock.total_frames, frame_indices)


def lm_frame_timestamps(video: SampledVideo, temporal_patch_size: int = 2) -> tuple[float, ...]:
    """Seconds of each frame as the language model sees it: the mean of the sampled frames merged into it.

    An incomplete last group is filled with its last frame, as the processor does.
    """
    times = list(video.timestamps_T)
    times += times[-1:] * (-len(times) % temporal_patch_size)
    groups = range(0, len(times), temporal_patch_size)
    return tuple(math.fsum(times[i : i + temporal_patch_size]) / temporal_patch_size for i in groups)


def _existing_file(path: str | os.PathLike[str]) -> str:
    """The absolute path of a non-empty file. Absolute, as FFmpeg would read ``a:b.mp4`` as an address."""
    given = os.fspath(path)
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
    if is_folder:
        raise MissingVideoError(given, "is a folder", "pass the path of a video file")
    if size == 0:
        raise EmptyVideoError(given, "is empty (0 bytes)", "download or copy it again")
    return str(local.absolute())


def _read_clock(file: str) -> _Clock:
    """Count the frames and read their times from the packets, without decoding any.

    The count stated in the header is not used: it is 0 in many containers and wrong in some.
    """
    times: list[int | None] = []
    packets = last_duration = 0
    with _open(file) as (container, stream):
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise _corrupt(file, f"is cut off or damaged after {len(times)} frames")
            packets += packet.size > 0
            # A discarded packet lies before the start of an edit list: needed to decode others, never shown.
            if packet.size and not packet.is_discard:
                times.append(packet.pts)
                last_duration = packet.duration or last_duration
        if len(times) < 2:
            count = "one frame" if times else "no frames"
            raise TooFewFramesError(file, f"has {count}", "use a clip of at least 2 frames")
        _check_complete(file, container, stream, packets, times)
        return _clock_of(file, stream, times, last_duration)


def _check_complete(file: str, container: Any, stream: Any, packets: int, times: Sequence[int | None]) -> None:
    """Refuse a file that ends early between two packets, by an MP4's index or a Matroska's track length."""
    # Older PyAV has no index_entries; a cut inside a packet is found without them.
    promised = len(getattr(stream, "index_entries", ()))
    if "mp4" in container.format.name and packets < promised:
        raise _corrupt(file, f"is cut off: {packets} of {promised} frames are there")
    stated = _DURATION_TAG.fullmatch(stream.metadata.get("DURATION", ""))
    shown = [time for time in times if time is not None]
    if stated and shown:
        hours, minutes, seconds = map(float, stated.groups())
        length = hours * 3600 + minutes * 60 + seconds
        there = float(max(shown) * stream.time_base)
        frame = 1 / float(stream.average_rate or 1)
        if there + 2 * frame < (1 - LENGTH_TOLERANCE) * length:
            raise _corrupt(file, f"is cut off: {there:.2f} of {length:.2f} seconds are there")


def _clock_of(file: str, stream: Any, times: Sequence[int | None], last_duration: int) -> _Clock:
    """The frame rate from the container, or from the frames' own times where the two disagree («ours»)."""
    stated = float(stream.average_rate or 0)
    shown = sorted(time for time in times if time is not None)
    if len(shown) < len(times):  # a bare stream without times: the stated rate is all there is
        if not stated:
            raise ZeroDurationError(file, "has neither frame times nor a frame rate", _REENCODE)
        return _Clock(len(times), stated, start=0)
    if shown[0] == shown[-1]:
        raise ZeroDurationError(file, f"lasts 0 seconds: all {len(shown)} frames have the same time", _REENCODE)
    # The last frame has no successor: it lasts as stated, which may be nothing, or as long as the others.
    last_duration = max(last_duration, round(statistics.median(b - a for a, b in pairwise(shown))))
    seconds = float((shown[-1] - shown[0] + last_duration) * stream.time_base)
    # Half a frame of slack: containers round times, Matroska to milliseconds.
    agrees = stated and abs(len(shown) / stated - seconds) <= max(0.5 / stated, RATE_TOLERANCE * seconds)
    return _Clock(len(shown), stated if agrees else len(shown) / seconds, start=shown[0])


def _choose_frames(file: str, video_processor: Any, clock: _Clock, sampling: FrameSampling) -> tuple[int, ...]:
    """Ask the processor's own rule which frames to take, ascending."""
    from transformers.video_utils import VideoMetadata

    merged = getattr(video_processor, "temporal_patch_size", None) or 1
    if clock.total_frames < merged:
        raise TooFewFramesError(
            file, f"has {clock.total_frames} frames, the model merges {merged} into one", "use a longer clip"
        )
    if sampling.min_frames < merged:
        raise ValueError(f"min_frames={sampling.min_frames} must be at least temporal_patch_size={merged}")
    # Some processors take the bounds as arguments, others read their own attributes: set both, on a copy.
    chooser = copy.copy(video_processor)
    chooser.num_frames, chooser.fps = None, sampling.fps
    bounds = {"min_frames": sampling.min_frames, "max_frames": sampling.max_frames}
    for name, value in bounds.items():
        setattr(chooser, name, value)
    metadata = VideoMetadata(total_num_frames=clock.total_frames, fps=clock.fps)
    chosen = chooser.sample_frames(metadata=metadata, fps=sampling.fps, **bounds)
    # Rounding makes the rule of Qwen2-VL add an index past the end at some lengths, e.g. 126 of 1165 frames.
    frame_indices = tuple(int(i) for i in chosen if int(i) < clock.total_frames)
    if not 0 < len(frame_indices) <= sampling.max_frames:
        raise ValueError(
            f"{type(video_processor).__name__} sampled {len(frame_indices)} frames of {file} though"
            f" max_frames={sampling.max_frames}; use a processor that heeds it"
        )
    return frame_indices


def _decode(
    file: str, frame_indices: tuple[int, ...], clock: _Clock
) -> tuple[npt.NDArray[np.uint8], tuple[float, ...]]:
    """Decode up to the last wanted frame, keep the wanted: uint8 (T, H, W, 3) and their seconds (T,)."""
    wanted, last = set(frame_indices), max(frame_indices)
    kept: dict[int, tuple[npt.NDArray[np.uint8], float]] = {}
    seen = 0
    with _open(file) as (container, stream):
        stream.thread_type = "AUTO"
        for index, frame in enumerate(container.decode(stream)):
            seen = index + 1
            if frame.is_corrupt:
                raise _corrupt(file, f"frame {index} of {clock.total_frames} is damaged")
            if index in wanted:
                time = index / clock.fps
                if frame.pts is not None:
                    time = float((frame.pts - clock.start) * frame.time_base)
                kept[index] = (_upright_rgb(frame, stream), time)
            if index == last:
                break
    if seen <= last:
        raise _corrupt(file, f"only {seen} of {clock.total_frames} frames can be decoded")
    frames_THWC = np.stack([kept[i][0] for i in frame_indices])
    return frames_THWC, tuple(kept[i][1] for i in frame_indices)


def _upright_rgb(frame: Any, stream: Any) -> npt.NDArray[np.uint8]:
    """One decoded frame as uint8 (H, W, 3), all of one size and turned as a player would show it."""
    rgb_HWC = frame.to_ndarray(format="rgb24", width=stream.width, height=stream.height)
    quarter_turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(rgb_HWC, quarter_turns))


@contextmanager
def _open(file: str) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream; always closed, every error of FFmpeg typed."""
    try:
        with av.open(file, metadata_errors="ignore") as container:
            streams = [s for s in container.streams.video if not int(s.disposition) & _ATTACHED_PICTURE]
            if not streams:
                raise NoVideoStreamError(file, "has no video stream", "use a file with pictures, not sound only")
            if streams[0].codec_context is None:
                raise _corrupt(file, "is encoded with a codec that this FFmpeg cannot decode")
            yield container, streams[0]
    except av.FFmpegError as error:
        reason = error.strerror or type(error).__name__
        raise _corrupt(file, f"cannot be decoded ({reason})") from error


def _corrupt(file: str, problem: str) -> CorruptVideoError:
    return CorruptVideoError(file, problem, "download it again, or leave this sample out")
