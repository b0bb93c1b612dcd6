"""What one update of a group costs: stock rows, the published way to read attention, and ours.

    python benchmarks/update_cost.py                                  # a reduced grid, about ten minutes on a CPU core
    python benchmarks/update_cost.py --full                           # prompt x response x group, hours on a CPU
    python benchmarks/update_cost.py --device cuda --model qwen2.5-vl-7b --full

One group is scored or updated at a time, the vision tower frozen, log-probabilities and entropies through TRL's fused
head in every column:

stock      what TRL's loss would run if it carried the video: G rows of prompt + response, pixels G times, SDPA
published  eager attention; `generate` and `forward` also return every layer's attention (output_attentions)
ours       the group packed behind one prompt (appo.training.update.PackedModel), pixels once
capture    ours, with attention to frames captured in 3 layers and token weights between forward and backward (APPO)
scored     the same where the loss reads old log-probabilities: a scoring pass with capture, weights, then the update

`generate` samples the responses (ours reads the prompt once), `forward` is a pass over prompt and responses without
gradients (a scoring pass), `update` is forward and backward; only capture's reads attention. Parts of scored: `score`
(the scoring pass without capture), `score+capture`, `weights`.

Shape suffixes: G responses, P prompt tokens, N response tokens.
"""

from __future__ import annotations

import harness  # first: it sets OpenMP's waiting before torch loads

# isort: split
import argparse
import gc
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from shapes import SHAPES, Work, build_model, work_of
from trl.trainer.utils import add_fused_lm_head
from updates import CAPTURE_LAYERS, PHASES, Cell, CellPlan, GroupUpdate, Limits

PROMPTS, RESPONSES, GROUPS = (576, 2112, 4160), (64, 128, 384), (4, 8, 16)
REDUCED = [(576, 128, 8), (2112, 64, 8), (576, 128, 4)]
VARIANTS = ("stock", "published", "ours", "capture", "scored")


# --- a cell ----------------------------------------------------------------------------------------------------------


def measure_cell(model: Any, cell: Cell, args: argparse.Namespace, limits: Limits, left: harness.TimeLeft) -> Any:
    """All numbers of one row of the table, as they go into the JSON."""
    work = _work(cell, args)
    update = GroupUpdate(model, cell, args.device, args.seed)
    plan = CellPlan(update, cell, args, limits)
    _measure(plan, args, partial(_progress, left, cell, args.repeats, work.row_flops))
    peak = _memory_in_process(plan, update, args) if args.device.startswith("cuda") else _memory(plan, cell, args)
    times = {name: timed.as_json() for name, timed in plan.timed.items() if timed.seconds}
    medians = {name: time["median"] for name, time in times.items()}
    processor = {name: time["processor_median"] for name, time in times.items()}
    return {
        **asdict(cell),
        "tokens": {"rows": work.row_tokens, "packed": work.packed_tokens},
        "forward_flops": {"rows": work.row_flops, "packed": work.packed_flops},
        "limits": {"tokens": work.token_limit, "flops": work.flops_limit},
        "rows_per_call": plan.rows_per_call,
        "times": times,
        "peak_bytes": peak,
        "skipped": plan.skipped,
        "ratios": ratios(medians, peak, work),
        "processor_ratios": ratios(processor, {}, work),
        "shares": shares(medians),
        "processor_shares": shares(processor),
    }


def _progress(left: harness.TimeLeft, cell: Cell, rounds: int, work: float, done: int) -> None:
    # The first round has what is measured once, which takes about as long as two others.
    left.step(f"{cell}, round {done} of {rounds}", work * (3 if done == 1 else 1))


def _work(cell: Cell, args: argparse.Namespace) -> Work:
    everywhere = not args.device.startswith("cuda")
    return work_of(SHAPES[args.model], cell.prompt, cell.response, cell.group, head_everywhere=everywhere)


def _measure(plan: CellPlan, args: argparse.Namespace, on_round: Callable[[int], None]) -> None:
    try:
        plan.skip_what_takes_too_long()
        harness.time_interleaved(plan.timed, args.repeats, args.device, on_round)
    except torch.cuda.OutOfMemoryError:
        _measure_what_fits(plan, args)


def _measure_what_fits(plan: CellPlan, args: argparse.Namespace) -> None:
    """After running out of device memory: try everything once alone, then time what did not fail."""
    for name, timed in list(plan.timed.items()):
        timed.seconds.clear()
        timed.processor_seconds.clear()
        try:
            timed.call()
        except torch.cuda.OutOfMemoryError:
            plan.skip(name, "out of device memory")
        gc.collect()
        torch.cuda.empty_cache()
    harness.time_interleaved(plan.timed, args.repeats, args.device)


def ratios(medians: dict[str, float], peak: dict[str, int], work: Work) -> dict[str, float]:
    """Stock divided by ours, and how near that is to the token-count limit."""
    result = {}
    for phase in PHASES:
        for other in ("stock", "published"):
            if f"{other}/{phase}" in medians and f"ours/{phase}" in medians:
                result[f"{other}:ours {phase}"] = medians[f"{other}/{phase}"] / medians[f"ours/{phase}"]
    for other in ("stock", "published"):
        if peak.get(other) and peak.get("ours"):
            result[f"{other}:ours peak memory"] = peak[other] / peak["ours"]
    if "stock:ours update" in result:
        result["update of token limit"] = result["stock:ours update"] / work.token_limit
        result["update of flops limit"] = result["stock:ours update"] / work.flops_limit
    if "scored/weights" in medians and "ours/update" in medians:
        whole = sum(medians[name] for name in ("scored/score+capture", "scored/weights", "ours/update"))
        result["scored:ours update"] = whole / medians["ours/update"]
        if "stock/update" in medians:
            result["stock:scored update"] = medians["stock/update"] / whole
    if "capture/update" in medians:
        result |= {
            f"{one}:{other} update": medians[f"{one}/update"] / medians[f"{other}/update"]
            for one, other in (("capture", "ours"), ("stock", "capture"))
            if f"{one}/update" in medians and f"{other}/update" in medians
        }
    return result


def shares(medians: dict[str, float]) -> dict[str, float]:
    """What capture, weights and the scoring pass add, as shares of the whole: score + capture + weights + update."""
    if "scored/weights" not in medians or "ours/update" not in medians:
        return {}
    extra = {
        "capture": medians["scored/score+capture"] - medians["scored/score"],
        "weights": medians["scored/weights"],
        "score": medians["scored/score"],
    }
    whole = sum(extra.values()) + medians["ours/update"]
    extra["capture+weights"] = extra["capture"] + extra["weights"]
    extra["score+capture+weights"] = extra["capture+weights"] + extra["score"]
    return {name: seconds / whole for name, seconds in extra.items()}


# --- peak memory -----------------------------------------------------------------------------------------------------


def update_calls(update: GroupUpdate, rows_per_call: dict[str, int]) -> dict[str, Callable[[], Any]]:
    """The update of each variant, for its peak memory; gradients of the parameters are part of it."""
    calls: dict[str, Callable[[], Any]] = {
        f"{variant}": partial(update.rows, attention, grad=True, rows_per_call=rows_per_call[f"{variant}/update"])
        for variant, attention in (("stock", "sdpa"), ("published", "eager"))
        if f"{variant}/update" in rows_per_call
    }
    packed = {"ours": partial(update.packed, grad=True), "capture": update.weighted, "scored": update.scored_update}
    return calls | packed


def _memory_in_process(plan: CellPlan, update: GroupUpdate, args: argparse.Namespace) -> dict[str, int]:
    calls, peaks = update_calls(update, plan.rows_per_call), {}
    for variant in _memory_variants(plan, args):
        try:
            peaks[variant] = harness.peak_memory(calls[variant], args.device)
        except torch.cuda.OutOfMemoryError:
            print(f"peak memory of {variant}: out of device memory", file=sys.stderr)
    return peaks


def _memory_variants(plan: CellPlan, args: argparse.Namespace) -> list[str]:
    if args.no_memory:
        return []
    return [v for v in args.variants if ("scored/weights" if v == "scored" else f"{v}/update") in plan.timed]


def _memory(plan: CellPlan, cell: Cell, args: argparse.Namespace) -> dict[str, int]:
    """Each variant in a process of its own: the kernel's high-water mark knows no «since»."""
    peaks = {}
    for variant in _memory_variants(plan, args):
        rows = plan.rows_per_call.get(f"{variant}/update", 0)
        words = [variant, *map(str, (cell.prompt, cell.response, cell.group, rows))]
        shared = ["--model", args.model, "--threads", str(args.threads), "--seed", str(args.seed)]
        checkpointing = ["--gradient-checkpointing", "on" if args.gradient_checkpointing else "off"]
        arguments = ["--measure-memory", *words, *shared, *checkpointing, "--dtype", args.dtype_name]
        peaks[variant] = harness.memory_of_fresh_process(Path(__file__), arguments)
    return peaks


def print_peak_memory(args: argparse.Namespace) -> None:
    """What the fresh process does."""
    variant, *numbers = args.measure_memory
    prompt, response, group, rows = map(int, numbers)
    model = _model(args)
    update = GroupUpdate(model, Cell(prompt, response, group), args.device, args.seed)
    # Once small: libraries allocate their work space, which is not the update's.
    warm = GroupUpdate(model, Cell(16, 4, 2), args.device, args.seed)
    update_calls(warm, {f"{variant}/update": 2})[variant]()
    call = update_calls(update, {f"{variant}/update": rows} if rows else {})[variant]
    print(json.dumps({"peak_bytes": harness.peak_memory(call, args.device)}))


# --- the command -----------------------------------------------------------------------------------------------------


def _model(args: argparse.Namespace) -> Any:
    model = build_model(args.model, args.device, args.dtype, checkpointing=args.gradient_checkpointing)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    return model


def show_times(cells: Sequence[dict[str, Any]]) -> None:
    """Seconds of each phase, and what ours saves on the wall's clock and on the processor's."""
    header = ["prompt/response G", "rows", "packed", "limit: tokens", "FLOPs", "", "stock", "published", "ours"]
    header += ["stock : ours", "(processor)", "published : ours"]
    rows = []
    for cell in cells:
        seconds = {name: times["median"] for name, times in cell["times"].items()}
        for phase in PHASES:
            size = [_name(cell), str(cell["tokens"]["rows"]), str(cell["tokens"]["packed"])]
            size += [f"{cell['limits']['tokens']:.2f}x", f"{cell['limits']['flops']:.2f}x"]
            times = [harness.shown(seconds.get(f"{v}/{phase}"), " s") for v in ("stock", "published", "ours")]
            found = [cell["ratios"], cell["processor_ratios"]]
            ratio = [harness.shown(ratios.get(f"stock:ours {phase}"), "x") for ratios in found]
            ratio.append(harness.shown(cell["ratios"].get(f"published:ours {phase}"), "x"))
            rows.append([*(size if phase == PHASES[0] else [""] * 5), phase, *times, *ratio])
    harness.print_table("Time of one group (update: forward and backward)", header, rows)


def show(cells: Sequence[dict[str, Any]]) -> None:
    """Print the tables."""
    show_times(cells)
    header = ["prompt/response G", "ours", "capture : ours", "(processor)", "scored : ours", "(processor)"]
    header += ["stock : capture", *(f"peak {v}" for v in VARIANTS), "peak ratio"]
    rows = [_extra_row(cell) for cell in cells]
    harness.print_table("The update with capture and weights (times), and its memory", header, rows)


def _name(cell: dict[str, Any]) -> str:
    return f"{cell['prompt']}/{cell['response']} G={cell['group']}"


def _extra_row(cell: dict[str, Any]) -> list[str]:
    seconds = {name: times["median"] for name, times in cell["times"].items()}
    ratios = [
        harness.shown(cell[kind].get(f"{variant}:ours update"), "x")
        for variant in ("capture", "scored")
        for kind in ("ratios", "processor_ratios")
    ]
    peaks = [cell["peak_bytes"].get(variant) for variant in VARIANTS]
    memory = [harness.shown(None if peak is None else peak / harness.GB, " GB") for peak in peaks]
    return [
        _name(cell),
        harness.shown(seconds.get("ours/update"), " s"),
        *ratios,
        harness.shown(cell["ratios"].get("stock:capture update"), "x"),
        *memory,
        harness.shown(cell["ratios"].get("stock:ours peak memory"), "x"),
    ]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, with what follows from it filled in."""
    parser = harness.base_parser(__doc__, "update_cost")
    parser.add_argument("--model", choices=sorted(SHAPES), default="cpu", help="a random model of this shape")
    parser.add_argument("--full", action="store_true", help="all of prompt x response x group")
    parser.add_argument("--cells", nargs="+", metavar="P/N/G", help="these cells, for example 576/128/8")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--append", action="store_true", help="keep the other cells of an earlier run's JSON")
    parser.add_argument("--budget", type=float, default=240.0, help="longest measurement in seconds; longer: skipped")
    parser.add_argument("--memory-gb", type=float, help="most memory of a measurement (default: 60 %% of what is free)")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), dest="dtype_name", help="default: bfloat16 on cuda")
    parser.add_argument(
        "--gradient-checkpointing", choices=("on", "off", "auto"), default="auto", help="auto: for 3b and 7b, as TRL"
    )
    parser.add_argument("--measure-memory", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.dtype_name = args.dtype_name or ("bfloat16" if args.device.startswith("cuda") else "float32")
    args.dtype = getattr(torch, args.dtype_name)
    chosen = args.gradient_checkpointing
    args.gradient_checkpointing = chosen == "on" or (chosen == "auto" and args.model.startswith("qwen"))
    return args


def cells_of(args: argparse.Namespace) -> list[Cell]:
    """The grid to measure."""
    if args.cells:
        return [Cell(*map(int, text.split("/"))) for text in args.cells]
    if args.full:
        return [Cell(p, n, g) for p in PROMPTS for n in RESPONSES for g in GROUPS]
    return [Cell(*sizes) for sizes in REDUCED]


def earlier_cells(args: argparse.Namespace, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """With ``--append``: the cells of the output file that are not measured again, if model and device are the same."""
    if not (args.append and args.output.exists()):
        return []
    earlier = json.loads(args.output.read_text(encoding="utf-8"))
    if (earlier["model"]["name"], earlier["machine"]["device"]) != (args.model, args.device):
        raise SystemExit(f"--append: {args.output} is about another model or device; choose another --output")
    again = {(cell.prompt, cell.response, cell.group) for cell in cells}
    return [cell for cell in earlier["cells"] if (cell["prompt"], cell["response"], cell["group"]) not in again]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the tables, write the JSON; returns what was written."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse(argv)
    harness.prepare(args)
    if args.measure_memory:
        print_peak_memory(args)
        return {}
    cells = cells_of(args)
    limits = Limits(
        int(args.memory_gb * harness.GB) if args.memory_gb else harness.free_memory(args.device), args.budget
    )
    model = _model(args)
    result = harness.provenance(args, argv) | {
        "model": {"name": args.model, "dtype": args.dtype_name, **asdict(SHAPES[args.model])},
        "settings": {
            "gradient_checkpointing": args.gradient_checkpointing,
            "vision_frozen": True,
            "capture_layers": CAPTURE_LAYERS,
            "memory_limit_bytes": limits.memory,
            "budget_seconds": limits.seconds,
            "cells_left_out": []
            if args.full
            else "all but the listed ones of prompt x response x group; --full runs them",
        },
        "cells": [],
    }
    warm = CellPlan(GroupUpdate(model, Cell(16, 4, 2), args.device, args.seed), Cell(16, 4, 2), args, limits)
    harness.time_interleaved(warm.timed, 1, args.device)
    work = [_work(cell, args).row_flops for cell in cells]
    left = harness.TimeLeft(sum(work) * (args.repeats + 2))
    kept = earlier_cells(args, cells)
    for cell in cells:
        result["cells"].append(measure_cell(model, cell, args, limits, left) | {"command": result["command"]})
        harness.write_json(args.output, result | {"cells": kept + result["cells"]})
    result["cells"] = kept + result["cells"]
    show(result["cells"])
    return result


if __name__ == "__main__":
    main()
