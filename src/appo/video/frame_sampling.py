"""Frame sampling: its types and errors, and which frames the model's own video processor chooses.

Which frames are sampled is the processor's decision: its rule is called, not rewritten.

Shape suffixes: T sampled frames, H height, W width, C = 3 colours (RGB).
"""

from __future__ import annotations

import copy
import inspect
import math
import statistics
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from appo.types import ClipError, VideoError, VideoSource

RATE_TOLERANCE = 0.01  # a stated frame rate that misses the frames' own times by more is not used


class MissingVideoError(VideoError):
    """There is no readable file at the path, or a folder where a file should be, or a file where a folder should be."""


class EmptyVideoError(VideoError):
    """The file has 0 bytes, or the folder no pictures."""


class CorruptVideoError(VideoError):
    """The file is no video, was cut off, or holds damaged frames; or the folder holds something that is no picture."""


class NoVideoStreamError(VideoError):
    """The file has sound (or a cover picture) only."""


class TooFewFramesError(VideoError):
    """The video, or the clip of it, has fewer frames than the model merges into one of its own."""


class ZeroDurationError(VideoError):
    """All frames have the same time."""


@dataclass(frozen=True)
class FrameSampling:
    """How many frames are taken of a video."""

    fps: float = 2.0  # frames per second wanted (the paper: 1 or 2)
    max_frames: int = 16  # never more than this many (the paper: 16; 100 for grounding)
    min_frames: int = 4  # at least this many, as far as the video has them

    def __post_init__(self) -> None:
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"fps must be a positive number of frames per second, not {self.fps}")
        if not 1 <= self.min_frames <= self.max_frames:
            bounds = f"min_frames={self.min_frames} and max_frames={self.max_frames}"
            raise ValueError(f"1 <= min_frames <= max_frames must hold, not {bounds}")


@dataclass(frozen=True)
class SampledVideo:
    """The sampled frames of one video, or of a clip as if it were a video of its own.

    Attributes:
        timestamps_T: seconds of each sampled frame since the first frame of the video (of the clip), from the file's
            own clock.
    """

    path: str  # the file or folder, as given
    frames_THWC: npt.NDArray[np.uint8]  # uint8 (T, H, W, 3), RGB, turned upright
    timestamps_T: tuple[float, ...]
    fps: float  # frames per second of the whole video (clip), not of the sample
    total_frames: int  # frames of the whole video (clip)
    frame_indices: tuple[int, ...]  # which of the video's (clip's) frames were sampled

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
            "frames_indices": list(self.frame_indices),
        }


def merged_frames(video_processor: Any) -> int:
    """How many sampled frames become one frame of the language model: 1 where a processor does not say."""
    return getattr(video_processor, "temporal_patch_size", None) or 1


def lm_frame_timestamps(video: SampledVideo, temporal_patch_size: int = 2) -> tuple[float, ...]:
    """Seconds of each frame of the language model: the mean of the sampled frames merged into it.

    An incomplete last group is filled with its last frame, as the processor does.
    """
    times = list(video.timestamps_T)
    times += times[-1:] * (-len(times) % temporal_patch_size)
    groups = range(0, len(times), temporal_patch_size)
    return tuple(math.fsum(times[i : i + temporal_patch_size]) / temporal_patch_size for i in groups)


@dataclass(frozen=True)
class Timeline:
    """The times of a video's (clip's) frames, before any is decoded."""

    times: Sequence[float]  # seconds of each frame since the first frame of the whole video, ascending
    last_duration: float  # seconds that the last frame lasts
    stated_fps: float  # the rate the container states; 0: none
    origin: int = 0  # time stamp of the whole video's first frame, in ticks of its file
    first: int = 0  # which frame of the whole video ``times[0]`` is of

    @property
    def fps(self) -> float:
        """Frames per second: as stated, or from the frames' own times where the two disagree (not in the paper)."""
        count, stated = len(self.times), self.stated_fps
        seconds = self.times[-1] - self.times[0] + self.last_duration
        # Half a frame of slack: containers round times, Matroska to milliseconds.
        agrees = stated and abs(count / stated - seconds) <= max(0.5 / stated, RATE_TOLERANCE * seconds)
        return stated if agrees else count / seconds

    @property
    def seconds(self) -> float:
        """When the last frame ends, since the first frame of the whole video."""
        return self.times[-1] + self.last_duration

    def cut(self, source: VideoSource) -> Timeline:
        """The frames of a clip: those whose middle (start + duration / 2) lies within it.

        Rounded times therefore lose or add no frame, and consecutive clips share none. A frame of more than average
        duration counts as one of average duration.

        Raises:
            ClipError: the clip starts behind the end of the video.
            TooFewFramesError: it has fewer than 2 frames.
            ZeroDurationError: its frames have all the same time.
        """
        durations = [after - before for before, after in pairwise(self.times)] + [self.last_duration]
        longest = 1 / self.fps
        middles = [time + min(duration, longest) / 2 for time, duration in zip(self.times, durations, strict=True)]
        first = 0 if source.start is None else bisect_left(middles, source.start)
        stop = len(middles) if source.end is None else bisect_left(middles, source.end)
        if first == len(middles):
            problem = f"{source.clip} starts behind the video's {self.seconds:.2f} s"
            raise ClipError(source.path, problem, "correct the clip")
        if stop - first < 2:
            count = "one frame" if stop > first else "no frames"
            raise TooFewFramesError(source.path, f"{source.clip} has {count}", "use at least 2 frames")
        times = self.times[first:stop]
        if times[0] == times[-1]:
            raise ZeroDurationError(source.path, f"all frames of {source.clip} have the same time", "use a longer clip")
        return Timeline(times, durations[stop - 1], self.stated_fps, self.origin, self.first + first)


def typical_duration(times: Sequence[float]) -> float:
    """Seconds between two frames: the duration of a last frame of which none is stated."""
    return statistics.median(after - before for before, after in pairwise(times))


def choose_frames(
    source: VideoSource, total_frames: int, fps: float, video_processor: Any, sampling: FrameSampling
) -> tuple[int, ...]:
    """The frames of a video (clip) that the processor's own rule chooses, ascending.

    Raises:
        TooFewFramesError: there are fewer frames than the model merges into one.
        ValueError: `sampling` does not fit the processor.
    """
    from transformers.video_processing_utils import BaseVideoProcessor
    from transformers.video_utils import VideoMetadata

    merged = merged_frames(video_processor)
    if total_frames < merged:
        problem = f"{source.clip} has {total_frames} frames, the model merges {merged} into one"
        raise TooFewFramesError(source.path, problem, "use a longer clip")
    if sampling.min_frames < merged:
        raise ValueError(f"min_frames={sampling.min_frames} must be at least temporal_patch_size={merged}")
    # Some processors take the bounds as arguments, others read their own attributes: set both, on a copy.
    chooser = copy.copy(video_processor)
    chooser.num_frames, chooser.fps = None, sampling.fps
    bounds = {"min_frames": sampling.min_frames, "max_frames": sampling.max_frames}
    for name, value in bounds.items():
        setattr(chooser, name, value)
    metadata = VideoMetadata(total_num_frames=total_frames, fps=fps, duration=total_frames / fps)
    takes_number = "num_frames" in inspect.signature(video_processor.sample_frames).parameters
    wanted = max(int(total_frames / fps * sampling.fps), sampling.min_frames)
    wanted = min(wanted, sampling.max_frames, total_frames) // merged * merged
    unbounded = not hasattr(video_processor, "max_frames")
    if unbounded and takes_number:  # InternVL, SmolVLM
        chosen = chooser.sample_frames(metadata=metadata, num_frames=wanted)
    elif unbounded and hasattr(video_processor, "max_duration"):  # GLM's rule takes neither: transformers' own, evenly
        chosen = BaseVideoProcessor.sample_frames(chooser, metadata, num_frames=wanted)
    else:
        chosen = chooser.sample_frames(metadata=metadata, fps=sampling.fps, **bounds)
    # Rounding makes the rule of Qwen2-VL add an index past the end at some lengths, e.g. 126 of 1165 frames.
    frame_indices = tuple(int(i) for i in chosen if int(i) < total_frames)
    if not 0 < len(frame_indices) <= sampling.max_frames:
        problem = f"{type(video_processor).__name__} sampled {len(frame_indices)} frames of {source.path}"
        raise ValueError(f"{problem} though max_frames={sampling.max_frames}; use a processor that heeds it")
    return frame_indices
