"""`appo replay`: its flags, and what it calls."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "run the step again at which a run stopped because a number was not finite"
EXAMPLE = (
    "example:\n  appo replay runs/qwen\n\n"
    "A run stops before it applies a loss or gradient that is not finite, and keeps weights and batch of that\n"
    "step (docs/reliability.md). This says where in it the first such number is."
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `appo replay`."""
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--process", type=int, default=0, help="whose batch, of several processes (default: 0)")


def run(arguments: argparse.Namespace) -> int:
    """Replay and print what was found; returns the exit code."""
    from appo.training.nan_debugging import replay

    for line in replay(arguments.run, arguments.process).lines():
        print(line)
    return 0
