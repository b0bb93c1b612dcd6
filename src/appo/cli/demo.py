"""`appo demo`: its flags, and what it calls."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path

from appo.cli.argument_types import positive

HELP = "train the embedded tiny policy on generated clips"
EXAMPLE = "example:\n  appo demo --method dapo --steps 40 --seed 3 --output runs/dapo-3"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `appo demo`; defaults are those of docs/results.md."""
    flags = parser.add_argument
    flags("--method", choices=("appo", "dapo", "grpo"), default="appo", help="default: appo")
    flags("--steps", type=positive, default=30, help="optimiser steps (default: 30)")
    flags("--seed", type=int, default=0, help="of clips, sampling and training (default: 0)")
    flags("--questions", type=positive, default=200, help="held-out questions a level (default: 200)")
    flags("--output", type=Path, help="run folder, new or empty (default: runs/demo-TIME)")


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; returns the exit code. Raises what :func:`appo.experiments.demo.run_demo` does."""
    from rich.console import Console

    from appo.experiments.demo import DemoSettings, run_demo

    output = arguments.output or Path("runs") / f"demo-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    settings = DemoSettings(output, arguments.method, arguments.steps, arguments.seed, arguments.questions)
    run_demo(settings, Console())
    return 0
