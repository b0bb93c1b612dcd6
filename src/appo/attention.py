"""Frame attention read out of fused attention kernels, one forward pass, no eager attention.

The model runs its own kernel (SDPA, flash attention) unchanged; beside it, in the last layers only and only for the
queries that emit response tokens, the post-softmax attention is recomputed in chunks and reduced at once to frames.

Shape suffixes: B rows, A attention heads, K key/value heads, L input positions, N response tokens, C queries of one
chunk, D head size, F frames.
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

from appo.spans import frame_pool

# Attention probabilities held at once while capturing, in elements (float32): 16M is 64 MB.
CAPTURE_BUDGET = 16 * 2**20


@dataclass
class FrameCapture:
    """What to capture, and what has been captured so far. Pass it to the model's forward as ``frame_capture``.

    Attributes:
        query_BN: int64 (B, N), input position that emits each response token (any valid position where padded).
        pool_BLF: float32 (B, L, F), averages over the tokens of a frame (see :func:`appo.spans.frame_pool`).
        layers: indices of the decoder layers to average.
        query_chunk: queries whose attention is held at once; None: as many as :data:`CAPTURE_BUDGET` allows.
        captured: layer index -> float32 (B, N, F), filled during the forward pass.
    """

    query_BN: Tensor
    pool_BLF: Tensor
    layers: frozenset[int]
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
        model: a Hugging Face video language model whose text model runs on SDPA or flash attention.
        frame_BL: int64 (B, L), frame of each input position, -1 where none.
        query_BN: int64 (B, N), input position that emits each response token.
        frames: F.
        layers: how many of the last decoder layers to average.
        query_chunk: queries held at once (memory only; the result does not depend on it beyond rounding).

    Raises:
        ValueError: ``layers`` is not in 1..number of decoder layers, or the text model runs on a kernel that hides
            its keys (eager, flex).
    """
    text_config = model.config.get_text_config()
    depth = text_config.num_hidden_layers
    if not 1 <= layers <= depth:
        raise ValueError(f"attention layers must be between 1 and the model's {depth} decoder layers, got {layers}")
    capture = FrameCapture(
        query_BN=query_BN,
        pool_BLF=frame_pool(frame_BL, frames),
        layers=frozenset(range(depth - layers, depth)),
        query_chunk=query_chunk,
    )
    base = text_config._attn_implementation
    name = _register_capturing(base)
    # The internal attribute, not set_attn_implementation: the setter walks every module, and sets the vision tower too.
    text_config._attn_implementation_internal = name
    try:
        yield capture
    finally:
        text_config._attn_implementation_internal = base


def _register_capturing(base: str) -> str:
    """Register (once) an attention function that wraps kernel ``base``, and its mask under the same name.

    Without the mask registered beside it, transformers silently passes no mask at all.
    """
    if base not in ALL_ATTENTION_FUNCTIONS.valid_keys() or base not in ALL_MASK_ATTENTION_FUNCTIONS or "flex" in base:
        raise ValueError(
            f'frame attention cannot be captured on the attention implementation "{base}": '
            'load the model with attn_implementation="sdpa" (or "flash_attention_2")'
        )
    name = f"appo_{base}"
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(name, _capturing(ALL_ATTENTION_FUNCTIONS[base]))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def _capturing(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an attention function of transformers: run it as it is, and capture when asked."""

    def attention(
        module: nn.Module,
        query_BALD: Tensor,
        key_BKLD: Tensor,
        value_BKLD: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        frame_capture: FrameCapture | None = None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> Any:
        layer = module.layer_idx
        if frame_capture is not None and layer in frame_capture.layers and layer not in frame_capture.captured:
            with torch.no_grad():
                frame_capture.captured[layer] = _frame_attention(  # type: ignore[index]
                    query_BALD,
                    key_BKLD,
                    attention_mask,
                    scaling or query_BALD.shape[-1] ** -0.5,
                    frame_capture,
                )
        return kernel(module, query_BALD, key_BKLD, value_BKLD, attention_mask, *args, scaling=scaling, **kwargs)

    return attention


def _frame_attention(
    query_BALD: Tensor, key_BKLD: Tensor, attention_mask: Tensor | None, scaling: float, capture: FrameCapture
) -> Tensor:
    """float32 (B, N, F): one layer's attention to frames, never holding more than one chunk of queries."""
    B, A, L, _ = query_BALD.shape
    N = capture.query_BN.shape[1]
    chunk = capture.query_chunk or max(1, CAPTURE_BUDGET // (B * A * L))
    parts = []
    for start in range(0, N, chunk):
        query_BC = capture.query_BN[:, start : start + chunk]
        index = query_BC[:, None, :, None].expand(-1, A, -1, query_BALD.shape[-1])
        probs_BCL = _head_mean_attention(
            query_BALD.gather(2, index), key_BKLD, _visible_keys(attention_mask, query_BC, L), scaling
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


def _visible_keys(attention_mask: Tensor | None, query_BC: Tensor, keys: int) -> Tensor:
    """float32 (B, 1, C, L) additive bias: 0 where the query may see the key, -inf (or the mask's value) elsewhere.

    Understands every mask form transformers passes to attention functions: None (causal), (B, L) padding masks of
    flash attention, (B, 1, L, L) boolean (True = visible) and additive float masks.
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        rows = attention_mask.expand(query_BC.shape[0], -1, -1, -1)[:, :1, :, :keys]
        chosen = rows.gather(2, query_BC[:, None, :, None].expand(-1, 1, -1, keys))
        if chosen.dtype != torch.bool:
            return chosen.float()
        visible = chosen
    else:
        position_L = torch.arange(keys, device=query_BC.device)
        visible = (position_L <= query_BC[..., None])[:, None]
        if attention_mask is not None:
            visible = visible & attention_mask[:, None, None, :keys].bool()
    bias = torch.zeros(visible.shape, device=query_BC.device)
    return bias.masked_fill_(~visible, float("-inf"))
