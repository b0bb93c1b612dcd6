"""`appo eval`: its flags, and what it calls."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from pathlib import Path

from appo.cli.argument_types import add_question_flags, positive
from appo.models.names import checkpoint_of

HELP = "score a model on a dataset, or compare two evaluations"
EXAMPLE = (
    "example:\n  appo eval --model spotlight --output runs/eval\n"
    "  appo eval --model Qwen/Qwen2.5-VL-7B-Instruct --dataset vsi-bench --annotations VSI --output runs/vsi\n"
    "  appo eval --compare runs/vsi runs/vsi-appo\n\n"
    "The same command goes on with what an interrupted one left, and scores a finished one again."
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `appo eval`; those left out are left to :class:`appo.evaluation.run.EvalSettings`."""
    flags = parser.add_argument
    flags("--model", help="Hugging Face folder or hub id (adapters are merged), or spotlight: the tiny policy")
    add_question_flags(parser)
    flags("--output", type=Path, help="folder, new or of this evaluation (default: runs/eval-TIME)")
    flags("--limit", type=positive, help="so many questions, evenly spaced over the dataset")
    flags(
        "--num-generations",
        type=positive,
        metavar="K",
        help="K sampled responses to each question (default: one, greedy)",
    )
    flags("--temperature", type=float, help="of the samples (default: 1)")
    flags("--batch-size", type=positive, help="questions answered at once (default: 16)")
    flags(
        "--max-completion-length",
        type=positive,
        help="longest response (default: 1024; tiny policy: 128)",
    )
    flags("--instruction", help="closes every prompt (default: asks for the format; tiny policy: nothing)")
    flags("--seed", type=int, help="of the samples (default: 0)")
    flags("--trust-remote-code", action="store_true", help="run code that a checkpoint brings")
    flags("--retry", action="store_true", help="ask again what could not be asked for its video or image")
    flags("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two evaluations of the same questions")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate or compare; returns the exit code. Raises what :func:`appo.evaluation.run.evaluate` does."""
    from rich.console import Console

    given = {name: value for name, value in vars(arguments).items() if value is not None and value is not False}
    del given["command"]
    if arguments.compare:
        from appo.evaluation.tables import compare

        if others := [name for name in given if name != "compare"]:
            raise ValueError(f"--compare takes two folders and nothing else: leave out --{others[0].replace('_', '-')}")
        compare(*arguments.compare).print(Console())
        return 0
    if not arguments.model:
        raise ValueError("give a model: appo eval --model spotlight")
    checkpoint_of(arguments.model)  # a path that leads nowhere is said before libraries are loaded
    from appo.evaluation.run import EvalSettings, evaluate

    given.setdefault("output", Path("runs") / f"eval-{datetime.now(UTC):%Y%m%d-%H%M%S}")
    console = Console()
    folder = evaluate(EvalSettings(**given), console)
    console.print(f"evaluation: {folder}", highlight=False)
    return 0
