"""Whether one video, folder of frames or image can be shown: all of it is decoded once, nothing is kept.

This runs in processes of their own (:mod:`appo.video.workers`) and therefore loads little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from appo.types import ClipError, VideoError, VideoSource
from appo.video.frame_sampling import Timeline
from appo.video.image_sequence import folder_timeline, list_pictures, read_pictures
from appo.video.pyav_reader import decode, read_timeline
from appo.video.reader import MissingVideoError, TooFewFramesError, ZeroDurationError, local_path

MISSING, UNDECODABLE, TOO_SHORT, BAD_IMAGE, OUTSIDE = "missing", "undecodable", "too short", "image", "span outside"
# Seconds after which a file is given up: this, and so many times the length of the video.
LIMIT, LIMIT_PER_SECOND = 60.0, 10.0
PICTURES_AT_ONCE = 16


@dataclass(frozen=True)
class ImageFile:
    """The file of an image."""

    path: str


# What is probed: all of a video (of a folder of frames), or an image.
Media = VideoSource | ImageFile


@dataclass(frozen=True)
class Probe:
    """What was found.

    Attributes:
        seconds: length of the video; 0 for images, and where there is a problem.
        category: empty: nothing is wrong; else `MISSING`, `UNDECODABLE`, `TOO_SHORT` or `BAD_IMAGE`.
        problem: what is wrong with which file, in one line.
        bad_clips: those of the sources asked for that cannot be shown, each with its category (`TOO_SHORT` or
            `OUTSIDE`) and problem.
    """

    seconds: float = 0.0
    category: str = ""
    problem: str = ""
    bad_clips: tuple[tuple[VideoSource, str, str], ...] = ()


def probe(task: tuple[Media, Sequence[VideoSource], bool], allow: Callable[[float], None]) -> Probe:
    """Decode a file.

    Args:
        task: the file, what is shown of it, and whether to be quick: then all packets are read, but one frame is
            decoded only.
        allow: is told how many seconds decoding may take.

    Returns:
        Its length, or what is wrong with it; nothing is raised.
    """
    media, sources, quick = task
    try:
        if isinstance(media, ImageFile):
            _read_image(media.path)
            return Probe()
        timeline = _read_folder(media, quick) if media.frames_fps else _read_file(media, quick, allow)
        seconds = timeline.times[-1] + timeline.last_duration
        return Probe(seconds, bad_clips=tuple(bad for source in sources for bad in _bad_clip(source, timeline)))
    except (TooFewFramesError, ZeroDurationError) as error:
        return Probe(category=TOO_SHORT, problem=str(error))
    except MissingVideoError as error:
        return Probe(category=MISSING, problem=str(error))
    except VideoError as error:
        return Probe(category=UNDECODABLE, problem=str(error))
    except Exception as error:  # decoders of damaged files raise anything
        reason = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
        problem = f"{media.path}: cannot be read ({reason}); download it again, or leave its rows out"
        return Probe(category=BAD_IMAGE if isinstance(media, ImageFile) else UNDECODABLE, problem=problem)


def _read_file(video: VideoSource, quick: bool, allow: Callable[[float], None]) -> Timeline:
    file = str(local_path(video))
    timeline = read_timeline(file)
    allow(LIMIT + LIMIT_PER_SECOND * (timeline.times[-1] + timeline.last_duration))
    # Asked for its last frame, the decoder goes through all of them and refuses damage on the way.
    decode(file, [0 if quick else len(timeline.times) - 1], timeline)
    return timeline


def _read_folder(video: VideoSource, quick: bool) -> Timeline:
    folder = local_path(video)
    pictures = list_pictures(folder)
    timeline = folder_timeline(folder, pictures, video.frames_fps or 1.0)
    for start in range(0, 1 if quick else len(pictures), PICTURES_AT_ONCE):
        read_pictures([pictures[0], *pictures[start : start + PICTURES_AT_ONCE]])  # the first: all have its size
    return timeline


def _bad_clip(source: VideoSource, timeline: Timeline) -> Iterator[tuple[VideoSource, str, str]]:
    if source.is_whole:
        return
    try:
        timeline.cut(source)
    except ClipError as error:
        yield source, OUTSIDE, str(error)
    except VideoError as error:
        yield source, TOO_SHORT, str(error)


def _read_image(path: str) -> None:
    from PIL import Image

    with Image.open(path) as opened:
        opened.convert("RGB")
