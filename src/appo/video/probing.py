"""Whether a video, folder of frames or image can be decoded: all of it is, once, and nothing is kept.

This runs in worker processes (:mod:`appo.video.decode_worker`) and therefore loads little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from appo.types import ClipError, VideoError, VideoSource
from appo.video.frame_sampling import MissingVideoError, Timeline, TooFewFramesError, ZeroDurationError
from appo.video.image_sequence import read_pictures
from appo.video.pyav_reader import decode
from appo.video.reader import probe

MISSING, UNDECODABLE, TOO_SHORT, BAD_IMAGE, OUTSIDE = "missing", "undecodable", "too short", "image", "span outside"
# Seconds after which a file is given up: LIMIT + LIMIT_PER_SECOND * the seconds of the video.
LIMIT, LIMIT_PER_SECOND = 60.0, 10.0
PICTURES_AT_ONCE = 16


@dataclass(frozen=True)
class ImageFile:
    """The file of an image."""

    path: str


Media = VideoSource | ImageFile  # a video is probed as a whole


@dataclass(frozen=True)
class MediaProbe:
    """What was found.

    Attributes:
        bad_clips: clips that cannot be read, each with its category (`TOO_SHORT` or `OUTSIDE`) and problem.
    """

    seconds: float = 0.0  # length of the video; 0 for images, and where there is a problem
    category: str = ""  # `MISSING`, `UNDECODABLE`, `TOO_SHORT` or `BAD_IMAGE`; empty: nothing is wrong
    problem: str = ""  # names the file, in one line
    bad_clips: tuple[tuple[VideoSource, str, str], ...] = ()


def probe_media(task: tuple[Media, Sequence[VideoSource], bool], allow: Callable[[float], None]) -> MediaProbe:
    """Decode a file: a function for `run_tasks`.

    Args:
        task: the file; the clips of it that are used; whether to read all packets but decode one frame only.
        allow: called with how many seconds decoding may take.
    """
    media, clips, quick = task
    try:
        if isinstance(media, ImageFile):
            _read_image(media.path)
            return MediaProbe()
        timeline = _read_video(media, quick, allow)
        return MediaProbe(timeline.seconds, bad_clips=tuple(bad for clip in clips for bad in _bad_clip(clip, timeline)))
    except (TooFewFramesError, ZeroDurationError) as error:
        return MediaProbe(category=TOO_SHORT, problem=str(error))
    except MissingVideoError as error:
        return MediaProbe(category=MISSING, problem=str(error))
    except VideoError as error:
        return MediaProbe(category=UNDECODABLE, problem=str(error))
    except Exception as error:  # decoders of damaged files raise anything
        reason = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
        problem = f"{media.path}: cannot be read ({reason}); download it again, or leave its rows out"
        return MediaProbe(category=BAD_IMAGE if isinstance(media, ImageFile) else UNDECODABLE, problem=problem)


def _read_video(video: VideoSource, quick: bool, allow: Callable[[float], None]) -> Timeline:
    probed = probe(video)
    timeline, pictures = probed.timeline, probed.pictures
    for start in range(0, min(len(pictures), 1) if quick else len(pictures), PICTURES_AT_ONCE):
        read_pictures([pictures[0], *pictures[start : start + PICTURES_AT_ONCE]])  # the first: all have its size
    if not pictures:
        allow(LIMIT + LIMIT_PER_SECOND * timeline.seconds)
        # The decoder reaches the last frame through all others and refuses damage on the way.
        decode(str(probed.path), [0 if quick else len(timeline.times) - 1], timeline)
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
