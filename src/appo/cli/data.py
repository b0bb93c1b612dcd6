"""`appo data check`: its flags, and what it calls."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from appo.cli.argument_types import count, positive
from appo.models.names import checkpoint_of

if TYPE_CHECKING:
    from appo.video.frame_cache import FrameCaching

HELP = "find everything that is wrong with annotations, videos and images"
EXAMPLE = (
    "example:\n  appo data check nextqa --annotations NExT-QA --videos NExTVideo --split val --report faults.json\n"
    "  appo data check jsonl --annotations mine.jsonl --quick --allow 10\n\n"
    "Exit code 0 with at most N faults (--allow), 2 with more. What is checked: docs/data.md."
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `appo data check`."""
    flags = parser.add_argument
    flags("dataset", help="a name of appo.data.DATASETS; jsonl: your own questions")
    flags("--annotations", required=True, help="annotation file or folder (docs/data.md)")
    flags("--videos", help="folder that video paths start from (default: where the annotations lie)")
    flags("--split", help="part of the dataset (docs/data.md)")
    flags("--quick", action="store_true", help="decode one frame of each video instead of all")
    flags("--workers", type=positive, default=os.cpu_count() or 1, help="processes that decode (default: all cores)")
    flags("--report", type=Path, help="JSON file of all faults, to write")
    flags("--frame-cache", metavar="FOLDER", help="put the sampled frames of all good videos into this cache")
    flags("--model", help="whose processor samples them (with --frame-cache)")
    flags("--video-fps", type=float, default=2.0, help="frames sampled a second, as in training (default: 2)")
    flags(
        "--video-max-frames",
        type=positive,
        default=16,
        help="frames of a video at most (default: 16)",
    )
    flags("--video-min-frames", type=positive, default=4, help="and at least (default: 4)")
    flags("--allow", type=count, default=0, metavar="N", help="faults that are no failure (default: 0)")


def run(arguments: argparse.Namespace) -> int:
    """Check; returns the exit code: 2 where there are more faults than allowed."""
    from rich.console import Console

    from appo.cli.data_check import run_check

    where = (arguments.dataset, arguments.annotations, arguments.videos, arguments.split)
    how = {name: getattr(arguments, name) for name in ("quick", "workers", "report")}
    faults = run_check(Console(), *where, frame_caching=_frame_caching(arguments), **how)
    if faults <= arguments.allow:
        return 0
    print(f"appo: {faults} faults in {arguments.annotations}, {arguments.allow} are allowed (--allow)", file=sys.stderr)
    return 2


def _frame_caching(arguments: argparse.Namespace) -> FrameCaching | None:
    if bool(arguments.frame_cache) != bool(arguments.model):
        raise ValueError("--frame-cache and --model go together: the model's processor chooses what is cached")
    if not arguments.frame_cache:
        return None
    checkpoint = checkpoint_of(arguments.model)
    from appo.video.frame_cache import FrameCaching
    from appo.video.reader import FrameSampling

    sampling = FrameSampling(arguments.video_fps, arguments.video_max_frames, arguments.video_min_frames)
    return FrameCaching(arguments.frame_cache, checkpoint, sampling)
