"""The `appo` command: parse, call, print. Exit code 0 on success, 2 with one line on standard error otherwise."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from appo.cli import spotlight as spotlighting
from appo.cli.argument_types import count, positive
from appo.cli.compare import add_compare_flags, run_compare
from appo.cli.setting_names import meant
from appo.cli.study import STUDY_EXAMPLE, add_study_flags, run_study
from appo.experiments.plan.planning import add_flags, plan_of, shown
from appo.models.names import checkpoint_of

if TYPE_CHECKING:
    from appo.video.caching import Keeping

EXAMPLES = {
    "appo": "example:\n  appo demo\n  appo train --config recipes/spotlight.yaml",
    "demo": "example:\n  appo demo --method dapo --steps 40 --seed 3 --output runs/dapo-3",
    "data": "example:\n  appo data check nextqa --annotations NExT-QA --videos NExTVideo --split val",
    "check": (
        "example:\n  appo data check nextqa --annotations NExT-QA --videos NExTVideo --split val --report faults.json\n"
        "  appo data check jsonl --annotations mine.jsonl --quick --allow 10\n\n"
        "Exit code 0 with at most N faults (--allow), 2 with more. What is checked: docs/data.md."
    ),
    "eval": (
        "example:\n  appo eval --model spotlight --output runs/eval\n"
        "  appo eval --model Qwen/Qwen2.5-VL-7B-Instruct --dataset vsi-bench --annotations VSI --output runs/vsi\n"
        "  appo eval --compare runs/vsi runs/vsi-appo\n\n"
        "The same command goes on with what an interrupted one left, and scores a finished one again."
    ),
    "compare": (
        "example:\n  appo compare --methods grpo,dapo,appo --seeds 8 --output runs/compare --workers 2\n\n"
        "Each method with each seed is trained on the embedded world and evaluated: one cell, one process. The\n"
        "same command goes on with what an interrupted one left. Methods and what is measured: docs/results.md."
    ),
    "study": STUDY_EXAMPLE,
    "plan": (
        "example:\n  appo plan --model qwen2.5-vl-7b --gpus 8 --sharding zero3\n"
        "  appo plan --model qwen2.5-vl-3b --gpus 1 --gpu-memory 24 --dtype bf16 --lora-r 64\n"
        "  appo plan --config recipes/spotlight.yaml --gpus 1\n\n"
        "GB are 1e9 bytes. What is checked against measured peaks, and what is arithmetic: docs/scaling.md."
    ),
    "spotlight": (
        "example:\n  appo spotlight runs/demo\n  appo spotlight runs/appo runs/dapo --output both.html\n"
        "  appo spotlight runs/demo --text\n"
        "  appo spotlight --model Qwen/Qwen2.5-VL-3B-Instruct --video kitchen.mp4 --question 'What is cut first?' \\\n"
        "      --options 'an onion' 'a carrot' --answer A\n\n"
        "One self-contained page, its data beside it as .json. What it shows: docs/spotlight.md."
    ),
    "replay": (
        "example:\n  appo replay runs/qwen\n\n"
        "A run stops before it applies a loss or gradient that is not finite, and keeps weights and batch of that\n"
        "step (docs/reliability.md). This says where in it the first such number is."
    ),
    "train": (
        "example:\n  appo train --config recipes/spotlight.yaml --max_steps 10 --output_dir runs/short\n"
        "  appo train --config recipes/nextgqa-7b.yaml --tiny --output_dir runs/dry\n"
        "  appo train --config recipes/spotlight.yaml --resume_from_checkpoint true\n\n"
        "resume_from_checkpoint: true goes on with output_dir's run from its last complete checkpoint, exactly, and\n"
        "begins it if there is none; a path names a checkpoint. Ctrl-C and SIGTERM write one (docs/reliability.md).\n"
        "Every field of appo.APPOConfig (which has all of TRL's GRPOConfig) and of its TrainScript is a\n"
        "setting of the file and a flag; a flag wins over the file."
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    _calm_libraries()
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    try:
        if arguments.command == "train":  # whose flags are the fields of its settings
            return _train(arguments, rest)
        if rest:
            command = "data check" if arguments.command == "data" else arguments.command
            raise ValueError(_unknown(parser, command, rest[0]))
        commands = {
            "demo": _demo, "eval": _eval, "data": _check, "plan": _plan, "compare": run_compare,
            "spotlight": _spotlight, "replay": _replay, "study": run_study,
        }  # fmt: skip
        return commands[arguments.command](arguments)
    except KeyboardInterrupt as stop:
        print(f"appo: {str(stop) or 'interrupted'}", file=sys.stderr)
        return getattr(stop, "exit_code", 130)
    except Exception as error:
        if not _is_users(error):
            raise
        print(f"appo: {_one_line(error)}", file=sys.stderr)
        return 2


def _unknown(parser: argparse.ArgumentParser, command: str, word: str) -> str:
    """What to say about an argument that a command does not have; a flag written short is named in full."""
    for name in command.split():
        choices = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        parser = next(choices)[name]
    near = meant(word.partition("=")[0], parser._option_string_actions) if word.startswith("--") else ""
    hint = f"did you mean {near}? " if near else ""
    return f"unknown argument {word}; {hint}`appo {command} --help` lists what there is"


def _parser() -> argparse.ArgumentParser:
    def described(parser: argparse.ArgumentParser, name: str) -> argparse.ArgumentParser:
        parser.epilog = EXAMPLES[name]
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        return parser

    parser = described(
        argparse.ArgumentParser("appo", description="Train video language models to see better.", allow_abbrev=False),
        "appo",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = described(
        commands.add_parser("demo", help="train the embedded tiny policy on generated clips", allow_abbrev=False),
        "demo",
    )
    demo.add_argument("--method", choices=("appo", "dapo", "grpo"), default="appo", help="default: appo")
    demo.add_argument("--steps", type=positive, default=30, help="optimiser steps (default: 30)")
    demo.add_argument("--seed", type=int, default=0, help="of clips, sampling and training (default: 0)")
    demo.add_argument("--questions", type=positive, default=200, help="held-out questions a level (default: 200)")
    demo.add_argument("--output", type=Path, help="run folder, new or empty (default: runs/demo-TIME)")
    train = described(commands.add_parser("train", help="train from a configuration", allow_abbrev=False), "train")
    train.add_argument("--config", help="YAML file of settings")
    train.add_argument("--tiny", action="store_true", help="dry run: two steps of the tiny policy on generated clips")
    data = described(commands.add_parser("data", help="check a dataset", allow_abbrev=False), "data")
    tasks = data.add_subparsers(dest="task", required=True, metavar="TASK")
    purpose = "find everything that is wrong with annotations, videos and images"
    _add_check_flags(described(tasks.add_parser("check", help=purpose, allow_abbrev=False), "check"))
    purpose = "score a model on a dataset, or compare two evaluations"
    _add_eval_flags(described(commands.add_parser("eval", help=purpose, allow_abbrev=False), "eval"))
    plan = commands.add_parser("plan", help="memory a run needs on each GPU, before it is run", allow_abbrev=False)
    add_flags(described(plan, "plan"))
    purpose = "train several methods with several seeds and put them side by side"
    add_compare_flags(described(commands.add_parser("compare", help=purpose, allow_abbrev=False), "compare"))
    purpose = "perceivers describe, reasoners answer from the description: which of the two moves the score"
    add_study_flags(described(commands.add_parser("study", help=purpose, allow_abbrev=False), "study"))
    purpose = "a page that shows where the winners looked"
    page = described(commands.add_parser("spotlight", help=purpose, allow_abbrev=False), "spotlight")
    spotlighting.add_flags(page)
    purpose = "run the step again at which a run stopped because a number was not finite"
    replay = described(commands.add_parser("replay", help=purpose, allow_abbrev=False), "replay")
    replay.add_argument("run", type=Path, help="run folder")
    replay.add_argument("--process", type=int, default=0, help="whose batch, of several processes (default: 0)")
    return parser


def _add_check_flags(parser: argparse.ArgumentParser) -> None:
    flags = parser.add_argument
    flags("dataset", help="a name of appo.data.DATASETS; jsonl: your own questions")
    flags("--annotations", required=True, help="annotation file or folder (docs/data.md)")
    flags("--videos", help="folder that video paths start from (default: where the annotations lie)")
    flags("--split", help="part of the dataset (docs/data.md)")
    flags("--quick", action="store_true", help="decode one frame of each video instead of all")
    flags("--workers", type=positive, default=os.cpu_count() or 1, help="processes that decode (default: all cores)")
    flags("--report", type=Path, help="JSON file of all faults, to write")
    flags("--frame-cache", metavar="FOLDER", help="put the sampled frames of all good videos into this cache")
    flags("--model", help="whose processor samples them (with --frame-cache)")
    flags("--fps", type=float, default=2.0, help="frames sampled a second, as in training (default: 2)")
    flags("--max-frames", type=positive, default=16, help="frames of a video at most (default: 16)")
    flags("--min-frames", type=positive, default=4, help="and at least (default: 4)")
    flags("--allow", type=count, default=0, metavar="N", help="faults that are no failure (default: 0)")


def _add_eval_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `appo eval`; those left out are left to :class:`appo.cli.evaluate.EvalSettings`."""
    flags = parser.add_argument
    flags("--model", help="Hugging Face folder or hub id (adapters are merged), or spotlight: the tiny policy")
    flags("--dataset", help="a name of appo.data.DATASETS (default: spotlight; its clips are made if need be)")
    flags("--annotations", help="annotation file or folder (docs/data.md)")
    flags("--videos", help="folder that video paths start from (default: where the annotations lie)")
    flags("--split", help="part of the dataset (docs/data.md)")
    flags("--output", type=Path, help="folder, new or of this evaluation (default: runs/eval-TIME)")
    flags("--limit", type=positive, help="so many questions, evenly spaced over the dataset")
    flags("--sample", type=positive, metavar="K", help="K sampled responses to each question (default: one, greedy)")
    flags("--temperature", type=float, help="of the samples (default: 1)")
    flags("--batch-size", type=positive, help="questions answered at once (default: 16)")
    flags("--max-new-tokens", type=positive, help="longest response (default: 1024; tiny policy: 128)")
    flags("--fps", type=float, help="frames sampled a second (default: 2)")
    flags("--max-frames", type=positive, help="frames of a video at most (default: 16; spotlight: 24)")
    flags("--frame-cache", help="folder in which sampled frames are kept for other runs")
    flags("--instruction", help="closes every prompt (default: asks for the format; tiny policy: nothing)")
    flags("--seed", type=int, help="of the samples (default: 0)")
    flags("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU, else float32")
    flags("--trust-remote-code", action="store_true", help="run code that a checkpoint brings")
    flags("--retry", action="store_true", help="ask again what could not be asked for its video or image")
    flags("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two evaluations of the same questions")


def _demo(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from appo.cli.demo import DemoSettings, run_demo

    _quiet_bars()
    output = arguments.output or Path("runs") / f"demo-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    settings = DemoSettings(output, arguments.method, arguments.steps, arguments.seed, arguments.questions)
    run_demo(settings, Console())
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from appo.cli.data_check import run_check

    where = (arguments.dataset, arguments.annotations, arguments.videos, arguments.split)
    how = {name: getattr(arguments, name) for name in ("quick", "workers", "report")}
    faults = run_check(Console(), *where, keeping=_keeping(arguments), **how)
    if faults <= arguments.allow:
        return 0
    print(f"appo: {faults} faults in {arguments.annotations}, {arguments.allow} are allowed (--allow)", file=sys.stderr)
    return 2


def _keeping(arguments: argparse.Namespace) -> Keeping | None:
    if bool(arguments.frame_cache) != bool(arguments.model):
        raise ValueError("--frame-cache and --model go together: the model's processor chooses what is kept")
    if not arguments.frame_cache:
        return None
    checkpoint = checkpoint_of(arguments.model)
    from appo.video.caching import Keeping
    from appo.video.reader import FrameSampling

    sampling = FrameSampling(arguments.fps, arguments.max_frames, arguments.min_frames)
    return Keeping(arguments.frame_cache, checkpoint, sampling)


def _eval(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    given = {name: value for name, value in vars(arguments).items() if value is not None and value is not False}
    del given["command"]
    if arguments.compare:
        from appo.evaluation.paired import compare

        if others := [name for name in given if name != "compare"]:
            raise ValueError(f"--compare takes two folders and nothing else: leave out --{others[0].replace('_', '-')}")
        compare(*arguments.compare).print(Console())
        return 0
    if not arguments.model:
        raise ValueError("give a model: appo eval --model spotlight")
    checkpoint_of(arguments.model)  # a path that leads nowhere is said before libraries are loaded
    from appo.cli.evaluate import EvalSettings, evaluate

    _quiet_bars()
    given.setdefault("output", Path("runs") / f"eval-{datetime.now(UTC):%Y%m%d-%H%M%S}")
    console = Console()
    folder = evaluate(EvalSettings(**given), console)
    console.print(f"evaluation: {folder}", highlight=False)
    return 0


def _train(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    from rich.console import Console

    from appo.cli.start_checks import check_start

    if arguments.config is None and not rest:
        raise ValueError("give a configuration: appo train --config recipes/spotlight.yaml")
    check_start(rest, arguments.config, tiny=arguments.tiny)
    from appo.cli.train import train
    from appo.training.arguments import parse

    _quiet_bars()
    config = [] if arguments.config is None else ["--config", arguments.config]
    console = Console()
    folder = train(*parse([*config, *rest], tiny=arguments.tiny), console)
    console.print(f"run folder: {folder}", highlight=False)
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    print(shown(plan_of(arguments)))
    return 0


def _spotlight(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    if arguments.model:
        _quiet_bars()
    console = Console()
    if page := spotlighting.spotlight(arguments, console):
        console.print(f"page: {page}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _replay(arguments: argparse.Namespace) -> int:
    from appo.training.replaying import replay

    _quiet_bars()
    for line in replay(arguments.run, arguments.process).lines():
        print(line)
    return 0


def _quiet_bars() -> None:
    """Loading bars of transformers are for eyes only: in a log they would bury the one line that says what is wrong."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _calm_libraries() -> None:
    """Settings that must be in the environment before torch and transformers are loaded."""
    # Two OpenMP threads that spin while waiting run many times slower on cores that others use too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)


def _is_users(error: Exception) -> bool:
    """Whether an error is about the user's input: settings, files, videos, the machine; all else is a bug of ours."""
    # By name, for importing the libraries that define them takes seconds.
    names = {base.__name__ for base in type(error).__mro__}
    return isinstance(error, (ValueError, OSError)) or bool(names & {"BlindPolicyError", "YAMLError"})


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
