"""Sampled frames on disk: a video is decoded once for all runs, and again when the file or the sampling changes.

An entry is one file: a SHA-256 of what follows, a line of JSON, and one lossless WebP a frame. Why WebP:
``benchmarks/frame_cache.py``.

Shape suffixes: T sampled frames, H height, W width, C = 3 colours (RGB).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from appo.files import atomic_write
from appo.types import VideoSource
from appo.video.image_sequence import list_pictures
from appo.video.reader import Call, FrameSampling, SampledVideo, here, local_path, read_video

# Part of every key: to be raised when a source, or an entry, comes to mean something else than before.
FORMAT = 1
LONGEST_SIDE = 8192  # of a frame that is kept: WebP ends at 16383, Pillow's trust in a picture earlier
_DIGEST_BYTES = hashlib.sha256().digest_size


class FrameCache:
    """A folder of sampled videos, for any number of processes and runs at once.

    An entry is found by the absolute path, size and time of change of the file (of every picture of a folder), the
    clip, the sampling, and the processor's rule (its class, temporal patch size, and the versions of transformers and
    PyAV). One that is damaged is decoded again and replaced. None is ever deleted: delete the folder when you like.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Make the folder.

        Raises:
            ValueError: this Pillow cannot write WebP.
            OSError: the folder cannot be made.
        """
        from PIL import features

        if not features.check("webp"):
            raise ValueError("frame_cache needs a Pillow with WebP: install Pillow's own wheel, or leave it out")
        self.folder = Path(folder).absolute()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._error("cannot be made", error) from error

    def read(
        self, source: VideoSource, video_processor: Any, sampling: FrameSampling, call: Call = here
    ) -> tuple[SampledVideo, bool]:
        """What :func:`appo.video.reader.read_video` returns, from the folder if it is there; and whether it was there.

        Raises:
            VideoError: as :func:`appo.video.reader.read_video`.
            OSError: a new entry cannot be written.
        """
        key = key_of(source, video_processor, sampling)
        video = self._load(key, source)
        if video is not None:
            return video, True
        video = read_video(source, video_processor, sampling, call)
        # A file that changed while it was read must not be kept under what it was before.
        if max(video.frames_THWC.shape[1:]) <= LONGEST_SIDE and key_of(source, video_processor, sampling) == key:
            self._store(key, video)
        return video, False

    def _place(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / name[2:]

    def _load(self, key: str, source: VideoSource) -> SampledVideo | None:
        """The entry; None if there is none, or if it is damaged."""
        try:
            data = self._place(key).read_bytes()
        except OSError:
            return None
        digest, body = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        return _unpack(body, source) if hashlib.sha256(body).digest() == digest else None

    def _store(self, key: str, video: SampledVideo) -> None:
        """A reader sees all of an entry or nothing, however many write it."""
        place, body = self._place(key), _pack(video, key)
        try:
            place.parent.mkdir(exist_ok=True)
            atomic_write(place, hashlib.sha256(body).digest() + body)
        except OSError as error:
            raise self._error("cannot be written to", error) from error

    def _error(self, problem: str, error: OSError) -> OSError:
        reason = error.strerror or error
        return OSError(
            f"{self.folder}: the cache of frames {problem} ({reason}); free space, or set another frame_cache"
        )


def cache_in(folder: str | None) -> FrameCache | None:
    """The cache of a folder, where a setting names one."""
    return FrameCache(folder) if folder else None


def key_of(source: VideoSource, video_processor: Any, sampling: FrameSampling) -> str:
    """Everything that decides which frames are read, as JSON.

    Raises:
        VideoError: there is no such file or folder.
    """
    import av
    import transformers

    place = local_path(source)
    files = list_pictures(place) if source.frames_fps else [place]
    states = [(path.name, (state := path.stat()).st_size, state.st_mtime_ns) for path in files]
    rule = type(video_processor)
    return json.dumps({
        "format": FORMAT,
        "path": str(place),
        "files": states,
        "clip": [source.start, source.end, source.frames_fps],
        "sampling": [sampling.fps, sampling.min_frames, sampling.max_frames],
        "rule": [rule.__module__, rule.__qualname__, getattr(video_processor, "temporal_patch_size", None)],
        "versions": [transformers.__version__, av.__version__],
    })  # fmt: skip


def _pack(video: SampledVideo, key: str) -> bytes:
    """A line of JSON and the frames behind it. The key is for people: what is this file?"""
    pictures = [_webp(frame_HWC) for frame_HWC in video.frames_THWC]
    header = {
        "timestamps": video.timestamps_T,
        "fps": video.fps,
        "total_frames": video.total_frames,
        "frame_indices": video.frame_indices,
        "bytes": [len(picture) for picture in pictures],
        "key": json.loads(key),
    }
    return b"".join([json.dumps(header).encode(), b"\n", *pictures])


def _unpack(body: bytes, source: VideoSource) -> SampledVideo:
    line, _, pictures = body.partition(b"\n")
    header, place, frames = json.loads(line), 0, []
    for size in header["bytes"]:
        frames.append(_picture(pictures[place : place + size]))
        place += size
    return SampledVideo(
        source.path,
        np.stack(frames),
        tuple(header["timestamps"]),
        header["fps"],
        header["total_frames"],
        tuple(header["frame_indices"]),
    )


def _webp(frame_HWC: npt.NDArray[np.uint8]) -> bytes:
    """Lossless, and of the least effort: writing already takes longer than decoding a short clip."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame_HWC).save(buffer, "webp", lossless=True, method=0, quality=0)
    return buffer.getvalue()


def _picture(data: bytes) -> npt.NDArray[np.uint8]:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as picture:
        return np.array(picture.convert("RGB"))
