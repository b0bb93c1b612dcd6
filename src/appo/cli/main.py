"""The `appo` command: parse, call, print. Exit code 0 on success, 2 with one line on standard error otherwise.

Each command is a module with ``HELP``, ``EXAMPLE``, ``add_flags`` and ``run``.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from appo.cli import compare, data, demo, eval, plan, replay, spotlight, study, train
from appo.training.setting_rules import meant

COMMANDS: dict[str, ModuleType] = {
    "demo": demo, "train": train, "eval": eval, "spotlight": spotlight,
    "compare": compare, "study": study, "plan": plan, "replay": replay,
}  # fmt: skip
EXAMPLE = "example:\n  appo demo\n  appo train --config recipes/spotlight.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    _calm_libraries()
    parser = command_parser()
    arguments, rest = parser.parse_known_args(argv)
    try:
        if arguments.command == "train":  # whose flags are the fields of its settings
            return train.run(arguments, rest)
        if rest:
            command = "data check" if arguments.command == "data" else arguments.command
            raise ValueError(_unknown(parser, command, rest[0]))
        chosen = data if arguments.command == "data" else COMMANDS[arguments.command]
        return int(chosen.run(arguments))
    except KeyboardInterrupt as stop:
        print(f"appo: {str(stop) or 'interrupted'}", file=sys.stderr)
        return getattr(stop, "exit_code", 130)
    except Exception as error:
        if not _is_users(error):
            raise
        print(f"appo: {_one_line(error)}", file=sys.stderr)
        return 2


def command_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        "appo",
        description="Train video language models to see better.",
        allow_abbrev=False,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        _add(commands, name, module)
    about: dict[str, Any] = {"epilog": data.EXAMPLE, "formatter_class": argparse.RawDescriptionHelpFormatter}
    tasks = commands.add_parser("data", help="check a dataset", allow_abbrev=False, **about)
    _add(tasks.add_subparsers(dest="task", required=True, metavar="TASK"), "check", data)
    return parser


def _add(commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, module: ModuleType) -> None:
    parser = commands.add_parser(
        name,
        help=module.HELP,
        epilog=module.EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_flags(parser)


# Flags of earlier versions -> what they are called now, as in `appo train`.
RENAMED = {
    "--fps": "--video-fps", "--max-frames": "--video-max-frames", "--min-frames": "--video-min-frames",
    "--frames": "--video-max-frames", "--pixels-per-frame": "--video-max-pixels", "--sample": "--num-generations",
    "--group": "--num-generations", "--generations": "--num-generations", "--max-new-tokens": "--max-completion-length",
    "--completion": "--max-completion-length",
}  # fmt: skip


def _unknown(parser: argparse.ArgumentParser, command: str, word: str) -> str:
    """What to say about an argument that a command does not have; a flag written short is named in full."""
    for name in command.split():
        choices = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        parser = next(choices)[name]
    flag = word.partition("=")[0]
    if RENAMED.get(flag) in parser._option_string_actions:
        return f"{flag} is called {RENAMED[flag]} now"
    near = meant(flag, parser._option_string_actions) if word.startswith("--") else ""
    hint = f"did you mean {near}? " if near else ""
    return f"unknown argument {word}; {hint}`appo {command} --help` lists what there is"


def _calm_libraries() -> None:
    """Settings that must be in the environment before torch and transformers are loaded."""
    # Two OpenMP threads that spin while waiting run many times slower on cores that others use too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)


def _is_users(error: Exception) -> bool:
    """Whether an error is about the user's input: settings, files, videos, the machine; all else is a bug."""
    # By name, for importing the libraries that define them takes seconds.
    names = {base.__name__ for base in type(error).__mro__}
    return isinstance(error, (ValueError, OSError)) or bool(names & {"BlindPolicyError", "YAMLError"})


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
