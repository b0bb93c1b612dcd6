"""The shipped policy after a few more lessons from a teacher who talks otherwise: worlds for other experiments.

    python -m recipes.tiny_policy.retelling --output runs/blunt --blunt --asides 3

What it sees, and how lazily it looks, stays as it is; only the style of its reasoning changes.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from recipes.tiny_policy.lessons import Stage
from recipes.tiny_policy.warmstart import Recipe, lessons_of, measure_levels, save, train_stage, versions

from appo.world.policy import load_policy
from appo.world.teacher import Style

STEPS = 250


def retell(style: Style, output: Path, recipe: Recipe, steps: int = STEPS) -> dict[str, Any]:
    """Train, measure and save; the record is returned and saved as `recipes.tiny_policy.warmstart.RECORD`.

    Args:
        style: of the new teacher, as lazy as the old one.
        output: folder for weights, processor and record.
        recipe: clips, questions and seed.
        steps: optimiser steps.
    """
    start = time.perf_counter()
    torch.manual_seed(recipe.seed)
    model, processor = load_policy()
    lessons = lessons_of(model, processor, recipe, style)
    optimizer = torch.optim.AdamW(model.model.language_model.parameters(), lr=5e-4, weight_decay=0.01)
    stage = Stage("retelling", (8, 8, 12), 4, steps, lazy=0.5, rate=5e-4, final_rate=3e-5, goal=2.0)
    model.train()
    log = train_stage(model, lessons, stage, optimizer)
    seconds = round(time.perf_counter() - start)
    record = {"manner": asdict(style), "steps": steps, "seconds": seconds, "versions": versions(), "log": log}
    record["measured"] = measure_levels(model, processor, recipe)
    save(model, record, output)
    return record


def main(arguments: list[str] | None = None) -> None:
    """Command line: train into a folder and say what came out."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.tiny_policy.retelling",
        description="Teach the shipped policy another style of answering. Example: --output runs/blunt --blunt",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for weights, processor and record")
    parser.add_argument("--blunt", action="store_true", help="do not say what is looked at before reporting it")
    parser.add_argument("--asides", type=int, default=0, help="sentences about nothing before the report (default: 0)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    record = retell(Style(not options.blunt, options.asides), options.output, Recipe())
    print(f"saved in {options.output} after {record['seconds']} s")


if __name__ == "__main__":
    main()
