"""`appo spotlight`: the page of runs, or of one video and question; the same for one group in the terminal."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from appo.models.names import checkpoint_of

if TYPE_CHECKING:
    from rich.console import Console

    from appo.reports.run_folder import LoadedRun

HELP = "a page that shows where the winners looked"
EXAMPLE = (
    "example:\n  appo spotlight runs/demo\n  appo spotlight runs/appo runs/dapo --output both.html\n"
    "  appo spotlight runs/demo --text\n"
    "  appo spotlight --model Qwen/Qwen2.5-VL-3B-Instruct --video kitchen.mp4 --question 'What is cut first?' \\\n"
    "      --options 'an onion' 'a carrot' --answer A\n\n"
    "One self-contained page, its data beside it as .json. What it shows: docs/spotlight.md."
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `appo spotlight`; defaults are those of :class:`appo.evaluation.inspection.InspectionSettings`."""
    flags = parser.add_argument
    flags("runs", nargs="*", type=Path, metavar="RUN", help="run folders, shown over each other")
    flags("--output", type=Path, help="page to write, .html (default: RUN/spotlight.html, else spotlight-TIME.html)")
    flags("--text", action="store_true", help="the most telling groups in the terminal instead of a page")
    flags("--model", help="inspect this Hugging Face folder or hub id instead of runs; spotlight: the tiny policy")
    flags("--video", help="video file to ask about (with --model)")
    flags("--question", help="what to ask (with --model)")
    flags("--answer", help="gold answer, which splits winners from losers: with --options the letter")
    flags("--options", nargs="+", help="choices; they are lettered A, B, ...")
    flags("--num-generations", type=int, help="responses to sample (default: 8)")
    flags("--video-fps", type=float, help="frames sampled a second (default: 2)")
    flags(
        "--video-max-frames",
        type=int,
        help="frames sampled at most (default: 16; tiny policy: 24)",
    )
    flags(
        "--max-completion-length",
        type=int,
        help="longest response (default: 1024; tiny policy: 128)",
    )
    flags("--instruction", help="closes the prompt (default: asks for the format; tiny policy: nothing)")
    flags("--seed", type=int, help="of the samples (default: 0)")
    flags("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU, else float32")
    flags("--trust-remote-code", action="store_true", help="run code that a checkpoint brings")


def run(arguments: argparse.Namespace) -> int:
    """Write the page or print the groups; returns the exit code. Raises what `spotlight` does."""
    from rich.console import Console

    console = Console()
    if page := spotlight(arguments, console):
        console.print(f"page: {page}", highlight=False, markup=False, soft_wrap=True)
    return 0


def spotlight(arguments: argparse.Namespace, console: Console) -> Path | None:
    """Do what the flags say; returns the page written, None with ``--text``.

    Raises:
        ValueError, OSError: flags that do not go together, or what they name cannot be used; one line each.
    """
    given = _check(arguments)
    runs = [_inspected(given)] if arguments.model else _loaded(arguments.runs)
    if arguments.text:
        from appo.reports.console import print_runs

        print_runs(console, runs)
        return None
    from appo.reports.page import write_page

    for run in runs:
        for note in run.notes:
            console.print(f"{run.name}: {note}", highlight=False, markup=False, soft_wrap=True)
    return write_page(arguments.output or _default(arguments.runs), runs)


def _check(arguments: argparse.Namespace) -> dict[str, object]:
    """The flags given about a model; raises for those that do not go together."""
    names = set(vars(arguments)) - {"command", "runs", "output", "text"}
    values = {name: getattr(arguments, name) for name in names}
    given = {name: value for name, value in values.items() if value is not None and value is not False}
    if bool(arguments.runs) == bool(given):
        raise ValueError("give run folders, or --model, --video and --question: appo spotlight runs/demo")
    if given and (missing := [name for name in ("model", "video", "question") if not given.get(name)]):
        raise ValueError(f"--model, --video and --question go together: give --{missing[0]} as well")
    if "answer" in given and not given["answer"]:
        raise ValueError("--answer is empty: leave it out if it is not known")
    for name in ("num_generations", "video_max_frames", "max_completion_length"):
        if isinstance(value := given.get(name, 1), int) and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
    if arguments.output and arguments.output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--output {arguments.output}: name a page that ends in .html; its data go beside it as .json")
    if given:
        checkpoint_of(arguments.model)  # a path that leads nowhere is said before libraries are loaded
    return given


def _inspected(given: dict[str, object]) -> LoadedRun:
    from appo.evaluation.inspection import InspectionSettings, inspect_video

    if "options" in given:
        given["options"] = tuple(given["options"])  # type: ignore[arg-type]
    names = [field.name for field in fields(InspectionSettings) if field.name in given]
    return inspect_video(InspectionSettings(**{name: given[name] for name in names}))  # type: ignore[arg-type]


def _loaded(paths: Sequence[Path]) -> list[LoadedRun]:
    from appo.reports.run_folder import MOST_GROUPS, load_run

    return [load_run(path, max(1, MOST_GROUPS // len(paths))) for path in paths]


def _default(runs: Sequence[Path]) -> Path:
    from appo.reports.run_folder import PAGE

    return runs[0] / PAGE if len(runs) == 1 else Path(f"spotlight-{datetime.now(UTC):%Y%m%d-%H%M%S}.html")
