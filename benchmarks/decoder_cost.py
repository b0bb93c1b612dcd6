"""What it costs to decode videos in a process of its own (appo.video.decode_worker), against the trainer's.

    python benchmarks/decoder_cost.py                    # minutes on a CPU core
    python benchmarks/decoder_cost.py --seconds 2 --sizes 320x180 --repeats 1

Clips are those of frame_cache.py; 16 frames are sampled as Qwen2.5-VL samples them. Both ways give the same bytes, or
the run stops. The processor's seconds are those of both processes; on a shared machine they are the steadier clock.
Beginning the process, which happens once a run, is measured apart.
"""

from __future__ import annotations

import harness  # first: it sets OpenMP's waiting before torch loads

# isort: split
import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import frame_cache
import numpy as np

from appo.types import VideoSource
from appo.video.decode_worker import Decoder
from appo.video.reader import FrameSampling, read_video

LIMIT = 600.0


class TimedInBoth(harness.Timed):
    """Counts the processor's seconds of the other process, too."""

    def measure(self, device: str) -> None:
        """Call once more."""
        before = decoder_seconds()
        super().measure(device)
        self.processor_seconds[-1] += decoder_seconds() - before


def decoder_seconds() -> float:
    """Seconds that the other process has had of the processor."""
    user, system, *_ = Decoder(LIMIT)(resource.getrusage, resource.RUSAGE_SELF)  # type: ignore[arg-type]
    return float(user + system)


def begin(source: VideoSource) -> float:
    """Seconds until the process has begun and said something."""
    start = time.perf_counter()
    Decoder(LIMIT)(str, source)
    return time.perf_counter() - start


def measure(seconds: float, width: int, height: int, folder: Path, processor: Any, args: argparse.Namespace) -> Any:
    """One clip, both ways in turn."""
    path = frame_cache.write_clip(folder / f"{seconds:g}-{width}.mp4", seconds, height, width, args.seed)
    source, sampling, decoder = VideoSource(str(path)), FrameSampling(2, args.frames, 4), Decoder(LIMIT)
    start = begin(source)
    here = read_video(source, processor, sampling)
    if not np.array_equal(here.frames_THWC, read_video(source, processor, sampling, decoder).frames_THWC):
        raise SystemExit("the two ways give other frames")
    times = {
        "here": TimedInBoth(lambda: read_video(source, processor, sampling)),
        "process": TimedInBoth(lambda: read_video(source, processor, sampling, decoder)),
    }
    harness.time_interleaved(times, args.repeats, "cpu")
    results = {name: timed.as_json() for name, timed in times.items()}
    return {
        "seconds": seconds,
        "shape": list(here.frames_THWC.shape),
        "begin": start,
        "times": results,
        "ratios": {
            "wall": {"process:here": results["process"]["median"] / results["here"]["median"]},
            "processor": {"process:here": results["process"]["processor_median"] / results["here"]["processor_median"]},
        },
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print a table, write the JSON and return it."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = harness.base_parser(__doc__ or "", "decoder_cost")
    parser.add_argument("--seconds", type=float, nargs="+", default=[10.0], help="lengths of the clips")
    parser.add_argument("--sizes", nargs="+", default=["320x240", "1280x720"], help="WIDTHxHEIGHT of the clips")
    parser.add_argument("--frames", type=int, default=16, help="frames sampled at most (default 16)")
    args = parser.parse_args(arguments)
    harness.prepare(args)
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    processor, cells = Qwen2VLVideoProcessor(), []
    with tempfile.TemporaryDirectory() as folder:
        for size in args.sizes:
            width, height = map(int, size.split("x"))
            cells += [measure(seconds, width, height, Path(folder), processor, args) for seconds in args.seconds]
    rows = [
        [
            f"{cell['seconds']:g} s, {cell['shape'][0]} frames of {cell['shape'][2]} x {cell['shape'][1]}",
            *(harness.shown(cell["times"][name]["processor_median"], " s") for name in ("here", "process")),
            *(harness.shown(cell["ratios"][clock]["process:here"], "x") for clock in ("processor", "wall")),
        ]
        for cell in cells
    ]
    harness.print_table(
        f"begun in {cells[0]['begin']:.1f} s", ["clip", "here", "in a process", "process : here", "wall"], rows
    )
    result = {**harness.provenance(args, arguments), "cells": cells}
    harness.write_json(args.output, result)
    return result


if __name__ == "__main__":
    main()
