"""The flags of `appo study`, and what it calls."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from appo.cli.argument_types import add_question_flags, amount, count, positive

HELP = "perceivers describe, reasoners answer from the description: which of the two moves the score"
LIMITS = ("requests_per_minute", "at_once", "retries", "timeout")
EXAMPLE = (
    "example:\n"
    "  appo study --perceiver truth@0.4 --perceiver truth --reasoner weak=rules:colour,shape --reasoner rules \\\n"
    "      --output runs/study\n"
    "  appo study --dataset nextqa --annotations NExT-QA --videos NExTVideo --limit 2000 --output runs/grid \\\n"
    "      --perceiver 3b=Qwen/Qwen2.5-VL-3B-Instruct --perceiver 7b=Qwen/Qwen2.5-VL-7B-Instruct \\\n"
    "      --reasoner 8b=Qwen/Qwen3-8B --reasoner o3=openai:o3 --price o3=2,8 --budget 20\n"
    "  ... --reasoner mine=openai:my-model@http://localhost:8000/v1\n\n"
    "Perceivers describe each video, reasoners answer from the description alone; name both from weak to strong.\n"
    "The same command goes on with what an interrupted one left. What is asked and measured: docs/study.md."
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What can be said on the command line; what is left out is left to `StudySettings`."""
    flags, more = parser.add_argument, _repeated()
    flags(
        "--perceiver",
        metavar="NAME=SOURCE",
        help="checkpoint, spotlight, truth or nothing; @0.2 behind it: noise",
        **more,
    )
    flags("--reasoner", metavar="NAME=SOURCE", help="text model, rules[:TASK,...] or openai:MODEL[@URL]", **more)
    flags("--output", type=Path, required=True, help="folder, new or of this study")
    add_question_flags(parser)
    flags("--limit", type=positive, help="so many questions, evenly spaced over the dataset (made clips: 500)")
    flags("--level", help="of made clips: L1, L2 or L3 (default: L1)")
    flags("--batch-size", type=positive, help="questions a model is asked at once (default: 16)")
    flags("--max-description", type=positive, help="tokens of a description at most (default: 512)")
    flags("--max-answer", type=positive, help="tokens of an answer at most, thoughts included (default: 1024)")
    _add_endpoint_flags(parser)


def _add_endpoint_flags(parser: argparse.ArgumentParser) -> None:
    flags, more = parser.add_argument, _repeated()
    help = "environment variable that holds a reasoner's key (default: OPENAI_API_KEY for all)"
    flags("--key", metavar="NAME=VARIABLE", help=help, **more)
    flags("--price", metavar="NAME=READ,WRITTEN", help="dollars a million tokens read and written", **more)
    flags("--budget", type=amount, metavar="DOLLARS", help="that all answers in the folder may cost together")
    flags("--requests-per-minute", type=amount, help="of one endpoint, retries included (default: no limit)")
    flags("--at-once", type=positive, default=8, help="requests on their way at the same time (default: 8)")
    flags("--retries", type=count, default=5, help="of a request that may pass yet: 429, 5xx, timeout (default: 5)")
    flags("--timeout", type=amount, default=120.0, help="seconds until a request is tried again (default: 120)")


def _repeated() -> dict[str, Any]:
    return {"action": "append", "default": []}


def run(arguments: argparse.Namespace) -> int:
    """Do what the flags say; returns the exit code, 2 where anything is missing.

    Raises:
        ValueError: as :func:`appo.experiments.study.study.study` does.
    """
    from rich.console import Console

    from appo.experiments.study.settings import Calling, StudySettings, perceiver_of, reasoner_of
    from appo.experiments.study.study import study

    perceivers = tuple(perceiver_of(text) for text in arguments.perceiver)
    reasoners = tuple(reasoner_of(text) for text in arguments.reasoner)
    names = [reasoner.name for reasoner in reasoners if reasoner.url is not None]
    keys, prices = _named(arguments.key, "--key", names), _named(arguments.price, "--price", names)
    limits: dict[str, Any] = {name: getattr(arguments, name) for name in LIMITS}
    calling = {}
    for name in names:
        key: dict[str, Any] = {"key_variable": keys[name]} if name in keys else {}
        calling[name] = Calling(**limits, **key, prices=_prices(name, prices[name]) if name in prices else None)
    taken = {"command", "perceiver", "reasoner", "key", "price", *limits}
    given: dict[str, Any] = {n: v for n, v in vars(arguments).items() if n not in taken and v is not None}
    settings = StudySettings(perceivers=perceivers, reasoners=reasoners, calling=calling, **given)
    return 0 if study(settings, Console()) else 2


def _named(texts: Sequence[str], flag: str, names: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE of reasoners behind endpoints."""
    pairs = dict(text.partition("=")[::2] for text in texts)
    for name, value in pairs.items():
        if name not in names or not value:
            there = f"there are {', '.join(names)}" if names else "there is none"
            raise ValueError(f"{flag} {name}: write NAME=..., of a reasoner behind an endpoint; {there}")
    return pairs


def _prices(name: str, text: str) -> tuple[float, float]:
    try:
        read, written = (float(part) for part in text.split(","))
        if not (0 <= read < float("inf") and 0 <= written < float("inf")):
            raise ValueError
    except ValueError:
        raise ValueError(f"--price {name}={text}: write dollars a million tokens, read and written, as 2,8") from None
    return read, written
