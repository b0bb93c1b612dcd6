"""What commands share: numbers that are checked, and the flags of what is asked about videos and how it is read."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _at_least(1, text)


def count(text: str) -> int:
    """A whole number of at least 0."""
    return _at_least(0, text)


def amount(text: str) -> float:
    """A finite number above 0."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return number


def _at_least(least: int, text: str) -> int:
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, got {number}")
    return number


def add_question_flags(parser: argparse.ArgumentParser) -> None:
    """Which questions are asked, how frames are sampled, and the precision of the weights."""
    flags = parser.add_argument
    flags("--dataset", help="a name of appo.data.DATASETS (default: spotlight; its clips are made if need be)")
    flags("--annotations", help="annotation file or folder (docs/data.md)")
    flags("--videos", help="folder that video paths start from (default: where the annotations lie)")
    flags("--split", help="part of the dataset (docs/data.md)")
    flags("--video-fps", type=float, help="frames sampled a second (default: 2)")
    flags(
        "--video-max-frames",
        type=positive,
        help="frames of a video at most (default: 16; spotlight: 24)",
    )
    flags("--frame-cache", help="folder in which sampled frames are kept for other runs")
    flags("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU, else float32")
