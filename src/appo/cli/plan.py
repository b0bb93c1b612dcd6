"""`appo plan`: its flags are the planner's own; see :mod:`appo.experiments.plan.planning`."""

from __future__ import annotations

import argparse

from appo.experiments.plan.planning import add_flags, plan_of, render

__all__ = ["EXAMPLE", "HELP", "add_flags", "run"]

HELP = "memory a run needs on each GPU, before it is run"
EXAMPLE = (
    "example:\n  appo plan --model qwen2.5-vl-7b --gpus 8 --sharding zero3\n"
    "  appo plan --model qwen2.5-vl-3b --gpus 1 --gpu-memory 24 --dtype bf16 --lora-r 64\n"
    "  appo plan --config recipes/spotlight.yaml --gpus 1\n\n"
    "GB are 1e9 bytes. What is checked against measured peaks, and what is arithmetic: docs/scaling.md."
)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; returns the exit code. Raises what :func:`appo.experiments.plan.planning.plan_of` does."""
    print(render(plan_of(arguments)))
    return 0
