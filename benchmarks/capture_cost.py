"""What it costs to capture one layer's attention to frames for a packed group: by scores, or one-hot.

    python benchmarks/capture_cost.py                       # a minute or two on a CPU core
    python benchmarks/capture_cost.py --device cuda --dtypes bfloat16

Queries and keys are random, of the shape of Qwen2.5-VL-3B's attention (16 heads, 2 key/value heads of size 128); a
frame has 64 tokens. All ways give attention averaged over frame tokens and heads for the response tokens, (G, N, F):

scores   softmax of Q K^T in float32, a chunk of queries at a time, behind copies of the prompt's keys
kernel   SDPA with V := one-hot(frame) and a mask, behind copies of the prompt's keys for each query head
one_hot  V := one-hot(frame) in flash attention over the prompt's keys, merged with the segments' by log-sum-exps

Shape suffixes: G responses, P prompt tokens, N response tokens, F frames; as in appo.models.prefix_attention.
"""

from __future__ import annotations

import harness  # first: it sets OpenMP's waiting before torch loads

# isort: split
import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from shapes import TOKENS_PER_FRAME
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from appo.models.frame_attention import FrameCapture, capture_by_one_hot, capture_by_scores, one_hot_attention
from appo.models.frame_tokens import frame_pool
from appo.models.prefix_attention import PrefixLayout

WAYS = ("scores", "kernel", "one_hot")


class PackedLayer:
    """Queries and keys of one layer for a packed group, and the ways to capture its attention."""

    def __init__(self, prompt: int, response: int, dtype: str, args: argparse.Namespace) -> None:
        S, G, N, D = prompt - 1, args.group, response, args.head_size
        generator = torch.Generator().manual_seed(args.seed)
        query, key = (
            torch.randn(1, S + G * N, heads, D, generator=generator).to(args.device, getattr(torch, dtype))
            for heads in (args.heads, args.kv_heads)
        )
        self.qkv = (query.transpose(1, 2), key.transpose(1, 2), key.transpose(1, 2))
        mask_GN = torch.ones(G, N, dtype=torch.bool, device=args.device)
        self.layout = PrefixLayout(S, S + torch.arange(G * N, device=args.device).view(G, N), mask_GN, 1)
        self.frames, self.scaling = S // TOKENS_PER_FRAME, D**-0.5
        frame_L = torch.arange(S + N, device=args.device) // TOKENS_PER_FRAME
        pool_GLF = frame_pool(frame_L.where(frame_L < self.frames, -1).expand(G, -1), self.frames)
        self.capture = FrameCapture(torch.arange(N, device=args.device).expand(G, -1), pool_GLF, frozenset([0]))

    def scores(self) -> Tensor:
        """Float32, in chunks."""
        return capture_by_scores(self.qkv, self.layout, self.scaling, None, self.capture)

    @torch.no_grad()
    def kernel(self) -> Tensor:
        """The model's own kernel."""
        (query, key, _), layout = self.qkv, self.layout
        query_GAND, key_GKLD = layout.segments(query), layout.rows(key)
        module = SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1])
        mask = layout.visible_11NL(None)

        def attend(values_GLD: Tensor) -> Tensor:
            values_GKLD = values_GLD[:, None].expand_as(key_GKLD)
            found, _ = sdpa_attention_forward(module, query_GAND, key_GKLD, values_GKLD, mask, scaling=self.scaling)
            return found

        return one_hot_attention(attend, self.capture.pool_BLF, key)

    def one_hot(self) -> Tensor:
        """No copies."""
        return capture_by_one_hot(self.qkv, self.layout, self.scaling, self.capture)


def measure(prompt: int, response: int, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    layer = PackedLayer(prompt, response, dtype, args)
    found = {way: getattr(layer, way)() for way in WAYS}  # warms up, and all ways must agree
    off = {way: float(((found[way] - found["scores"]) / found["scores"]).abs().max()) for way in WAYS[1:]}
    if max(off.values()) > (1e-4 if dtype == "float32" else 0.02):
        raise SystemExit(f"the ways differ: {off}")
    timed = {way: harness.Timed(getattr(layer, way)) for way in WAYS}
    harness.time_interleaved(timed, args.repeats, args.device)
    cell = [str(prompt), str(response), dtype]
    peak = {} if args.no_memory else {way: _peak(way, cell, layer, args) for way in WAYS}
    times = {way: item.as_json() for way, item in timed.items()}
    ratios = {f"{way}:one_hot time": timed[way].median / timed["one_hot"].median for way in WAYS[:2]}
    ratios |= {f"{way}:one_hot peak memory": peak[way] / peak["one_hot"] for way in WAYS[:2] if peak.get("one_hot")}
    sizes = {"prompt": prompt, "response": response, "group": args.group, "dtype": dtype, "frames": layer.frames}
    return {**sizes, "times": times, "peak_bytes": peak, "relative_difference": off, "ratios": ratios}


def _peak(way: str, cell: list[str], layer: PackedLayer, args: argparse.Namespace) -> int:
    if args.device.startswith("cuda"):
        return harness.peak_memory(getattr(layer, way), args.device)
    names = ("group", "heads", "kv_heads", "head_size", "threads", "seed")
    flags = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    return harness.memory_of_fresh_process(Path(__file__), ["--measure-memory", way, *cell, *flags])


def show(cells: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    header = ["prompt/response G", "type", *WAYS, *(f"peak {way}" for way in WAYS), "one_hot off by"]
    rows = []
    for cell in cells:
        times = [harness.shown(cell["times"][way]["processor_median"], " s") for way in WAYS]
        peaks = [cell["peak_bytes"].get(way) for way in WAYS]
        memory = [harness.shown(None if peak is None else peak / 1e6, " MB") for peak in peaks]
        off = harness.shown(100 * cell["relative_difference"]["one_hot"], " %", 2)
        rows.append([f"{cell['prompt']}/{cell['response']} G={cell['group']}", cell["dtype"], *times, *memory, off])
    harness.print_table("Capture of one layer (processor time)", header, rows)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = harness.base_parser(__doc__, "capture_cost")
    parser.add_argument("--cells", nargs="+", metavar="P/N", default=["2112/64", "4160/384"])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--group", type=int, default=8, help="G")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--measure-memory", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, write the JSON; returns what was written."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse(argv)
    harness.prepare(args)
    if args.measure_memory:
        way, prompt, response, dtype = args.measure_memory
        getattr(PackedLayer(TOKENS_PER_FRAME + 2, 2, dtype, args), way)()  # libraries allocate their work space
        layer = PackedLayer(int(prompt), int(response), dtype, args)
        print(json.dumps({"peak_bytes": harness.peak_memory(getattr(layer, way), args.device)}))
        return {}
    sizes = [tuple(map(int, text.split("/"))) for text in args.cells]
    cells = [measure(prompt, response, dtype, args) for prompt, response in sizes for dtype in args.dtypes]
    shape = {"heads": args.heads, "kv_heads": args.kv_heads, "head_size": args.head_size}
    result = harness.provenance(args, argv) | {"shape": shape, "cells": cells}
    harness.write_json(args.output, result)
    show(cells)
    return result


if __name__ == "__main__":
    main()
