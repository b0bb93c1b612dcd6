"""One update of a group of text: ordinary rows, the published package prefix-grouper, and this library's packing.

    python benchmarks/shared_prefix.py                       # minutes on a CPU core
    pip install prefix-grouper                               # for its column, which is left out without it

All three train the same Qwen2.5-VL text model on the same ids, with the head on response tokens only, and their
gradients must be equal, or the run stops. prefix-grouper (arXiv 2506.05433) shares the prompt of text; vision, rotary
positions of videos and frame attention are not in it, so the prompt is text here.

Shape suffixes: G responses, P prompt tokens, N response tokens, T = P + G N.
"""

from __future__ import annotations

import harness  # first: it sets OpenMP's waiting before torch loads

# isort: split
import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from shapes import SHAPES, build_model, responses_of, work_of
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from updates import Cell

from appo.models.frame_attention import use_appo_attention
from appo.models.log_probs import score_group
from appo.models.prompt import Prompt

PUBLISHED = "prefix-grouper"
WAYS = ("rows", PUBLISHED, "packed")
TOLERANCE = 1e-4  # float32, of the largest gradient of a tensor
CELLS = ["576/128/8", "2112/64/8"]


class TextGroup:
    """A group of text, and the ways to update on it. Gradients are dropped by the next update."""

    def __init__(self, cell: Cell, args: argparse.Namespace) -> None:
        self.model = build_model(args.model, args.device, torch.float32)
        self.rows_per_call = args.rows_per_call or cell.group
        generator = torch.Generator().manual_seed(args.seed)
        words = self.model.config.video_token_id - 4
        self.ids_1P = torch.randint(2, words, (1, cell.prompt), generator=generator).to(args.device)
        self.responses = responses_of(self.model, cell.group, cell.response, args.device, args.seed)
        self.advantages_G = torch.arange(cell.group, device=args.device) % 2 - 0.5

    def calls(self) -> dict[str, Callable[[], None]]:
        """What can be measured here."""
        ways = [way for way in WAYS if way != PUBLISHED or find_spec("prefix_grouper")]
        return {way: partial(self.update, way) for way in ways}

    def update(self, way: str) -> None:
        """Forward and backward; rows in micro-batches."""
        self.model.zero_grad(set_to_none=True)
        step = self.rows_per_call if way == "rows" else len(self.responses)
        for start in range(0, len(self.responses), step):
            chosen = slice(start, start + step)
            log_probs_GN = self._log_probs(way, self.responses[chosen])
            ratio_GN = (log_probs_GN - log_probs_GN.detach()).exp()
            (-(ratio_GN * self.advantages_G[chosen, None]).sum()).backward()

    def _log_probs(self, way: str, responses: list[Tensor]) -> Tensor:
        text_config = self.model.config.get_text_config()
        text_config._attn_implementation_internal = _registered() if way == PUBLISHED else "sdpa"
        if way == PUBLISHED:
            return self._published(torch.stack(responses))
        if way == "packed":
            use_appo_attention(self.model)
        packed = way == "packed"
        scores = score_group(self.model, Prompt(self.ids_1P), responses, capture_layers=0, shared_prefix=packed)
        return scores.log_probs_GN

    def _published(self, ids_GN: Tensor) -> Tensor:
        """As the package's manual says: concatenate, run, split behind the prompt's last token."""
        from prefix_grouper import PrefixGrouper

        (G, N), P = ids_GN.shape, self.ids_1P.shape[1]
        masks = torch.ones_like(self.ids_1P), torch.ones_like(ids_GN)
        grouper = PrefixGrouper.from_ungrouped_masks(*masks, group_sizes=G, device=ids_GN.device)
        ids_1T = grouper.concat_input(self.ids_1P, masks[0], ids_GN, masks[1])
        own_T = torch.cat([torch.arange(P), torch.arange(P, P + N).repeat(G)]).to(ids_1T)
        hidden_1TH = self.model.model(
            input_ids=ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            position_ids=own_T.expand(3, 1, -1),
            prefix_grouper=grouper,
            use_cache=False,
        ).last_hidden_state
        _, _, hidden_GNH, _ = grouper.split_output(hidden_1TH, include_prefix_last=1)
        logits_GNV = self.model.get_output_embeddings()(hidden_GNH[:, :-1]).float()
        return logits_GNV.log_softmax(dim=-1).gather(-1, ids_GN[..., None])[..., 0]

    def gradients(self, way: str) -> dict[str, Tensor]:
        """Of one update."""
        self.update(way)
        return {name: one.grad.clone() for name, one in self.model.named_parameters() if one.grad is not None}


def _registered() -> str:
    """The package's attention over SDPA. Its own adapter is for flash attention: SDPA needs the causal mask made."""
    name, kernel = "prefix_grouper_sdpa", ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, _: Any, *, prefix_grouper: Any, **kwargs: Any
    ) -> Any:
        def part(query: Tensor, key: Tensor, value: Tensor, padding: Tensor) -> Tensor:
            queries, keys = query.shape[2], key.shape[2]
            mask = None  # SDPA's own causal mask
            if queries < keys:
                mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
                mask = mask & padding[:, None, None]
            output: Tensor = kernel(module, query, key, value, mask, **kwargs)[0]
            return output

        return prefix_grouper.forward(part, query, key, value), None

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return name


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Of two updates' gradients, relative to the largest number of each tensor."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max() / one[name].abs().max().clamp(min=1e-30)) for name in one)


# --- the command -----------------------------------------------------------------------------------------------------


def measure(cell: Cell, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    group = TextGroup(cell, args)
    calls = group.calls()
    base = group.gradients("rows")
    differences = {way: largest_difference(base, group.gradients(way)) for way in calls if way != "rows"}
    del base
    if max(differences.values()) > TOLERANCE:
        raise SystemExit(f"{cell}: the ways give other gradients: {differences}")
    timed = {way: harness.Timed(call) for way, call in calls.items()}
    harness.time_interleaved(timed, args.repeats, args.device, lambda n: print(f"{cell}, round {n}", file=sys.stderr))
    peak = {} if args.no_memory else {way: _peak(way, cell, args) for way in calls}
    work = work_of(SHAPES[args.model], cell.prompt, cell.response, cell.group, head_everywhere=False)
    cost = {way: times.as_json() for way, times in timed.items()}
    clocks = {"wall": "median", "processor": "processor_median"}
    return {
        **cell.__dict__,
        "rows_per_call": group.rows_per_call,
        "times": cost,
        "peak_bytes": peak,
        "limits": {"tokens": work.token_limit, "flops": work.flops_limit},
        "largest_difference_of_gradients": differences,
        "ratios": {
            clock: {f"{way}:packed": cost[way][key] / cost["packed"][key] for way in calls if way != "packed"}
            for clock, key in clocks.items()
        },
    }


def _peak(way: str, cell: Cell, args: argparse.Namespace) -> int:
    names = ("model", "device", "threads", "rows_per_call")
    shared = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    words = ["--measure-memory", way, "--cells", f"{cell.prompt}/{cell.response}/{cell.group}", *shared]
    return harness.memory_of_fresh_process(Path(__file__), words)


def show(cells: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    header = ["", "limit", *(f"{way}: processor, peak" for way in WAYS), "rows : packed", f"{PUBLISHED} : packed"]
    rows = []
    for cell in cells:
        ratio = cell["ratios"]["processor"]
        parts = [
            f"{harness.shown(cell['times'].get(way, {}).get('processor_median'), ' s')}, "
            f"{harness.shown(cell['peak_bytes'].get(way, 0) / harness.GB or None, ' GB')}"
            for way in WAYS
        ]
        name = str(Cell(cell["prompt"], cell["response"], cell["group"]))
        quotients = [harness.shown(ratio.get(f"{way}:packed"), "x") for way in WAYS[:2]]
        rows.append([name, harness.shown(cell["limits"]["flops"], "x"), *parts, *quotients])
    harness.print_table("Update of one group of text", header, rows)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = harness.base_parser(__doc__ or "", "shared_prefix")
    parser.add_argument("--model", choices=sorted(SHAPES), default="cpu")
    parser.add_argument("--cells", nargs="+", default=CELLS, metavar="P/N/G")
    parser.add_argument("--rows-per-call", type=int, default=0, help="ordinary rows of a micro-batch; 0: all G")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--measure-memory", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, write the JSON; returns what was written."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parse(argv)
    harness.prepare(args)
    cells = [Cell(*map(int, cell.split("/"))) for cell in args.cells]
    if args.measure_memory:
        TextGroup(Cell(16, 4, 2), args).update(args.measure_memory)  # libraries allocate their work space
        call = TextGroup(cells[0], args).calls()[args.measure_memory]
        print(json.dumps({"peak_bytes": harness.peak_memory(call, args.device)}))
        return {}
    if not find_spec("prefix_grouper"):
        print(f"{PUBLISHED} is not installed: its column is left out", file=sys.stderr)
    result = harness.provenance(args, argv) | {"cells": []}
    result["versions"][PUBLISHED] = harness.version(PUBLISHED)
    for cell in cells:
        result["cells"].append(measure(cell, args))
        harness.write_json(args.output, result)
    show(result["cells"])
    return result


if __name__ == "__main__":
    main()
