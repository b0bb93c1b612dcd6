"""What sampled frames cost to store and to read back without loss, against decoding them again.

    python benchmarks/frame_cache.py                     # 720p, clips of 10 and 60 seconds, minutes on a CPU core
    python benchmarks/frame_cache.py --seconds 10 --height 360 --width 640

Clips are generated (textures that pan, a moving square, grain; H.264 by libx264 at its defaults, 30 frames a second),
16 frames are sampled as Qwen2.5-VL samples them. Every storage gives back the same bytes, or the run stops:

raw        the array as it is
deflate    zlib, level 1, over the array
png        one picture a frame, zlib level 1 behind PNG's filters
webp       one picture a frame, lossless WebP of the least effort
ffv1       one lossless video, in slices

Files are in the page cache when they are read: a disk adds its bytes over its speed.

Shape suffixes: T frames, H height, W width, C = 3 colours.
"""

from __future__ import annotations

import harness  # first: it sets OpenMP's waiting before torch loads

# isort: split
import argparse
import io
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from appo.video.reader import FrameSampling, read_video

RATE = 30
Frames = np.ndarray[Any, np.dtype[np.uint8]]


# --- the clip --------------------------------------------------------------------------------------------------------


def write_clip(path: Path, seconds: float, height: int, width: int, seed: int) -> Path:
    """A generated clip with something of a film's detail: octaves of smooth noise that pan, a square, grain."""
    rng = np.random.default_rng(seed)
    ground_HWC = sum(_octave(rng, height, 2 * width, 2**power) / 2**power for power in range(2, 7))
    ground_HWC = (235 * (ground_HWC - ground_HWC.min()) / np.ptp(ground_HWC)).astype(np.int16)
    grain_THWC = rng.normal(0, 3, (8, height, width, 1)).astype(np.int16)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(round(seconds * RATE)):
            shift = index * 2 % width
            frame_HWC = ground_HWC[:, shift : shift + width] + grain_THWC[index % 8]
            top = (index * 5) % (height // 2)
            frame_HWC[top : top + height // 4, top : top + height // 4] = (200, 60, 60)
            picture = av.VideoFrame.from_ndarray(np.clip(frame_HWC, 0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def _octave(rng: np.random.Generator, height: int, width: int, cells: int) -> Any:
    small = rng.uniform(0, 255, (cells, 2 * cells, 3)).astype(np.uint8)
    picture = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture, dtype=np.float32)


# --- the storages ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Storage:
    """A way to keep frames: bytes of them, and back."""

    pack: Callable[[Frames], bytes]
    unpack: Callable[[bytes, tuple[int, ...]], Frames]


def _pictures(kind: str, **settings: Any) -> Storage:
    def pack(frames_THWC: Frames) -> bytes:
        parts = []
        for frame_HWC in frames_THWC:
            buffer = io.BytesIO()
            Image.fromarray(frame_HWC).save(buffer, kind, **settings)
            parts.append(len(buffer.getvalue()).to_bytes(8, "little") + buffer.getvalue())
        return b"".join(parts)

    def unpack(data: bytes, shape: tuple[int, ...]) -> Frames:
        frames_THWC, place = np.empty(shape, np.uint8), 0
        for frame_HWC in frames_THWC:
            size = int.from_bytes(data[place : place + 8], "little")
            frame_HWC[:] = np.asarray(Image.open(io.BytesIO(data[place + 8 : place + 8 + size])))
            place += 8 + size
        return frames_THWC

    return Storage(pack, unpack)


def _pack_ffv1(frames_THWC: Frames) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=1, options={"level": "3", "slices": "4"})
        stream.height, stream.width, stream.pix_fmt = *frames_THWC.shape[1:3], "bgr0"
        for frame_HWC in frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def _unpack_ffv1(data: bytes, shape: tuple[int, ...]) -> Frames:
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def _from_bytes(data: bytes, shape: tuple[int, ...]) -> Frames:
    return np.frombuffer(data, np.uint8).reshape(shape)


STORAGES = {
    "raw": Storage(lambda frames_THWC: frames_THWC.tobytes(), _from_bytes),
    "deflate": Storage(lambda x: zlib.compress(x, 1), lambda data, shape: _from_bytes(zlib.decompress(data), shape)),
    "png": _pictures("png", compress_level=1),
    "webp": _pictures("webp", lossless=True, method=0, quality=0),
    "ffv1": Storage(_pack_ffv1, _unpack_ffv1),
}


# --- what is measured ------------------------------------------------------------------------------------------------


def measure(seconds: float, folder: Path, processor: Any, args: argparse.Namespace) -> dict[str, Any]:
    """One clip: decoding it, and every storage's writing and reading, interleaved."""
    sampling = FrameSampling(2.0, args.frames, min(4, args.frames))
    clip = write_clip(folder / f"{seconds:g}.mp4", seconds, args.height, args.width, args.seed)
    frames_THWC = read_video(clip, processor, sampling).frames_THWC
    shape = frames_THWC.shape
    times = {"decode": harness.Timed(lambda: read_video(clip, processor, sampling))}
    sizes = {}
    for name, storage in STORAGES.items():
        path = folder / f"{seconds:g}.{name}"
        path.write_bytes(storage.pack(frames_THWC))
        sizes[name] = path.stat().st_size
        if not np.array_equal(storage.unpack(path.read_bytes(), shape), frames_THWC):
            raise SystemExit(f"{name} lost something")
        times[f"{name}/write"] = harness.Timed(lambda s=storage, p=path: p.write_bytes(s.pack(frames_THWC)))
        times[f"{name}/read"] = harness.Timed(lambda s=storage, p=path: s.unpack(p.read_bytes(), shape))
    harness.time_interleaved(times, args.repeats, "cpu")
    results = {name: timed.as_json() for name, timed in times.items()}
    return {
        "seconds": seconds,
        "shape": list(shape),
        "clip_bytes": clip.stat().st_size,
        "bytes": sizes,
        "times": results,
        "ratios": {
            "bytes": {f"{name}:raw": size / sizes["raw"] for name, size in sizes.items()},
            "wall": _ratios({name: times["median"] for name, times in results.items()}),
            "processor": _ratios({name: times["processor_median"] for name, times in results.items()}),
        },
    }


def _ratios(median: dict[str, float]) -> dict[str, float]:
    read = {f"decode:{name} read": median["decode"] / median[f"{name}/read"] for name in STORAGES}
    return read | {f"{name} write:decode": median[f"{name}/write"] / median["decode"] for name in STORAGES}


def show(cell: dict[str, Any]) -> None:
    """Print one clip's table; seconds and ratios are the processor's."""
    median = {name: times["processor_median"] for name, times in cell["times"].items()}
    rows = [
        [
            name,
            harness.shown(size / 1e6, " MB"),
            harness.shown(cell["ratios"]["bytes"][f"{name}:raw"]),
            harness.shown(median[f"{name}/write"], " s"),
            harness.shown(median[f"{name}/read"], " s"),
            harness.shown(cell["ratios"]["processor"][f"decode:{name} read"], "x"),
        ]
        for name, size in cell["bytes"].items()
    ]
    T, H, W, _ = cell["shape"]
    decode = harness.shown(median["decode"], " s")
    title = f"{cell['seconds']:g} s of video, {T} frames of {W} x {H}, decoded in {decode} of the processor"
    harness.print_table(title, ["storage", "size", "of raw", "write", "read", "decode : read"], rows)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print tables, write the JSON and return it."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = harness.base_parser(__doc__ or "", "frame_cache")
    parser.add_argument("--seconds", type=float, nargs="+", default=[10.0, 60.0], help="lengths of the clips")
    parser.add_argument("--height", type=int, default=720)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--frames", type=int, default=16, help="frames sampled at most (default 16)")
    args = parser.parse_args(arguments)
    harness.prepare(args)
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    processor, cells = Qwen2VLVideoProcessor(), []
    with tempfile.TemporaryDirectory() as folder:
        for seconds in args.seconds:
            cells.append(measure(seconds, Path(folder), processor, args))
            show(cells[-1])
    result = {**harness.provenance(args, arguments), "cells": cells}
    harness.write_json(args.output, result)
    return result


if __name__ == "__main__":
    main()
