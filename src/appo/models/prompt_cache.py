"""Generation behind shared prompts: the keys and values of a prompt exist once, however many responses continue it.

transformers repeats a prompt's cache for each of its G responses, and copies the whole cache of a layer for each token.
Here a token attends to [prompt | own response] where they lie, with one softmax over both; the queries of a group share
one product with the prompt's keys. Source: Hydragen (arXiv 2402.05099). Not in the paper.

Shape suffixes: Q prompts, G responses to each, B = Q G rows, K key/value heads, R query heads of each, A = K R,
S = G R, P prompt positions (padded), N tokens of responses so far, L = P + N, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import sdpa_mask

from appo.models.frame_attention import full_precision

_NAME = "appo_prompt_cache"
ROOM = 32  # tokens of the first buffer; it doubles when it is full
_cache: ContextVar[Cache] = ContextVar(_NAME)


class PromptLayer(DynamicLayer):
    """One layer's cache: the prompts as they were read, and the responses in buffers that are seldom copied.

    Attributes:
        attended: whether :func:`_attention` has used it. Another attention function would not see the prompt.
    """

    keys: Any
    values: Any

    def __init__(self, read: DynamicLayer, responses: int) -> None:
        super().__init__()
        self.prompt_QKPD, self.prompt_values_QKPD = read.keys, read.values
        self.responses, self.tokens, self.attended = responses, 0, False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append one token, (B, K, 1, D) each, to ``keys`` and ``values``, (Q, K, G, N or more, D); returns it."""
        new = [torch.unflatten(x, 0, (-1, self.responses)).transpose(1, 2) for x in (key_states, value_states)]
        if self.keys is None:
            self.keys, self.values = (torch.empty_like(x).repeat(1, 1, 1, ROOM, 1) for x in new)
            self.is_initialized = True
        elif self.tokens == self.keys.shape[3]:
            self.keys, self.values = (torch.cat([x, torch.empty_like(x)], dim=3) for x in (self.keys, self.values))
        for buffer, x_QKG1D in zip((self.keys, self.values), new, strict=True):
            buffer[:, :, :, self.tokens : self.tokens + 1] = x_QKG1D
        self.tokens += 1
        return key_states, value_states

    def get_seq_length(self) -> int:
        """L."""
        return int(self.prompt_QKPD.shape[2]) + self.tokens


@contextmanager
def repeated_prompts(model: PreTrainedModel, cache: Cache, prompts: int, responses: int) -> Iterator[None]:
    """Have `model` continue each prompt of a cache so many times, inside; the cache is changed.

    Where a layer does more than attend to all that precedes (sliding windows, recurrent states, keys of another layer),
    or the model runs on another kernel than SDPA, the cache is repeated as transformers does.

    Args:
        model: the Hugging Face model below all wrappers.
        cache: what it has read, one row a prompt.
        prompts: Q.
        responses: G.

    Raises:
        RuntimeError: the model has attended by a function of its own, so that its responses know no prompt.
    """
    text_config = model.config.get_text_config()
    base = text_config._attn_implementation
    attends = all(type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers)
    if base not in ("sdpa", "appo_sdpa") or not attends:
        # Not `batch_repeat_interleave`, which layers of linear attention lack.
        cache.reorder_cache(torch.arange(prompts).repeat_interleave(responses))
        yield
        return
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    cache.layers = [PromptLayer(layer, responses) for layer in cache.layers]
    text_config._attn_implementation_internal = _NAME
    token = _cache.set(cache)
    try:
        yield
    finally:
        _cache.reset(token)
        text_config._attn_implementation_internal = base
    if not all(layer.attended for layer in cache.layers):
        raise RuntimeError(f"{model.config.model_type} attends by a function of its own, which sees no shared prompt")


def _attention(
    module: nn.Module,
    query_BA1D: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers for one query a row, (B, 1, A, D); keys and values are in the cache."""
    layer: Any = _cache.get().layers[module.layer_idx]
    layer.attended = True
    (_, K, P, D), G, N = layer.prompt_QKPD.shape, layer.responses, layer.tokens
    group = (G, query_BA1D.shape[1] // K)
    query_BKRD = torch.unflatten(query_BA1D[:, :, 0], 1, (K, -1))
    query_QKGRD = torch.unflatten(query_BKRD, 0, (-1, G)).transpose(1, 2)
    query_QKSD = query_QKGRD.flatten(2, 3) * (D**-0.5 if scaling is None else scaling)
    shared_QKGRP = torch.unflatten(query_QKSD @ layer.prompt_QKPD.mT, 2, group)
    own_QKGRN = torch.unflatten(query_QKSD, 2, group) @ layer.keys[:, :, :, :N].mT
    scores_QKGRL = torch.cat([shared_QKGRP, own_QKGRN], dim=4)
    if attention_mask is not None:  # bool (B, 1, 1, L), True where visible
        visible_Q1G1L = torch.unflatten(attention_mask, 0, (-1, G)).transpose(1, 2)
        scores_QKGRL.masked_fill_(~visible_Q1G1L, -torch.inf)
    probs_QKGRL = full_precision(scores_QKGRL).softmax(dim=4).to(layer.values.dtype)
    shared_QKSD = probs_QKGRL[..., :P].flatten(2, 3) @ layer.prompt_values_QKPD
    own_QKGRD = probs_QKGRL[..., P:] @ layer.values[:, :, :, :N]
    out_QKGRD = torch.unflatten(shared_QKSD, 2, group) + own_QKGRD
    return out_QKGRD.transpose(1, 2).flatten(0, 1).flatten(1, 2)[:, None], None
