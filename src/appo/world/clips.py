"""Frames to a small H.264 file, and back."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import av
import numpy as np

from appo.world.drawing import FPS, Frames

# One thread, no B-frames: reproducible bytes, cheap to decode. Quality 18 keeps colours within a few levels.
X264 = {"preset": "ultrafast", "crf": "18", "threads": "1"}


def write_clip(path: str | Path, frames: Frames) -> None:
    """Write frames, uint8 (T, H, W, 3), as an H.264 mp4 (yuv420p) of `FPS` frames per second."""
    Path(path).write_bytes(encode(frames))


def encode(frames: Frames) -> bytes:
    """The bytes of an mp4 file that holds these frames."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=FPS, options=X264)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def decode(data: bytes, every: int = 1) -> Frames:
    """Every `every`-th frame of an mp4 file's bytes, uint8 (T, H, W, 3)."""
    with av.open(io.BytesIO(data)) as container:
        # Starting decoder threads costs more than they save on such small frames.
        container.streams.video[0].codec_context.thread_count = 1
        frames = enumerate(container.decode(video=0))
        return np.stack([frame.to_ndarray(format="rgb24") for number, frame in frames if number % every == 0])
