"""The flags of `appo compare`, and what it calls."""

from __future__ import annotations

import argparse
from pathlib import Path

from appo.cli.argument_types import positive

HELP = "train several methods with several seeds and put them side by side"
EXAMPLE = (
    "example:\n  appo compare --methods grpo,dapo,appo --seeds 8 --output runs/compare --workers 2\n\n"
    "Each method with each seed is trained on the embedded world and evaluated: one cell, one process. The\n"
    "same command goes on with what an interrupted one left. Methods and what is measured: docs/results.md."
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What can be said on the command line; defaults are those of the reported comparison."""
    flags = parser.add_argument
    flags("--methods", default="grpo,dapo,appo", help="names, comma between; NAME+setting=value changes a setting "
          "(default: grpo,dapo,appo)")  # fmt: skip
    flags("--seeds", type=positive, default=8, help="how many; the first is 0 (default: 8)")
    flags("--steps", type=positive, default=30, help="optimiser steps of each (default: 30)")
    flags("--questions", type=positive, default=1000, help="held-out questions a level (default: 1000)")
    flags("--level", default="L1", help="of the training clips: L1, L2 or L3 (default: L1)")
    flags("--policy", type=Path, help="folder of the policy that all start from (default: the shipped one)")
    flags("--output", type=Path, required=True, help="folder, new or of this comparison")
    flags("--workers", type=positive, default=1, help="cells at the same time (default: 1)")
    flags("--only", metavar="SEED-METHOD", help="run this cell here and nothing else")


def run(arguments: argparse.Namespace) -> int:
    """Do what the flags say; returns the exit code.

    Raises:
        ValueError: as :func:`appo.experiments.compare.compare.compare` does.
    """
    from rich.console import Console

    from appo.experiments.compare.compare import Comparison, compare, run_one

    names = ("output", "seeds", "steps", "questions", "workers", "level", "policy")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    comparison = Comparison(methods=tuple(arguments.methods.split(",")), **given)
    if arguments.only:
        run_one(comparison, arguments.only)
    else:
        compare(comparison, Console())
    return 0
