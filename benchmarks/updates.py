"""The ways to score and update one group that update_cost.py compares, and which of them fit memory and time.

Shape suffixes: G responses, P prompt tokens, N response tokens.
"""

from __future__ import annotations

import harness  # first: it sets OpenMP's waiting before torch loads

# isort: split
import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from shapes import SHAPES, ModelShape, prompt_of, responses_of
from torch import Tensor

from appo.method.perception import token_weights
from appo.models.families import family_of
from appo.models.frame_attention import use_appo_attention
from appo.models.log_probs import log_probs_at, score_group
from appo.models.prefix_packing import IGNORED, group_rows
from appo.rollout.generation import respond
from appo.training.update import PackedModel, group_scores

CAPTURE_LAYERS = 3
PHASES = ("generate", "forward", "update")


@dataclass(frozen=True)
class Cell:
    """One row of the table."""

    prompt: int
    response: int
    group: int

    def __str__(self) -> str:
        return f"{self.prompt}/{self.response} G={self.group}"


# --- what is measured ------------------------------------------------------------------------------------------------


class GroupUpdate:
    """One group and the ways to score and update it. Gradients are dropped after each update."""

    def __init__(self, model: Any, cell: Cell, device: str, seed: int) -> None:
        self.model = model
        self.prompt = prompt_of(model, cell.prompt, device, seed)
        self.responses = responses_of(model, cell.group, cell.response, device, seed)
        self.rewards_G = torch.arange(cell.group, device=device) % 2.0
        self.advantages_G = self.rewards_G - 0.5

    def rows(self, attention: str, *, grad: bool, rows_per_call: int, attentions: bool = False) -> None:
        """Ordinary rows, ``rows_per_call`` at a time (a micro-batch: gradients add up)."""
        self._use(attention)
        group = len(self.responses)
        for start in range(0, group, rows_per_call):
            stop = min(start + rows_per_call, group)
            inputs, _ = group_rows(self.model, self.prompt, self.responses[start:stop])
            labels = inputs["input_ids"].clone()
            labels[:, : self.prompt.length] = IGNORED
            with torch.set_grad_enabled(grad):
                outputs = self.model(**inputs, labels=labels, fused_lm_head=True, output_attentions=attentions)
            if grad:
                self._loss(outputs.log_probs, self.advantages_G[start:stop, None]).backward()
        self.model.zero_grad(set_to_none=True)

    def packed(self, *, grad: bool) -> None:
        """The trainer's path: the group behind one prompt."""
        log_probs, _ = self._forward(grad=grad)
        if grad:
            self._loss(log_probs, self.advantages_G[:, None]).backward()
        self.model.zero_grad(set_to_none=True)

    def _forward(self, *, grad: bool, layers: int = 0) -> tuple[Tensor, PackedModel]:
        self._use("appo")
        rows, _ = group_rows(self.model, self.prompt, self.responses)
        labels = rows["input_ids"].clone()
        labels[:, : self.prompt.length] = IGNORED
        call = PackedModel(self.model, [self.prompt], len(self.responses), self.model, capture_layers=layers)
        with torch.set_grad_enabled(grad):
            outputs = call(
                input_ids=rows["input_ids"], labels=labels, attention_mask=rows["attention_mask"], fused_lm_head=True
            )
        return outputs.log_probs[:, self.prompt.length - 1 :], call

    def weighted(self) -> None:
        """The trainer's path for APPO with one update per rollout: scores and weights between forward and backward."""
        log_probs_GN, call = self._forward(grad=True, layers=CAPTURE_LAYERS)
        scores = group_scores(self.model, call.passes[0], torch.stack(self.responses), log_probs_GN.detach())
        weights_GN = self.weights(scores).weights_GN
        self._loss(log_probs_GN, self.advantages_G[:, None] * weights_GN).backward()
        self.model.zero_grad(set_to_none=True)

    def generate(self, attention: str, *, rows_per_call: int, attentions: bool = False) -> None:
        """Responses to G copies of the prompt, as stock trainers generate."""
        self._use(attention)
        self.model.eval()
        for start in range(0, len(self.responses), rows_per_call):
            rows = min(rows_per_call, len(self.responses) - start)
            # One prompt: every tensor's copies follow one another.
            copies = {key: torch.cat([value] * rows) for key, value in self.prompt.mapping().items()}
            copies["attention_mask"] = torch.ones_like(copies["input_ids"])
            with torch.no_grad():
                self.model.generate(
                    **copies,
                    **self._generation,
                    output_attentions=attentions,
                    return_dict_in_generate=attentions,
                )
        self.model.train()

    def generate_once_read(self) -> None:
        """The trainer's path: the prompt is read once, its cache repeated for G responses."""
        self._use("appo")
        self.model.eval()
        respond(self.model, 0, [self.prompt], len(self.responses), **self._generation)
        self.model.train()

    @property
    def _generation(self) -> dict[str, Any]:
        length = len(self.responses[0])
        banned = family_of(self.model).banned_ids
        return {
            "min_new_tokens": length,
            "max_new_tokens": length,
            "do_sample": True,
            "top_k": 0,
            "suppress_tokens": banned,
        }

    def score(self, layers: int) -> Any:
        """The scoring pass."""
        self._use("appo")
        with torch.no_grad():
            return score_group(self.model, self.prompt, self.responses, capture_layers=layers)

    def weights(self, scores: Any) -> Any:
        """Token weights with the paper's settings, log-probabilities in tiles."""
        log_probs = log_probs_at(self.model, scores)
        return token_weights(scores.frame_attention_GNF, scores.mask_GN, self.rewards_G, log_probs)

    def scored_update(self) -> None:
        """Scoring pass with capture, weights, update: where the loss reads old log-probabilities."""
        self.weights(self.score(CAPTURE_LAYERS))
        self.packed(grad=True)

    @staticmethod
    def _loss(log_probs: Tensor, advantages: Tensor) -> Tensor:
        return -((log_probs - log_probs.detach()).exp() * advantages).sum()

    def _use(self, attention: str) -> None:
        text_config = self.model.config.get_text_config()
        # The internal attribute: the setter would change the vision tower's kernel too.
        text_config._attn_implementation_internal = "sdpa" if attention == "appo" else attention
        if attention == "appo":
            use_appo_attention(self.model)


# --- the plan of a cell, within memory and time ----------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """How much a single measurement may use."""

    memory: int
    seconds: float


def activation_bytes(shape: ModelShape, cell: Cell, rows: int, what: str, *, size: int, checkpointing: bool) -> float:
    """Rough bytes a call over some rows holds at its peak. Only decides what is split or skipped."""
    length = cell.prompt + cell.response
    layer = rows * length * (14 * shape.hidden + 4 * shape.intermediate) * size
    square = rows * shape.heads * length**2
    if what in ("published/forward", "published/generate"):
        return 2 * layer + square * (shape.layers * size + 2 * size + 4)
    eager = square * (4 + 2 * size) if what == "published/update" else 0.0
    if not what.endswith("update"):
        return 2 * layer
    kept = rows * length * shape.hidden * size if checkpointing else layer + eager
    return shape.layers * kept + layer + eager


class CellPlan:
    """Which measurements of a cell are made, with how many rows at a time, and which are skipped and why."""

    def __init__(self, update: GroupUpdate, cell: Cell, args: argparse.Namespace, limits: Limits) -> None:
        self._update, self._cell, self._args, self._limits = update, cell, args, limits
        self.skipped: dict[str, str] = {}
        self.rows_per_call: dict[str, int] = {}
        self.timed: dict[str, harness.Timed] = {}
        for variant in ("stock", "published"):
            if variant in args.variants:
                self._add_rows(variant)
        if "ours" in args.variants:
            self._add("ours/generate", update.generate_once_read)
            self._add("ours/forward", partial(update.packed, grad=False))
            self._add("ours/update", partial(update.packed, grad=True))
        if "capture" in args.variants:
            self._add("capture/update", update.weighted)
        if "scored" in args.variants:
            self._add_scored()

    def _add(self, name: str, call: Callable[[], Any], rounds: int | None = None) -> None:
        self.timed[name] = harness.Timed(call, rounds)

    def _add_rows(self, variant: str) -> None:
        for phase in PHASES:
            name = f"{variant}/{phase}"
            rows = self._fitting_rows(name)
            if not rows:
                self.skip(name, f"one row would need more than {self._limits.memory / harness.GB:.1f} GB")
                continue
            self.rows_per_call[name] = rows
            self._add(name, self._rows_call(variant, phase, rows), rounds=1 if variant == "published" else None)

    def _rows_call(self, variant: str, phase: str, rows: int) -> Callable[[], Any]:
        attention = "eager" if variant == "published" else "sdpa"
        # Attention is read while generating, or in a scoring pass; the update itself needs none.
        attentions = variant == "published" and phase != "update"
        if phase == "generate":
            return partial(self._update.generate, attention, rows_per_call=rows, attentions=attentions)
        return partial(self._update.rows, attention, grad=phase == "update", rows_per_call=rows, attentions=attentions)

    def _fitting_rows(self, name: str) -> int:
        shape, size = SHAPES[self._args.model], self._args.dtype.itemsize
        for rows in range(self._cell.group, 0, -1):
            need = activation_bytes(
                shape, self._cell, rows, name, size=size, checkpointing=self._args.gradient_checkpointing
            )
            if need <= self._limits.memory:
                return rows
        return 0

    def _add_scored(self) -> None:
        state: dict[str, Any] = {}

        def score_and_capture() -> None:
            state["scores"] = self._update.score(CAPTURE_LAYERS)

        self._add("scored/score", partial(self._update.score, 0))
        self._add("scored/score+capture", score_and_capture)
        self._add("scored/weights", lambda: self._update.weights(state["scores"]))

    def skip(self, name: str, why: str) -> None:
        """Leave a measurement out, and say so now and in the JSON."""
        self.skipped[name] = why
        self.timed.pop(name, None)
        print(f"{self._cell}: {name} skipped: {why}", file=sys.stderr, flush=True)

    def skip_what_takes_too_long(self) -> None:
        """Time one stock forward pass, and leave out what would exceed the budget by its measure."""
        if "stock/forward" not in self.timed:
            return
        probe = harness.Timed(self.timed["stock/forward"].call)
        probe.measure(self._args.device)
        # The processor's clock: a busy machine is no reason to skip.
        forward = min(probe.seconds + probe.processor_seconds) if self._args.device == "cpu" else probe.median
        # Eager attention is slower than SDPA by about 1.6 at 700 tokens and 3.7 at 2200.
        eager = 1.0 + (self._cell.prompt + self._cell.response) / 800
        # A decoding step reads all weights for one token a row: some 40 tokens' worth.
        decoding = 40 * self._cell.response / (self._cell.prompt * self._cell.group)
        expected = {
            "stock/generate": (1 + decoding) * forward,
            "published/generate": (eager + decoding) * forward,
            "stock/forward": forward,
            "stock/update": 3.5 * forward,
            "published/forward": eager * forward,
            "published/update": 3.5 * eager * forward,
        }
        for name, seconds in expected.items():
            if name in self.timed and seconds > self._limits.seconds:
                self.skip(name, f"about {seconds:.0f} s expected, --budget is {self._limits.seconds:.0f} s")
