"""Small real video files for the tests, written with PyAV.

Shape suffixes: T frames, H height, W width, C = 3 colours (RGB).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

BRIGHTNESS_STEP = 3
NTSC = Fraction(30000, 1001)


def counted_frames(frames: int, *, height: int = 48, width: int = 64) -> np.ndarray:
    """uint8 (T, H, W, 3) grey frames whose brightness tells their index, up to 80 frames."""
    if frames > 80:
        raise ValueError("more than 80 shades of grey are too close together to survive a codec")
    shade_T = np.arange(frames, dtype=np.uint8) * BRIGHTNESS_STEP + 8
    return np.broadcast_to(shade_T[:, None, None, None], (frames, height, width, 3)).copy()


def indices_seen(frames_THWC: np.ndarray) -> tuple[int, ...]:
    """Inverse of `counted_frames`: which frames these are, read from their pixels."""
    shade_T = frames_THWC.reshape(len(frames_THWC), -1).mean(axis=1)
    return tuple(round(float(shade - 8) / BRIGHTNESS_STEP) for shade in shade_T)


def noise_frames(frames: int, *, height: int = 48, width: int = 64) -> np.ndarray:
    """uint8 (T, H, W, 3) frames that compress badly, so that a cut or a damage lies within their data."""
    return np.random.default_rng(0).integers(0, 255, (frames, height, width, 3), dtype=np.uint8)


def write_clip(
    path: Path,
    frames_THWC: np.ndarray,
    fps: float | Fraction,
    codec: str = "libx264",
    *,
    pix_fmt: str = "yuv420p",
    times: Sequence[float] | None = None,
    rotation: int = 0,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    packet_filter: Callable[[list[Any]], list[Any]] = list,
) -> Path:
    """Encode frames to a file whose suffix names the container; returns the path.

    Args:
        times: seconds of each frame for a variable frame rate; else frame i is shown at i / fps.
        rotation: degrees counter-clockwise that a player turns the picture.
        packet_filter: changes the encoded packets before they are written.
    """
    rate = Fraction(fps).limit_denominator(100_000)
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = pix_fmt
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1_000_000)
        if rotation:
            stream.set_display_rotation(rotation)
        packets: list[Any] = []
        for index, frame_HWC in enumerate(frames_THWC):
            frame = av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")
            frame.time_base = 1 / rate if times is None else Fraction(1, 1_000_000)
            frame.pts = index if times is None else round(times[index] * 1_000_000)
            packets += stream.encode(frame)
        packets += stream.encode(None)
        for packet in packet_filter(packets):
            container.mux(packet)
    return path


def write_sound(path: Path, codec: str = "aac", *, cover_HWC: np.ndarray | None = None) -> Path:
    """Half a second of tone without moving pictures, perhaps with a cover picture as music files have."""
    rate = 48_000
    with av.open(str(path), "w") as container:
        sound = container.add_stream(codec, rate=rate, layout="mono")
        wave = np.sin(np.arange(rate // 2) * 0.05) * 8000
        frame = av.AudioFrame.from_ndarray(wave.astype(np.int16)[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        packets = []
        if cover_HWC is not None:
            cover = container.add_stream("png", rate=1)
            cover.height, cover.width = cover_HWC.shape[:2]
            cover.pix_fmt = "rgb24"
            cover.disposition = av.stream.Disposition.attached_pic
            packets += cover.encode(av.VideoFrame.from_ndarray(cover_HWC, format="rgb24")) + cover.encode(None)
        for packet in [*packets, *sound.encode(frame), *sound.encode(None)]:
            container.mux(packet)
    return path


def cut_file(path: Path, source: Path, share: float) -> Path:
    """The first `share` of the bytes of `source`."""
    data = source.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def damage_file(path: Path, source: Path, start: float, stop: float) -> Path:
    """`source` with the bytes between two shares of it replaced by noise."""
    data = bytearray(source.read_bytes())
    first, last = int(len(data) * start), int(len(data) * stop)
    data[first:last] = np.random.default_rng(0).integers(0, 255, last - first, dtype=np.uint8).tobytes()
    path.write_bytes(data)
    return path


def has_encoder(codec: str) -> bool:
    """Whether this build of FFmpeg can write the codec."""
    try:
        av.codec.Codec(codec, "w")
    except ValueError:
        return False
    return True
