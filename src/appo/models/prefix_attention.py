"""Attention of a packed group: each response as if it stood alone behind the shared prefix.

Where torch's flash attention runs (:func:`merges`), a segment's queries attend to the prefix and to their own segment
in two calls, merged by their log-sum-exps, and the prefix's keys exist once. Elsewhere the model's own kernel runs over
G rows [prefix | segment], which copies the prefix's keys for each response (and, with a mask, for each query head).

Shape suffixes: G segments, N tokens of one (padded), n tokens of all, S positions of the shared prefix, T = S + n,
L = S + N; A attention heads, K key/value heads, X either of them, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Arguments of transformers' attention functions that flash attention does not know.
UNKNOWN = ("position_bias", "softcap", "s_aux")


@dataclass(frozen=True)
class PrefixLayout:
    """Where the parts of a packed group lie: [shared prefix | segment 1 | .. | segment G]. A forward argument too.

    Attributes:
        layers: decoder layers that have attended by this layout. An attention function that does not know it would
            ignore it and let responses see each other, so check after the forward pass (:meth:`assert_kept`).
    """

    prefix: int  # S, positions every segment sees
    index_GN: Tensor  # int64 (G, N), packed position of each segment's tokens (any valid position where padded)
    mask_GN: Tensor  # bool (G, N), True on real segment tokens
    decoder_layers: int  # of the model, all of which must attend by this layout
    layers: set[int] = field(default_factory=set)

    def assert_kept(self) -> None:
        """Raise RuntimeError if the forward pass this layout was given to did not go through `appo_attention`."""
        if len(self.layers) < self.decoder_layers:
            raise RuntimeError(
                "a packed group went through an attention function that ignores its layout: run the model inside "
                "`appo_attention(model)`, or call `use_appo_attention(model)` once"
            )

    @property
    def longest(self) -> int:
        """L, positions of the longest row [prefix | segment]."""
        return self.prefix + self.mask_GN.shape[1]

    def segments(self, x_1XT: Tensor) -> Tensor:
        """(G, X, N, ..): the segments of a packed (1, X, T, ..), one a row."""
        return x_1XT[0][:, self.index_GN].transpose(0, 1)

    @cached_property
    def places(self) -> tuple[Tensor, ...]:
        """Row and column of each real token, in the order in which segments are packed."""
        return self.mask_GN.nonzero(as_tuple=True)

    def packed(self, x_GXN: Tensor) -> Tensor:
        """(1, X, n, ..), the inverse of :meth:`segments`, without the prefix."""
        row_n, column_n = self.places
        return x_GXN.transpose(0, 1)[:, row_n, column_n][None]

    def rows(self, x_1XT: Tensor) -> Tensor:
        """(G, X, L, ..): each segment behind a copy of the prefix."""
        prefix_GXS = x_1XT[:, :, : self.prefix].expand(len(self.index_GN), -1, -1, -1)
        return torch.cat([prefix_GXS, self.segments(x_1XT)], dim=2)

    def visible_11NL(self, window: int | None) -> Tensor:
        """bool (1, 1, N, L): a segment's query sees the prefix and its own segment, as if they were a row."""
        query_N = torch.arange(self.prefix, self.longest, device=self.mask_GN.device)
        return causal(query_N, self.longest, window)[None, None]

    def masks(self, window: int | None, dtype: torch.dtype | None) -> tuple[Tensor | None, Tensor]:
        """Of the prefix, (1, 1, S, S) or None where a kernel's own causal mask will do; of the segments, (G, 1, N, L).

        Args:
            window: keys that a query may look back; None: all.
            dtype: None: boolean masks; else those of a kernel that adds its mask and has no causal one of its own.
        """
        prefix_11SS = None
        if dtype is not None or (window is not None and window < self.prefix):
            prefix_11SS = causal(torch.arange(self.prefix, device=self.mask_GN.device), self.prefix, window)[None, None]
        segments_G1NL = self.visible_11NL(window).expand(len(self.mask_GN), -1, -1, -1)
        if dtype is None or prefix_11SS is None:
            return prefix_11SS, segments_G1NL
        return additive(prefix_11SS, dtype), additive(segments_G1NL, dtype)


def causal(query_C: Tensor, keys: int, window: int | None) -> Tensor:
    """bool (.., C, keys): queries at these positions of a row see what precedes, at most `window` keys; None: all."""
    distance = query_C[..., None] - torch.arange(keys, device=query_C.device)
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def additive(visible: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """0 where visible, -inf elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


# -- the prefix copied: any kernel ---------------------------------------------------------------------------------


def copied_prefix_attention(
    kernel: Callable[..., Any],
    qkv: tuple[Tensor, Tensor, Tensor],
    layout: PrefixLayout,
    masks: tuple[Tensor | None, Tensor | None],
) -> Tensor:
    """(1, T, A, D): the prefix causally; each segment over a copy of the prefix and itself.

    ``kernel`` takes query, key, value and mask, and returns what transformers' attention functions return.
    """
    query_1ATD, key_1KTD, value_1KTD = qkv
    prefix_1SAD = kernel(*(x[:, :, : layout.prefix] for x in qkv), masks[0])[0]
    own_GNAD = kernel(layout.segments(query_1ATD), layout.rows(key_1KTD), layout.rows(value_1KTD), masks[1])[0]
    return torch.cat([prefix_1SAD, own_GNAD[layout.places][None]], dim=1)


# -- no copies: flash attention of torch, merged by log-sum-exps ---------------------------------------------------


def merges(qkv: tuple[Tensor, Tensor, Tensor], layout: PrefixLayout, kwargs: dict[str, Any]) -> bool:
    """Whether :func:`merged_attention` can run: no dropout, no window that is felt, tensors that the kernel takes."""
    query, key, value = qkv
    window = kwargs.get("sliding_window")
    if (
        layout.prefix == 0
        or kwargs.get("dropout")
        or (window is not None and window < layout.longest)
        or any(kwargs.get(name) is not None for name in UNKNOWN)
        or not query.shape[-1] == key.shape[-1] == value.shape[-1]
    ):
        return False
    if query.device.type == "cpu":
        return bool(torch.backends.cuda.flash_sdp_enabled())  # type: ignore[no-untyped-call]  # of all devices
    if query.device.type != "cuda" or query.shape[-1] % 8:
        return False
    params = torch.backends.cuda.SDPAParams(*_as_autocast(qkv), None, 0.0, False, True)
    return torch.backends.cuda.can_use_flash_attention(params)


def merged_attention(qkv: tuple[Tensor, Tensor, Tensor], layout: PrefixLayout, scaling: float) -> Tensor:
    """(1, T, A, D): attention of a packed group from q (1, A, T, D), k and v (1, K, T, D). Not in the paper; exact."""
    merged: Tensor = _MergedAttention.apply(*_as_autocast(qkv), layout, scaling)  # type: ignore[no-untyped-call]
    return merged


def segment_attention(
    qkv: tuple[Tensor, Tensor, Tensor], layout: PrefixLayout, scaling: float
) -> tuple[Tensor, Tensor]:
    """Output (1, A, n, D) and log-sum-exp (1, A, n) of the segments' queries over the prefix and their own segment."""
    S, (query, key, value) = layout.prefix, _as_autocast(qkv)
    prefix_1AnD, prefix_lse = _attend((query[:, :, S:], key[:, :, :S], value[:, :, :S]), False, scaling)
    # Padding stands behind a segment's real tokens: causality hides it.
    own_GAND, own_lse = _attend([layout.segments(x) for x in (query, key, value)], True, scaling)
    own_lse = layout.packed(own_lse)
    share = torch.sigmoid(prefix_lse - own_lse)[..., None]  # of the prefix in the softmax over both
    merged = prefix_1AnD * share + layout.packed(own_GAND) * (1 - share)
    return merged.to(query.dtype), torch.logaddexp(prefix_lse, own_lse)


class _MergedAttention(torch.autograd.Function):
    """Backward as ring attention does it: each part's backward kernel, given the merged output and log-sum-exp, makes
    the probabilities of the whole row, and so its own part of the gradients."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: PrefixLayout, scaling: float) -> Tensor:
        prefix = [x[:, :, : layout.prefix] for x in (query, key, value)]
        prefix_1ASD, prefix_lse = _attend(prefix, True, scaling)
        own_1AnD, own_lse = segment_attention((query, key, value), layout, scaling)
        out_1TAD = torch.cat([prefix_1ASD.transpose(1, 2), own_1AnD.transpose(1, 2)], dim=1)
        ctx.save_for_backward(query, key, value, out_1TAD, torch.cat([prefix_lse, own_lse], dim=2))
        ctx.layout, ctx.scaling = layout, scaling
        return out_1TAD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_1TAD: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out_1TAD, lse_1AT = ctx.saved_tensors
        layout, S, scaling = ctx.layout, ctx.layout.prefix, ctx.scaling
        # What a backward kernel reads of its queries (gradient, output, log-sum-exp, query), and of its keys.
        of_query = (grad_1TAD.transpose(1, 2), out_1TAD.transpose(1, 2), lse_1AT, query)
        of_prefix = [x[:, :, :S] for x in (key, value)]
        prefix = _attend_backward([x[:, :, :S] for x in of_query], of_prefix, True, scaling)
        across = _attend_backward([x[:, :, S:] for x in of_query], of_prefix, False, scaling)
        grad_GAND, *rest = (layout.segments(x) for x in of_query)
        grad_GAND = grad_GAND.masked_fill(~layout.mask_GN[:, None, :, None], 0.0)  # padding repeats a real token
        of_own = [layout.segments(x) for x in (key, value)]
        within = _attend_backward((grad_GAND, *rest), of_own, True, scaling)
        own = [layout.packed(x) for x in within]
        grad_query = torch.cat([prefix[0], across[0] + own[0]], dim=2)
        grad_key, grad_value = (torch.cat([prefix[i] + across[i], own[i]], dim=2) for i in (1, 2))
        return grad_query, grad_key, grad_value, None, None


def _attend(qkv: Sequence[Tensor], is_causal: bool, scaling: float) -> tuple[Tensor, Tensor]:
    """Output (B, A, Q, D) and log-sum-exp (B, A, Q). Query heads share key heads without copies."""
    aten: Any = torch.ops.aten
    on_cpu = qkv[0].device.type == "cpu"
    flash = aten._scaled_dot_product_flash_attention_for_cpu if on_cpu else aten._scaled_dot_product_flash_attention
    out, lse, *_ = flash(*qkv, 0.0, is_causal, scale=scaling)
    return out, lse


def _attend_backward(
    of_query: Sequence[Tensor], of_keys: Sequence[Tensor], is_causal: bool, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value. The output and log-sum-exp may be those of more keys than are given."""
    aten: Any = torch.ops.aten
    (grad, out, lse, query), (key, value) = of_query, of_keys
    tensors = (grad, query, key, value, out, lse.contiguous())
    if query.device.type == "cpu":
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, 0.0, is_causal, scale=scaling)
    else:  # the arguments with which torch's own ring attention calls it; the seed is unread, for there is no dropout
        seed = torch.zeros(2, dtype=torch.uint64, device=query.device)
        rest = (None, None, query.shape[2], key.shape[2], 0.0, is_causal, seed, seed)
        gradients = aten._scaled_dot_product_flash_attention_backward(*tensors, *rest, scale=scaling)
    return gradients  # type: ignore[no-any-return]


def _as_autocast(qkv: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """As autocast does it for scaled_dot_product_attention, which aten's own functions do not go through."""
    kind = qkv[0].device.type
    if not torch.is_autocast_enabled(kind):
        return qkv
    dtype = torch.get_autocast_dtype(kind)
    query, key, value = (x if x.dtype == torch.float64 else x.to(dtype) for x in qkv)
    return query, key, value
