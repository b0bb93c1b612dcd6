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
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from appo.files import atomic_write
from appo.types import VideoSource
from appo.video.image_sequence import list_pictures
from appo.video.reader import Call, FrameSampling, SampledVideo, call_inline, local_path, read_video

FORMAT = 1  # part of every key: raise it when the meaning of a source or of an entry changes
LONGEST_SIDE = 8192  # of a cached frame: WebP ends at 16383, Pillow's limit for a picture earlier
# Seconds for `cache_frames`: for a process to load transformers and the processor, and for one video.
LOAD_LIMIT, VIDEO_LIMIT = 600.0, 1800.0
_DIGEST_BYTES = hashlib.sha256().digest_size


class FrameCache:
    """A folder of sampled videos, for any number of processes and runs at once.

    The key of an entry: absolute path, size and time of change of the file (of every picture of a folder), clip,
    sampling, and the processor's rule (its class, temporal patch size, the versions of transformers and PyAV). A
    damaged entry is decoded again and replaced. Entries are never deleted: delete the folder whenever you like.
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
        self, source: VideoSource, video_processor: Any, sampling: FrameSampling, call: Call = call_inline
    ) -> tuple[SampledVideo, bool]:
        """What :func:`appo.video.reader.read_video` returns or raises, and whether it was in the folder.

        Raises:
            OSError: a new entry cannot be written.
        """
        key = key_of(source, video_processor, sampling)
        video = self._load(key, source)
        if video is not None:
            return video, True
        video = read_video(source, video_processor, sampling, call)
        # A file that changed while it was read must not be stored under its old key.
        if max(video.frames_THWC.shape[1:]) <= LONGEST_SIDE and key_of(source, video_processor, sampling) == key:
            self._store(key, video)
        return video, False

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / name[2:]

    def _load(self, key: str, source: VideoSource) -> SampledVideo | None:
        """The entry; None if there is none, or if it is damaged."""
        try:
            data = self._path(key).read_bytes()
        except OSError:
            return None
        digest, body = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        return _unpack(body, source) if hashlib.sha256(body).digest() == digest else None

    def _store(self, key: str, video: SampledVideo) -> None:
        """Write an entry; other processes read all of it or nothing."""
        path, body = self._path(key), _pack(video, key)
        try:
            path.parent.mkdir(exist_ok=True)
            atomic_write(path, hashlib.sha256(body).digest() + body)
        except OSError as error:
            raise self._error("cannot be written to", error) from error

    def _error(self, problem: str, error: OSError) -> OSError:
        reason = f"the cache of frames {problem} ({error.strerror or error})"
        return OSError(f"{self.folder}: {reason}; free space, or set another frame_cache")


def cache_in(folder: str | None) -> FrameCache | None:
    """The cache of a folder, where a setting names one."""
    return FrameCache(folder) if folder else None


@dataclass(frozen=True)
class FrameCaching:
    """What `appo data check --frame-cache` puts into a cache, before a run asks for it."""

    folder: str  # of the cache
    model: str  # Hugging Face folder or hub id, whose video processor chooses the frames
    sampling: FrameSampling  # how many


def cache_frames(task: tuple[VideoSource, FrameCaching], allow: Callable[[float], None]) -> str:
    """Put the frames of one video into the cache, unless they are there: a function for `run_tasks`.

    Returns:
        What is wrong, in one line, or "".
    """
    source, caching = task
    allow(LOAD_LIMIT)
    try:
        processor = _video_processor(caching.model)
        allow(VIDEO_LIMIT)
        FrameCache(caching.folder).read(source, processor, caching.sampling)
    except Exception as error:  # of the model's folder, the decoder, the disk: each names its cause
        return " ".join(str(error).split()) or type(error).__name__
    return ""


@cache
def _video_processor(model: str) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(model).video_processor


def key_of(source: VideoSource, video_processor: Any, sampling: FrameSampling) -> str:
    """Everything that decides which frames are read, as JSON.

    Raises:
        VideoError: there is no such file or folder.
    """
    import av
    import transformers

    path = local_path(source)
    files = list_pictures(path) if source.frames_fps else [path]
    states = [(file.name, (state := file.stat()).st_size, state.st_mtime_ns) for file in files]
    rule = type(video_processor)
    return json.dumps({
        "format": FORMAT,
        "path": str(path),
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
    header, start, frames = json.loads(line), 0, []
    for size in header["bytes"]:
        frames.append(_picture(pictures[start : start + size]))
        start += size
    times, indices = tuple(header["timestamps"]), tuple(header["frame_indices"])
    return SampledVideo(source.path, np.stack(frames), times, header["fps"], header["total_frames"], indices)


def _webp(frame_HWC: npt.NDArray[np.uint8]) -> bytes:
    """Lossless, at the lowest effort: writing already takes longer than decoding a short clip."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame_HWC).save(buffer, "webp", lossless=True, method=0, quality=0)
    return buffer.getvalue()


def _picture(data: bytes) -> npt.NDArray[np.uint8]:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as picture:
        return np.array(picture.convert("RGB"))
