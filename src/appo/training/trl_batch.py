"""TRL's batch dictionaries: rows <-> whole groups, and model calls that carry the videos of their rows.

TRL shuffles and splits whatever has a first dimension. Handing it groups instead of rows keeps each group, and the one
copy of its pixels, together through both.

Shape suffixes: B rows = Q groups x G responses, N response tokens (padded).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from appo.models.families import family_of
from appo.models.prefix_packing import IGNORED, pack_group
from appo.models.prompt import Prompt
from appo.types import PerceptionWeights


def by_group(batch: dict[str, Any], responses: int) -> dict[str, Any]:
    """Every (B, ...) tensor as (Q, G, ...); scalars and None as they are."""
    return {
        key: value.view(-1, responses, *value.shape[1:]) if isinstance(value, Tensor) and value.ndim else value
        for key, value in batch.items()
    }


def by_row(batch: dict[str, Any]) -> dict[str, Any]:
    """Undo :func:`by_group`."""
    return {
        key: value.flatten(0, 1) if isinstance(value, Tensor) and value.ndim else value for key, value in batch.items()
    }


def batch_weights(
    weights_Q: Sequence[PerceptionWeights | None], mask_BN: Tensor, gather: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, dict[str, tuple[float, float]]]:
    """The token weights of all groups as one float32 (B, N) tensor, 1 where a group has none, and their metrics.

    Each metric is a sum and what it is divided by (tokens, or groups with frames), for a mean over all processes.

    Args:
        weights_Q: one entry a group (its N may be shorter than the batch's); None: nothing applies to it.
        mask_BN: (B, N), non-zero on response tokens.
        gather: concatenates a (1, 2) tensor over processes. If it is given, weights are divided by their mean over the
            response tokens of all processes (ours, method.md); the metrics are of the weights before that.
    """
    mask_QGN = mask_BN.bool().view(len(weights_Q), -1, mask_BN.shape[1])
    weights_QGN = torch.ones(mask_QGN.shape, device=mask_BN.device)
    chosen_QGN = torch.zeros_like(mask_QGN)
    crucial = [int(weights.crucial_F.sum()) for weights in weights_Q if weights is not None]
    for q, weights in enumerate(weights_Q):
        if weights is not None:
            weights_QGN[q, :, : weights.weights_GN.shape[1]] = weights.weights_GN
            chosen_QGN[q, :, : weights.chosen_GN.shape[1]] = weights.chosen_GN
    tokens = float(mask_QGN.sum())
    metrics = {
        "mean_weight": (float((weights_QGN * mask_QGN).sum()), tokens),
        "chosen_share": (float((chosen_QGN & mask_QGN).sum()), tokens),
        "crucial_frames": (float(sum(crucial)), float(len(crucial))),
        "groups_without_crucial_frames": (float(crucial.count(0)), float(len(crucial))),
    }
    if gather is not None:
        total, count = gather(torch.stack([(weights_QGN * mask_QGN).sum(), mask_QGN.sum()])[None]).sum(dim=0)
        weights_QGN = torch.where(mask_QGN & (total > 0), weights_QGN * (count / total), weights_QGN)
    return weights_QGN.flatten(0, 1), metrics


class SeeingModel:
    """A model for TRL to call with text rows only, which adds the vision inputs that belong to them.

    TRL calls it on consecutive slices of the batch's rows, so a counter says which rows a call is about.
    """

    def __init__(self, model: Any, prompts: Sequence[Prompt], responses: int, base: Any) -> None:
        self._model, self._prompts, self._responses, self._family = model, prompts, responses, family_of(base)
        self._row = 0

    def __call__(self, **inputs: Any) -> Any:
        ids: Tensor = inputs["input_ids"]
        rows = range(self._row, self._row + len(ids))
        self._row += len(ids)
        vision = self._family.vision_inputs([self._prompts[row // self._responses].to(ids.device) for row in rows])
        return self._model(**inputs, **vision, mm_token_type_ids=self._family.token_types(ids))


class PackedModel:
    """The same for whole groups packed behind one prompt each: prompt and video are seen once per group. Exact.

    What TRL reads of a call (log-probabilities and entropies of labelled tokens) is put back in its rows. With
    ``rows_per_chunk`` a group is packed in chunks of so many responses, and what a chunk would keep for the backward
    pass is recomputed there: memory for the prompt's forward pass once more a chunk, and once more in backward.
    """

    def __init__(
        self, model: Any, prompts: Sequence[Prompt], responses: int, base: Any, rows_per_chunk: int = 0
    ) -> None:
        self._model, self._prompts, self._responses, self._base = model, prompts, responses, base
        self._chunk = rows_per_chunk or responses
        self._group = 0

    def __call__(self, input_ids: Tensor, labels: Tensor, **kwargs: Any) -> Any:
        del kwargs["attention_mask"]
        emitted_BL = labels[:, 1:] != IGNORED
        log_probs, entropies = [], []
        for start in range(0, len(input_ids), self._responses):
            prompt = self._prompts[self._group].to(input_ids.device)
            self._group += 1
            for first in range(start, start + self._responses, self._chunk):
                rows = slice(first, min(first + self._chunk, start + self._responses))
                responses = [row[kept] for row, kept in zip(labels[rows, 1:], emitted_BL[rows], strict=True)]
                chunk_log_probs, chunk_entropy = self._call(prompt, responses, kwargs)
                log_probs.append(chunk_log_probs)
                entropies.append(chunk_entropy)
        return SimpleNamespace(
            log_probs=_in_rows(log_probs, emitted_BL),
            entropy=None if entropies[0] is None else _in_rows(entropies, emitted_BL),
        )

    def _call(self, prompt: Prompt, responses: list[Tensor], kwargs: dict[str, Any]) -> Any:
        """Log-probabilities and entropies (or None) of the responses' tokens, one after another.

        Where no token is left (all responses were truncated and masked) the prompt runs alone, with one position that
        emits nothing: processes that share gradients or parameters must all go through the layers, and back.
        """
        is_empty = not any(len(response) for response in responses)
        packed = pack_group(self._base, prompt, [prompt.ids_1P[0, -1:]] if is_empty else responses)
        labels_1T = torch.full_like(packed.labels_1T, IGNORED) if is_empty else packed.labels_1T
        emitting_1T = labels_1T != IGNORED

        def run() -> tuple[Tensor, Tensor | None]:
            outputs = self._model(**packed.inputs, shift_labels=labels_1T, **kwargs)
            packed.layout.assert_kept()
            return outputs.log_probs[emitting_1T], None if outputs.entropy is None else outputs.entropy[emitting_1T]

        if self._chunk < self._responses and torch.is_grad_enabled():
            return checkpoint(run, use_reentrant=False)
        return run()


def _in_rows(parts: Sequence[Tensor], emitted_BL: Tensor) -> Tensor:
    """Values of emitted tokens, group after group, at their places in (B, L - 1); 0 elsewhere."""
    values = torch.cat(list(parts))
    return values.new_zeros(emitted_BL.shape).masked_scatter(emitted_BL, values)
