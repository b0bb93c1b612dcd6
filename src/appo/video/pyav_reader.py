"""A video file's own clock, and its frames; by PyAV.

What cannot be decoded completely raises a typed error of one line: training on repeated, missing or grey frames
would not be noticed.

Shape suffixes: T wanted frames, H height, W width, C = 3 colours (RGB).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import VideoReformatter

from appo.video.frame_sampling import (
    CorruptVideoError,
    NoVideoStreamError,
    Timeline,
    TooFewFramesError,
    ZeroDurationError,
    typical_duration,
)

LENGTH_TOLERANCE = 0.05  # a Matroska file that misses a larger share of its stated length has been cut off

_ATTACHED_PICTURE = int(av.stream.Disposition.attached_pic)
_DURATION_TAG = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)")
_REENCODE = "encode it again, e.g. with ffmpeg"


def read_timeline(file: str) -> Timeline:
    """The frames' times, from the packets: nothing is decoded, and the header's count, often wrong, is not used.

    Raises:
        VideoError: the file is no video, is cut off, or has fewer than 2 frames or no duration.
    """
    ticks: list[int | None] = []
    packets = last_duration = 0
    with _open(file) as (container, stream):
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise _corrupt(file, f"is cut off or damaged after {len(ticks)} frames")
            packets += packet.size > 0
            # A discarded packet lies before the start of an edit list: needed to decode others, never shown.
            if packet.size and not packet.is_discard:
                ticks.append(packet.pts)
                last_duration = packet.duration or last_duration
        if len(ticks) < 2:
            count = "one frame" if ticks else "no frames"
            raise TooFewFramesError(file, f"has {count}", "use a clip of at least 2 frames")
        _check_complete(file, container, stream, packets, ticks)
        return _timeline_of(file, stream, ticks, last_duration)


def _check_complete(file: str, container: Any, stream: Any, packets: int, ticks: Sequence[int | None]) -> None:
    """Refuse a file that ends early between two packets, by an MP4's index or a Matroska's track length."""
    # Older PyAV has no index_entries; a cut inside a packet is found without them.
    promised = len(getattr(stream, "index_entries", ()))
    if "mp4" in container.format.name and packets < promised:
        raise _corrupt(file, f"is cut off: {packets} of {promised} frames are there")
    stated = _DURATION_TAG.fullmatch(stream.metadata.get("DURATION", ""))
    stamps = [tick for tick in ticks if tick is not None]
    if stated and stamps:
        hours, minutes, seconds = map(float, stated.groups())
        length = hours * 3600 + minutes * 60 + seconds
        reached = float(max(stamps) * stream.time_base)
        frame = 1 / float(stream.average_rate or 1)
        if reached + 2 * frame < (1 - LENGTH_TOLERANCE) * length:
            raise _corrupt(file, f"is cut off: {reached:.2f} of {length:.2f} seconds are there")


def _timeline_of(file: str, stream: Any, ticks: Sequence[int | None], last_duration: int) -> Timeline:
    """Seconds from the packets' time stamps, or from the stated rate where a bare stream has none."""
    stated = float(stream.average_rate or 0)
    stamps = sorted(tick for tick in ticks if tick is not None)
    if len(stamps) < len(ticks):
        if not stated:
            raise ZeroDurationError(file, "has neither frame times nor a frame rate", _REENCODE)
        return Timeline([i / stated for i in range(len(ticks))], 1 / stated, stated)
    if stamps[0] == stamps[-1]:
        raise ZeroDurationError(file, f"lasts 0 seconds: all {len(stamps)} frames have the same time", _REENCODE)
    times = [float((tick - stamps[0]) * stream.time_base) for tick in stamps]
    # The last frame has no successor: it lasts as stated, which may be nothing, or as long as the others.
    last = max(float(last_duration * stream.time_base), typical_duration(times))
    return Timeline(times, last, stated, origin=stamps[0])


def decode(file: str, wanted: Sequence[int], timeline: Timeline) -> tuple[npt.NDArray[np.uint8], tuple[float, ...]]:
    """The wanted frames of a timeline: uint8 (T, H, W, 3), and their seconds (T,) since its first frame.

    Raises:
        VideoError: a frame up to the last wanted is damaged or missing.
    """
    offset, count = timeline.first, len(timeline.times)
    last = offset + max(wanted)
    indices, decoded = set(wanted), 0
    frames: dict[int, tuple[npt.NDArray[np.uint8], float]] = {}
    reformatter = VideoReformatter()  # one of the file: setting one up costs more than converting a small frame
    with _open(file) as (container, stream):
        # Not AUTO: threads over frames return a frame before its damage is known.
        stream.thread_type = "SLICE"
        for number, frame in enumerate(container.decode(stream)):
            decoded = number + 1
            if frame.is_corrupt:
                raise _corrupt(file, f"frame {number} of {offset + count} is damaged")
            if number - offset in indices:
                time = timeline.times[number - offset]
                if frame.pts is not None:
                    time = float((frame.pts - timeline.origin) * frame.time_base)
                frames[number - offset] = _upright_rgb(frame, stream, reformatter), time - timeline.times[0]
            if number == last:
                break
    if decoded <= last:
        raise _corrupt(file, f"only {decoded} of {offset + count} frames can be decoded")
    frames_THWC = np.stack([frames[i][0] for i in wanted])
    return frames_THWC, tuple(frames[i][1] for i in wanted)


def _upright_rgb(frame: Any, stream: Any, reformatter: VideoReformatter) -> npt.NDArray[np.uint8]:
    """One decoded frame as uint8 (H, W, 3), all of one size and upright."""
    rgb_HWC = reformatter.reformat(frame, stream.width, stream.height, "rgb24").to_ndarray()
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
