"""One attention function for the text model: frame attention out of any kernel, and one prefix shared by a group.

The model runs its own kernel (SDPA, flash attention, eager, flex) unchanged; beside it, in the last layers only and
only for the queries that emit response tokens, attention is reduced at once to frames. With a :class:`PrefixLayout`, a
group packed behind one prompt is attended as if each response stood alone behind it (`prefix_attention`); a layer's
sliding window then counts the positions of that row, not those of the packed one.

Shape suffixes: B rows, A attention heads, K key/value heads, L input positions, N response tokens, C queries of one
chunk, D head size, F frames, f as many of them as D; packed: G segments, S positions of the shared prefix, n tokens of
all segments, T = S + n.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from appo.models.families import family_of
from appo.models.frame_tokens import frame_pool
from appo.models.prefix_attention import (
    UNKNOWN,
    PrefixLayout,
    additive,
    causal,
    copied_prefix_attention,
    merged_attention,
    merges,
    segment_attention,
)

# Attention probabilities held at once while capturing, in elements (float32): 16M is 64 MB.
CAPTURE_BUDGET = 16 * 2**20


@dataclass
class FrameCapture:
    """What to capture, and what has been captured so far. Pass it to the model's forward as ``frame_capture``.

    Attributes:
        query_chunk: queries whose attention is held at once; None: as many as :data:`CAPTURE_BUDGET` allows.
        captured: layer index -> float32 (B, N, F), filled during the forward pass.
    """

    query_BN: Tensor  # int64 (B, N), input position that emits each response token (any valid position where padded)
    pool_BLF: Tensor  # float32 (B, L, F), averages over the tokens of a frame (see `frame_pool`)
    layers: frozenset[int]  # indices of the decoder layers to average
    query_chunk: int | None = None
    captured: dict[int, Tensor] = field(default_factory=dict)

    def lacks(self, layer: int) -> bool:
        """Whether a layer is to be captured and has not been."""
        return layer in self.layers and layer not in self.captured

    @property
    def attention_BNF(self) -> Tensor:
        """float32 (B, N, F): attention averaged over frame tokens, heads and the captured layers (paper step 1).

        Raises:
            RuntimeError: a layer was not captured: the forward pass did not run inside the context.
        """
        missing = sorted(self.layers - self.captured.keys())
        if missing:
            raise RuntimeError(
                f"no attention was captured in layers {missing}: run the model inside `capture_frame_attention` and "
                "pass it `frame_capture=capture`"
            )
        return torch.stack([self.captured[layer] for layer in sorted(self.captured)]).mean(dim=0)


@contextmanager
def appo_attention(model: PreTrainedModel) -> Iterator[None]:
    """Run the text model's attention through this module; on leaving, the model is as it was.

    Without ``frame_capture`` or ``prefix_layout`` among the forward's arguments nothing changes but the name.

    Raises:
        ValueError: the text model runs on a kernel whose mask transformers does not know.
    """
    text_config = model.config.get_text_config()
    base = text_config._attn_implementation
    # The internal attribute, not set_attn_implementation: the setter walks every module, and sets the vision tower too.
    text_config._attn_implementation_internal = _register(base)
    try:
        yield
    finally:
        text_config._attn_implementation_internal = base


def use_appo_attention(model: PreTrainedModel) -> None:
    """The same for good: a backward pass with gradient checkpointing calls the attention again, outside any context.

    Raises:
        ValueError: the text model runs on a kernel whose mask transformers does not know.
    """
    text_config = model.config.get_text_config()
    text_config._attn_implementation_internal = _register(text_config._attn_implementation)


@contextmanager
def capture_frame_attention(
    model: PreTrainedModel,
    frame_BL: Tensor,
    query_BN: Tensor,
    *,
    frames: int,
    layers: int = 3,
    query_chunk: int | None = None,
) -> Iterator[FrameCapture]:
    """Let the text model's attention fill a :class:`FrameCapture`; on leaving, the model is as it was. Source: step 1.

    Inside, run ``model(**inputs, frame_capture=capture)``. Logits are those of the model's own kernel, bit for bit.

    Args:
        model: a video language model of a known family.
        frame_BL: int64 (B, L), frame of each input position, -1 where none.
        query_BN: int64 (B, N), input position that emits each response token.
        frames: F.
        layers: how many of the last decoder layers that attend to frames to average.
        query_chunk: queries held at once (memory only; the result does not depend on it beyond rounding).

    Raises:
        ValueError: ``layers`` is not in 1..number of such layers, the model has no family, or the text model runs on
            a kernel whose mask transformers does not know.
    """
    capture = FrameCapture(
        query_BN=query_BN,
        pool_BLF=frame_pool(frame_BL, frames),
        layers=family_of(model).captured_layers(layers),
        query_chunk=query_chunk,
    )
    with appo_attention(model):
        yield capture


def _register(base: str) -> str:
    """Register (once) an attention function that wraps kernel ``base``, and its mask under the same name.

    Without the mask registered beside it, transformers silently passes no mask at all.
    """
    if base.startswith("appo_"):
        return base
    if base not in ALL_MASK_ATTENTION_FUNCTIONS or (base != "eager" and base not in ALL_ATTENTION_FUNCTIONS):
        raise ValueError(
            f'frame attention cannot be captured on the attention implementation "{base}", whose mask transformers '
            'does not know: load the model with attn_implementation="sdpa" (or "flash_attention_2")'
        )
    name = f"appo_{base}"
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(name, _wrapped(base))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def _wrapped(base: str) -> Callable[..., Any]:
    """Wrap an attention function of transformers: run it as it is; capture, or share a prefix, when asked."""

    def attention(
        module: nn.Module,
        query_BALD: Tensor,
        key_BKLD: Tensor,
        value_BKLD: Tensor,
        attention_mask: Any,
        frame_capture: FrameCapture | None = None,
        prefix_layout: PrefixLayout | None = None,
        **kwargs: Any,
    ) -> Any:
        layer: Any = module.layer_idx
        qkv = (query_BALD, key_BKLD, value_BKLD)
        kernel = partial(_kernel(base, module), module, **kwargs)
        scaling, window = kwargs.get("scaling") or query_BALD.shape[-1] ** -0.5, kwargs.get("sliding_window")
        # Once: gradient checkpointing comes by a second time.
        capture = frame_capture if frame_capture is not None and frame_capture.lacks(layer) else None
        if capture is not None and (unknown := [name for name in UNKNOWN if kwargs.get(name) is not None]):
            raise ValueError(f"frame attention cannot be captured in layers with {unknown[0]}: set method to dapo")
        if prefix_layout is None:
            if capture is not None:
                capture.captured[layer] = _rows_capture(kernel, qkv, attention_mask, scaling, window, capture)
            return kernel(*qkv, attention_mask)
        prefix_layout.layers.add(layer)
        if base == "sdpa" and merges(qkv, prefix_layout, kwargs):
            if capture is not None:
                capture.captured[layer] = capture_by_one_hot(qkv, prefix_layout, scaling, capture)
            return merged_attention(qkv, prefix_layout, scaling), None
        if capture is not None:
            capture.captured[layer] = capture_by_scores(qkv, prefix_layout, scaling, window, capture)
        # Flash attention's own mask, with fewer queries than keys, lets the last query see the last key: it needs none.
        masks = (None, None) if "flash" in base else prefix_layout.masks(window, _additive_dtype(base, query_BALD))
        return copied_prefix_attention(kernel, qkv, prefix_layout, masks), None

    return attention


def _kernel(base: str, module: nn.Module) -> Callable[..., Any]:
    """The attention function that a layer would run; each of transformers' modelling files has an eager one."""
    files = [sys.modules[cls.__module__] for cls in type(module).__mro__]
    eager = (file.eager_attention_forward for file in files if hasattr(file, "eager_attention_forward"))
    kernel: Callable[..., Any] = next(eager) if base == "eager" else ALL_ATTENTION_FUNCTIONS[base]
    return kernel


def _additive_dtype(base: str, query: Tensor) -> torch.dtype | None:
    """Of the mask of kernels that add it; the others take a boolean one."""
    return query.dtype if base == "eager" or "flex" in base else None


# -- the capture ---------------------------------------------------------------------------------------------------
#
# Two ways, measured by `benchmarks/capture_cost.py`. One-hot: the kernel attends once more with V := one-hot(frame), so
# that its output is the attention to each frame. Scores: softmax of Q K^T in float32, for the response's queries alone.
# Where prefix and segments are merged, one-hot needs no copy of a key and no score in memory, and is faster in every
# type. A kernel that takes a mask would copy keys per query head for it, and rows would attend with all their queries:
# they keep to scores, unless the kernel hides what it masks (flex).


@torch.no_grad()
def _rows_capture(
    kernel: Callable[..., Any],
    qkv: tuple[Tensor, Tensor, Tensor],
    attention_mask: Any,
    scaling: float,
    window: int | None,
    capture: FrameCapture,
) -> Tensor:
    """(B, N, F) of ordinary rows: from scores, or one-hot where the kernel hides what it masks (flex's block mask)."""
    query_BALD, key_BKLD, _ = qkv
    if attention_mask is None or isinstance(attention_mask, Tensor):
        return _frame_attention(query_BALD, key_BKLD, attention_mask, scaling, window, capture)

    def attend(values_BLD: Tensor) -> Tensor:
        return kernel(query_BALD, key_BKLD, values_BLD[:, None].expand_as(key_BKLD), attention_mask)[0]  # type: ignore[no-any-return]

    return _at(one_hot_attention(attend, capture.pool_BLF, key_BKLD), capture.query_BN)


@torch.no_grad()
def capture_by_one_hot(
    qkv: tuple[Tensor, Tensor, Tensor], layout: PrefixLayout, scaling: float, capture: FrameCapture
) -> Tensor:
    """(G, N, F) of a packed group, one-hot: frames are in the prefix, so all segments have the same values."""
    query, key, _ = qkv
    pool_1TF = functional.pad(capture.pool_BLF[:1, : layout.prefix], (0, 0, 0, key.shape[2] - layout.prefix))

    def attend(values_1TD: Tensor) -> Tensor:
        return segment_attention((query, key, values_1TD[:, None].expand_as(key)), layout, scaling)[0].transpose(1, 2)

    mass_1nF = one_hot_attention(attend, pool_1TF, key)
    return _at(mass_1nF[0][layout.index_GN - layout.prefix], capture.query_BN)


@torch.no_grad()
def capture_by_scores(
    qkv: tuple[Tensor, Tensor, Tensor],
    layout: PrefixLayout,
    scaling: float,
    window: int | None,
    capture: FrameCapture,
) -> Tensor:
    """(G, N, F) of a packed group from scores, for all other kernels: segments behind copies of the prefix's keys."""
    query_GAND, key_GKLD = layout.segments(qkv[0]), layout.rows(qkv[1])
    return _frame_attention(query_GAND, key_GKLD, layout.visible_11NL(window), scaling, window, capture)


def one_hot_attention(attend: Callable[[Tensor], Tensor], pool_BLF: Tensor, key: Tensor) -> Tensor:
    """float32 (B, Q, F), averaged over heads: ``attend`` makes (B, Q, A, D) of values (B, L, D), as wide as keys."""
    parts, D, precision = [], key.shape[-1], torch.promote_types(key.dtype, torch.float32)
    for pool_BLf in torch.split(pool_BLF, D, dim=-1):
        # Ones are exact in half precision, 1 / tokens of a frame need not be.
        values_BLD = functional.pad((pool_BLf > 0).to(key.dtype), (0, D - pool_BLf.shape[-1]))
        mass_BQD = attend(values_BLD).mean(dim=2, dtype=precision)
        parts.append(mass_BQD[..., : pool_BLf.shape[-1]] * pool_BLf.amax(dim=1, keepdim=True))
    return torch.cat(parts, dim=-1)


def _at(mass_BQF: Tensor, query_BN: Tensor) -> Tensor:
    """(B, N, F): the chosen queries."""
    return mass_BQF.gather(1, query_BN[..., None].expand(-1, -1, mass_BQF.shape[-1]))


def _frame_attention(
    query_BALD: Tensor,
    key_BKLD: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    window: int | None,
    capture: FrameCapture,
) -> Tensor:
    """float32 (B, N, F): one layer's attention to frames, never holding more than one chunk of queries."""
    B, A, _, _ = query_BALD.shape
    L, N = key_BKLD.shape[2], capture.query_BN.shape[1]
    chunk = capture.query_chunk or max(1, CAPTURE_BUDGET // (B * A * L))
    parts = []
    for start in range(0, N, chunk):
        query_BC = capture.query_BN[:, start : start + chunk]
        index = query_BC[:, None, :, None].expand(-1, A, -1, query_BALD.shape[-1])
        probs_BCL = _head_mean_attention(
            query_BALD.gather(2, index), key_BKLD, _visible_keys(attention_mask, query_BC, L, window), scaling
        )
        parts.append(probs_BCL @ capture.pool_BLF.to(probs_BCL.dtype))
    return torch.cat(parts, dim=1)


def _head_mean_attention(query_BACD: Tensor, key_BKLD: Tensor, bias_B1CL: Tensor, scaling: float) -> Tensor:
    """float32 (B, C, L): post-softmax attention of the chunk's queries, averaged over heads."""
    B, A, C, D = query_BACD.shape
    K, L = key_BKLD.shape[1], key_BKLD.shape[2]
    # Query heads of one key/value head are folded into its query axis, so that keys are never copied per head.
    grouped = full_precision(query_BACD).reshape(B, K, (A // K) * C, D)
    scores = (grouped @ full_precision(key_BKLD).transpose(-1, -2)).mul_(scaling).view(B, A, C, L)
    return scores.add_(bias_B1CL).softmax(dim=-1).mean(dim=1)


def full_precision(x: Tensor) -> Tensor:
    """bfloat16 and float16 as float32; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _visible_keys(attention_mask: Tensor | None, query_BC: Tensor, keys: int, window: int | None = None) -> Tensor:
    """(B, 1, C, L) additive bias, float32 at least: 0 where the query may see the key, else -inf or the mask's value.

    Understands every mask form transformers passes to attention functions: None (causal), (B, L) padding masks of
    flash attention, (B, 1, L, L) boolean (True = visible) and additive float masks. The last two hold the layer's
    sliding window; a kernel that gets one of the first two is given it (`window`, in keys; None: all that precede).
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        rows = attention_mask.expand(query_BC.shape[0], -1, -1, -1)[:, :1, :, :keys]
        chosen = rows.gather(2, query_BC[:, None, :, None].expand(-1, 1, -1, keys))
        return additive(chosen) if chosen.dtype == torch.bool else full_precision(chosen)
    visible = causal(query_BC, keys, window)[:, None]
    if attention_mask is not None:
        visible = visible & attention_mask[:, None, None, :keys].bool()
    return additive(visible)
