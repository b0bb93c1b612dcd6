"""Whether one video, folder of frames or image can be shown: all of it is decoded once, nothing is kept.

This runs in processes of their own (:mod:`appo.video.workers`) and therefore loads little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from appo.video.frame_sampling import Timeline
from appo.video.image_sequence import folder_timeline, list_pictures, read_pictures
from appo.video.pyav_reader import decode, read_timeline
from appo.video.reader import (
    ClipError,
    MissingVideoError,
    TooFewFramesError,
    VideoError,
    VideoSource,
    ZeroDurationError,
    local_path,
)

MISSING, UNDECODABLE, TOO_SHORT, BAD_IMAGE, OUTSIDE = "missing", "undecodable", "too short", "image", "span outside"
# Seconds after which a file is given up: this, and so many times the length of the video.
LIMIT, LIMIT_PER_SECOND = 60.0, 10.0
PICTURES_AT_ONCE = 16

Clip = tuple[float, float]  # from and to which second of a video


@dataclass(frozen=True)
class Media:
    """A file to look at.

    Attributes:
        path: a video file, an image, or (with `frames_fps`) a folder of frames.
        is_image: whether it is an image.
        frames_fps: frames per second of a folder of frames; None: it is a file.
    """

    path: str
    is_image: bool = False
    frames_fps: float | None = None


@dataclass(frozen=True)
class Probe:
    """What was found.

    Attributes:
        seconds: length of the video; 0 for images, and where there is a problem.
        category: empty: nothing is wrong; else `MISSING`, `UNDECODABLE`, `TOO_SHORT` or `BAD_IMAGE`.
        problem: what is wrong with which file, in one line.
        bad_clips: those of the clips asked for that cannot be shown, each with its category (`TOO_SHORT` or `OUTSIDE`)
            and problem.
    """

    seconds: float = 0.0
    category: str = ""
    problem: str = ""
    bad_clips: tuple[tuple[Clip, str, str], ...] = ()


def probe(task: tuple[Media, tuple[Clip, ...], bool], allow: Callable[[float], None]) -> Probe:
    """Decode a file.

    Args:
        task: the file, the clips of it that are shown, and whether to be quick: then all packets are read, but one
            frame is decoded only.
        allow: is told how many seconds decoding may take.

    Returns:
        Its length, or what is wrong with it; nothing is raised.
    """
    media, clips, quick = task
    try:
        if media.is_image:
            _read_image(media.path)
            return Probe()
        timeline = _read_folder(media, quick) if media.frames_fps else _read_file(media, quick, allow)
        seconds = timeline.times[-1] + timeline.last_duration
        return Probe(seconds, bad_clips=tuple(bad for clip in clips for bad in _bad_clip(media, clip, timeline)))
    except (TooFewFramesError, ZeroDurationError) as error:
        return Probe(category=TOO_SHORT, problem=str(error))
    except MissingVideoError as error:
        return Probe(category=MISSING, problem=str(error))
    except VideoError as error:
        return Probe(category=UNDECODABLE, problem=str(error))
    except Exception as error:  # decoders of damaged files raise anything
        reason = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
        problem = f"{media.path}: cannot be read ({reason}); download it again, or leave its rows out"
        return Probe(category=BAD_IMAGE if media.is_image else UNDECODABLE, problem=problem)


def _read_file(media: Media, quick: bool, allow: Callable[[float], None]) -> Timeline:
    file = str(local_path(VideoSource(media.path)))
    timeline = read_timeline(file)
    allow(LIMIT + LIMIT_PER_SECOND * (timeline.times[-1] + timeline.last_duration))
    # Asked for its last frame, the decoder goes through all of them and refuses damage on the way.
    decode(file, [0 if quick else len(timeline.times) - 1], timeline)
    return timeline


def _read_folder(media: Media, quick: bool) -> Timeline:
    folder = local_path(VideoSource(media.path, frames_fps=media.frames_fps))
    pictures = list_pictures(folder)
    timeline = folder_timeline(folder, pictures, media.frames_fps or 1.0)
    for start in range(0, 1 if quick else len(pictures), PICTURES_AT_ONCE):
        read_pictures([pictures[0], *pictures[start : start + PICTURES_AT_ONCE]])  # the first: all have its size
    return timeline


def _bad_clip(media: Media, clip: Clip, timeline: Timeline) -> Iterator[tuple[Clip, str, str]]:
    try:
        timeline.cut(VideoSource(media.path, *clip, media.frames_fps))
    except ClipError as error:
        yield clip, OUTSIDE, str(error)
    except VideoError as error:
        yield clip, TOO_SHORT, str(error)


def _read_image(path: str) -> None:
    from PIL import Image

    with Image.open(path) as opened:
        opened.convert("RGB")
