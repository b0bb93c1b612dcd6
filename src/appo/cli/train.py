"""`appo train`: its flags, and what it calls. All other flags are fields of its settings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

HELP = "train from a configuration"
EXAMPLE = (
    "example:\n  appo train --config recipes/spotlight.yaml --max_steps 10 --output_dir runs/short\n"
    "  appo train --config recipes/nextgqa-7b.yaml --tiny --output_dir runs/dry\n"
    "  appo train --config recipes/spotlight.yaml --resume_from_checkpoint true\n\n"
    "resume_from_checkpoint: true goes on with output_dir's run from its last complete checkpoint, exactly, and\n"
    "begins it if there is none; a path names a checkpoint. Ctrl-C and SIGTERM write one (docs/reliability.md).\n"
    "Every field of appo.APPOConfig (which has all of TRL's GRPOConfig) and of its TrainScript is a\n"
    "setting of the file and a flag; a flag wins over the file."
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that are no settings."""
    parser.add_argument("--config", help="YAML file of settings")
    parser.add_argument("--tiny", action="store_true", help="dry run: two steps of the tiny policy on generated clips")


def run(arguments: argparse.Namespace, settings: Sequence[str]) -> int:
    """Train; returns the exit code.

    Args:
        arguments: the flags above.
        settings: what else stands on the command line.

    Raises:
        ValueError, OSError: as :func:`appo.training.start_checks.check_start` and :func:`appo.training.run.train` do.
    """
    from rich.console import Console

    from appo.training.start_checks import check_start

    if arguments.config is None and not settings:
        raise ValueError("give a configuration: appo train --config recipes/spotlight.yaml")
    check_start(settings, arguments.config, tiny=arguments.tiny)
    from appo.training.arguments import parse
    from appo.training.run import train

    config = [] if arguments.config is None else ["--config", arguments.config]
    console = Console()
    folder = train(*parse([*config, *settings], tiny=arguments.tiny), console)
    console.print(f"run folder: {folder}", highlight=False)
    return 0
