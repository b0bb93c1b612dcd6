"""What the token weights cost with a real vocabulary: all log-probabilities at once, or a tile at a time.

    python benchmarks/weights_cost.py                  # G = 8, N = 128 and 384, V = 151 936, minutes on a CPU core
    python benchmarks/weights_cost.py --device cuda --hidden 2048

Hidden states and the head are random; both columns start from the hidden states, as after a scoring pass:

full       head and log-softmax over every token, a (G, N, V) tensor, then token_weights
tiled      token_weights asks appo.models.log_probs.HeadLogProbs for the tokens it compares, at most 128 at a time

Shape suffixes: G responses, N response tokens, F frames, H hidden size, V vocabulary.
"""

from __future__ import annotations

import harness  # first: it sets OpenMP's waiting before torch loads

# isort: split
import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from appo.method.perception import token_weights
from appo.models.log_probs import HeadLogProbs
from appo.types import GroupScores, PerceptionWeights

WAYS = ("full", "tiled")


class GroupScored:
    """A group after its scoring pass: hidden states, attention to frames, rewards; and the model's head."""

    def __init__(self, response: int, args: argparse.Namespace) -> None:
        generator = torch.Generator().manual_seed(args.seed)
        G, N, F = args.group, response, args.frames
        dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
        weight_VH = torch.randn(args.vocabulary, args.hidden, generator=generator) * args.hidden**-0.5
        head = nn.Linear(args.hidden, args.vocabulary, bias=False, device=args.device, dtype=dtype)
        head.weight = nn.Parameter(weight_VH.to(args.device, dtype), requires_grad=False)
        self.head = head
        self.hidden_GNH = torch.randn(G, N, args.hidden, generator=generator).to(args.device, dtype)
        # Each response prefers some frames, as trained policies do; uniform attention would make all of them crucial.
        liking_GF = torch.randn(G, 1, F, generator=generator) + torch.randn(1, 1, F, generator=generator)
        self.attn_GNF = (liking_GF + torch.randn(G, N, F, generator=generator)).softmax(-1).to(args.device)
        self.mask_GN = torch.ones(G, N, dtype=torch.bool, device=args.device)
        # The scoring pass leaves each token's normaliser behind, so it is no part of the weights' cost.
        normalizer_N = [torch.logsumexp(head(hidden_NH).float(), dim=-1) for hidden_NH in self.hidden_GNH]
        unread = torch.zeros(G, N, device=args.device)
        self.scores = GroupScores(unread, self.mask_GN, self.hidden_GNH, torch.stack(normalizer_N), self.attn_GNF)
        self.rewards_G = (torch.arange(G, device=args.device) % 2).float()

    def full(self) -> PerceptionWeights:
        """From a (G, N, V) tensor."""
        G, N, _ = self.hidden_GNH.shape
        with torch.no_grad():
            logits_GNV = self.head(self.hidden_GNH).float()
            log_probs_GNV = torch.log_softmax(logits_GNV, dim=-1)
        assert log_probs_GNV.shape[:2] == (G, N)
        return token_weights(self.attn_GNF, self.mask_GN, self.rewards_G, log_probs_GNV)

    def tiled(self) -> PerceptionWeights:
        """The trainer's way."""
        log_probs = HeadLogProbs(self.head, self.hidden_GNH, self.scores.log_normalizer_GN, temperature=1.0)
        return token_weights(self.attn_GNF, self.mask_GN, self.rewards_G, log_probs)


def measure(response: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    group = GroupScored(response, args)
    calls: dict[str, Callable[[], Any]] = {way: getattr(group, way) for way in WAYS}
    weights = {way: call() for way, call in calls.items()}  # warms up, and both ways must agree
    torch.testing.assert_close(weights["full"].weights_GN, weights["tiled"].weights_GN, rtol=1e-3, atol=1e-3)
    timed = {way: harness.Timed(call) for way, call in calls.items()}
    harness.time_interleaved(timed, args.repeats, args.device, partial(_progress, response, args.repeats))
    peak = {way: _peak(way, response, group, args) for way in WAYS} if not args.no_memory else {}
    ratios = {"full:tiled time": timed["full"].median / timed["tiled"].median}
    if peak and peak["tiled"]:
        ratios["full:tiled peak memory"] = peak["full"] / peak["tiled"]
    return {
        "group": args.group,
        "response": response,
        "frames": args.frames,
        "crucial_frames": int(weights["tiled"].crucial_F.sum()),
        "bytes_of_GNV": 4 * args.group * response * args.vocabulary,
        "times": {way: item.as_json() for way, item in timed.items()},
        "peak_bytes": peak,
        "ratios": ratios,
    }


def _progress(response: int, rounds: int, done: int) -> None:
    print(f"N={response}, round {done} of {rounds}", file=sys.stderr, flush=True)


def _peak(way: str, response: int, group: GroupScored, args: argparse.Namespace) -> int:
    if args.device.startswith("cuda") or args.in_process:
        return harness.peak_memory(getattr(group, way), args.device)
    names = ("group", "frames", "hidden", "vocabulary", "threads", "seed")
    flags = [word for name in names for word in (f"--{name}", str(getattr(args, name)))]
    arguments = ["--measure-memory", way, "--responses", str(response), *flags]
    return harness.memory_of_fresh_process(Path(__file__), arguments)


def show(cells: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    header = ["G", "N", "crucial frames", "(G, N, V)", "full", "tiled", "peak full", "peak tiled"]
    rows = []
    for cell in cells:
        times = [harness.shown(cell["times"][way]["median"], " s") for way in WAYS]
        peaks = [cell["peak_bytes"].get(way) for way in WAYS]
        memory = [harness.shown(None if peak is None else peak / harness.GB, " GB") for peak in peaks]
        size = harness.shown(cell["bytes_of_GNV"] / harness.GB, " GB")
        rows.append([str(cell["group"]), str(cell["response"]), str(cell["crucial_frames"]), size, *times, *memory])
    harness.print_table("Token weights of one group, head included", header, rows)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = harness.base_parser(__doc__, "weights_cost")
    parser.add_argument("--group", type=int, default=8, help="G")
    parser.add_argument("--responses", type=int, nargs="+", default=[128, 384], help="N")
    parser.add_argument("--frames", type=int, default=8, help="F (16 sampled frames: 8)")
    parser.add_argument("--hidden", type=int, default=256, help="H; small by default, so that the head does not hide V")
    parser.add_argument("--vocabulary", type=int, default=151936, help="V")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--in-process", action="store_true", help="peak memory without a fresh process (less exact)")
    parser.add_argument("--measure-memory", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, write the JSON; returns what was written."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse(argv)
    harness.prepare(args)
    if args.measure_memory:
        call = getattr(GroupScored(args.responses[0], args), args.measure_memory)
        print(json.dumps({"peak_bytes": harness.peak_memory(call, args.device)}))
        return {}
    result = harness.provenance(args, argv) | {
        "shape": {"hidden": args.hidden, "vocabulary": args.vocabulary, "frames": args.frames},
        "cells": [measure(response, args) for response in args.responses],
    }
    harness.write_json(args.output, result)
    show(result["cells"])
    return result


if __name__ == "__main__":
    main()
