"""One attention function for the text model: frame attention out of fused kernels, and one prefix shared by a group.

The model runs its own kernel (SDPA, flash attention) unchanged; beside it, in the last layers only and only for the
queries that emit response tokens, the post-softmax attention is recomputed in chunks and reduced at once to frames.
With a :class:`PrefixLayout`, a group packed behind one prompt is attended as if each response stood alone behind it;
a layer's sliding window then counts the positions of that row, not those of the packed one.

Shape suffixes: B rows, A attention heads, K key/value heads, L input positions, N response tokens, C queries of one
chunk, D head size, F frames; packed: G segments, S positions of the shared prefix, T = S + all segments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from appo.models.families import family_of
from appo.models.frame_tokens import frame_pool

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
        """Raise RuntimeError if the forward pass this layout was given to did not go through :func:`appo_attention`."""
        if len(self.layers) < self.decoder_layers:
            raise RuntimeError(
                "a packed group went through an attention function that ignores its layout: run the model inside "
                "`appo_attention(model)`, or call `use_appo_attention(model)` once"
            )

    def visible_11NL(self, window: int | None) -> Tensor:
        """bool (1, 1, N, S + N): a segment's query sees the prefix and its own segment, as if they were a row."""
        length = self.prefix + self.mask_GN.shape[1]
        query_N = torch.arange(self.prefix, length, device=self.mask_GN.device)
        return _causal(query_N, length, window)[None, None]


def _causal(query_C: Tensor, keys: int, window: int | None) -> Tensor:
    """bool (.., C, keys): queries at these positions of a row see what precedes, at most `window` keys; None: all."""
    distance = query_C[..., None] - torch.arange(keys, device=query_C.device)
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


@contextmanager
def appo_attention(model: PreTrainedModel) -> Iterator[None]:
    """Run the text model's attention through this module; on leaving, the model is as it was.

    Without ``frame_capture`` or ``prefix_layout`` among the forward's arguments nothing changes but the name.

    Raises:
        ValueError: the text model runs on a kernel that cannot be wrapped (eager, flex).
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
        ValueError: the text model runs on a kernel that cannot be wrapped (eager, flex).
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
        model: a video language model of a known family, whose text model runs on SDPA or flash attention.
        frame_BL: int64 (B, L), frame of each input position, -1 where none.
        query_BN: int64 (B, N), input position that emits each response token.
        frames: F.
        layers: how many of the last decoder layers that attend to frames to average.
        query_chunk: queries held at once (memory only; the result does not depend on it beyond rounding).

    Raises:
        ValueError: ``layers`` is not in 1..number of such layers, the model has no family, or the text model runs on
            a kernel that hides its keys (eager, flex).
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
    if base not in ALL_ATTENTION_FUNCTIONS.valid_keys() or base not in ALL_MASK_ATTENTION_FUNCTIONS or "flex" in base:
        raise ValueError(
            f'frame attention cannot be captured on the attention implementation "{base}": '
            'load the model with attn_implementation="sdpa" (or "flash_attention_2")'
        )
    name = f"appo_{base}"
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(name, _wrapped(ALL_ATTENTION_FUNCTIONS[base], end_aligned="flash" in base))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def _wrapped(kernel: Callable[..., Any], *, end_aligned: bool) -> Callable[..., Any]:
    """Wrap an attention function of transformers: run it as it is; capture, or share a prefix, when asked.

    ``end_aligned``: with fewer queries than keys, the kernel's own causal mask lets the last query see the last key (as
    flash attention's does), so it needs no mask for a segment behind a prefix.
    """

    def attention(
        module: nn.Module,
        query_BALD: Tensor,
        key_BKLD: Tensor,
        value_BKLD: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        frame_capture: FrameCapture | None = None,
        prefix_layout: PrefixLayout | None = None,
        **kwargs: Any,
    ) -> Any:
        if prefix_layout is not None:
            qkv = (query_BALD, key_BKLD, value_BKLD)
            masks = (None, None) if end_aligned else _masks(prefix_layout, kwargs.get("sliding_window"))
            return _shared_prefix(kernel, module, qkv, masks, prefix_layout, frame_capture, *args, **kwargs)
        _capture(module, query_BALD, key_BKLD, attention_mask, frame_capture, kwargs)
        return kernel(module, query_BALD, key_BKLD, value_BKLD, attention_mask, *args, **kwargs)

    return attention


def _masks(layout: PrefixLayout, window: int | None) -> tuple[Tensor | None, Tensor]:
    """Of the prefix, (1, 1, S, S) or None where causal attention is right already; of the segments."""
    prefix_S, prefix_11SS = torch.arange(layout.prefix, device=layout.mask_GN.device), None
    if window is not None and window < layout.prefix:
        prefix_11SS = _causal(prefix_S, layout.prefix, window)[None, None]
    return prefix_11SS, layout.visible_11NL(window)


def _shared_prefix(
    kernel: Callable[..., Any],
    module: nn.Module,
    qkv: tuple[Tensor, Tensor, Tensor],
    masks: tuple[Tensor | None, Tensor | None],
    layout: PrefixLayout,
    capture: FrameCapture | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed group (batch 1): the prefix causally; each segment over the prefix and itself."""
    S, G = layout.prefix, layout.mask_GN.shape[0]
    prefix_11SS, mask_11NL = masks
    layout.layers.add(module.layer_idx)  # type: ignore[arg-type]
    query_1ASD, key_1KSD, value_1KSD = (x[:, :, :S] for x in qkv)
    prefix_1SAD, _ = kernel(module, query_1ASD, key_1KSD, value_1KSD, prefix_11SS, *args, **kwargs)
    query_GAND, own_key, own_value = (x[0][:, layout.index_GN].transpose(0, 1) for x in qkv)
    key_GKLD = torch.cat([key_1KSD.expand(G, -1, -1, -1), own_key], dim=2)
    value_GKLD = torch.cat([value_1KSD.expand(G, -1, -1, -1), own_value], dim=2)
    _capture(module, query_GAND, key_GKLD, layout.visible_11NL(kwargs.get("sliding_window")), capture, kwargs)
    segments_GNAD, _ = kernel(module, query_GAND, key_GKLD, value_GKLD, mask_11NL, *args, **kwargs)
    # Row-major order of the real tokens is the order in which the segments are packed.
    return torch.cat([prefix_1SAD, segments_GNAD[layout.mask_GN][None]], dim=1), None


def _capture(
    module: nn.Module,
    query_BALD: Tensor,
    key_BKLD: Tensor,
    attention_mask: Tensor | None,
    capture: FrameCapture | None,
    kwargs: dict[str, Any],
) -> None:
    """Fill the capture with this layer, once: gradient checkpointing comes by a second time."""
    layer: Any = module.layer_idx
    if capture is None or layer not in capture.layers or layer in capture.captured:
        return
    scaling, window = kwargs.get("scaling") or query_BALD.shape[-1] ** -0.5, kwargs.get("sliding_window")
    with torch.no_grad():
        capture.captured[layer] = _frame_attention(query_BALD, key_BKLD, attention_mask, scaling, window, capture)


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
    """float32 (B, 1, C, L) additive bias: 0 where the query may see the key, -inf (or the mask's value) elsewhere.

    Understands every mask form transformers passes to attention functions: None (causal), (B, L) padding masks of
    flash attention, (B, 1, L, L) boolean (True = visible) and additive float masks. The last two hold the layer's
    sliding window; a kernel that gets one of the first two is given it (`window`, in keys; None: all that precede).
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        rows = attention_mask.expand(query_BC.shape[0], -1, -1, -1)[:, :1, :, :keys]
        chosen = rows.gather(2, query_BC[:, None, :, None].expand(-1, 1, -1, keys))
        if chosen.dtype != torch.bool:
            return chosen.float()
        visible = chosen
    else:
        visible = _causal(query_BC, keys, window)[:, None]
        if attention_mask is not None:
            visible = visible & attention_mask[:, None, None, :keys].bool()
    bias = torch.zeros(visible.shape, device=query_BC.device)
    return bias.masked_fill_(~visible, float("-inf"))
