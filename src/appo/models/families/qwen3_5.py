"""Qwen3.5: three of four decoder layers are linear attention (gated delta net), whose state runs through all of a row.

In a packed group each response has to go on from the state at the prompt's end. So such a layer runs twice: over the
shared prefix, and over all segments as rows that begin with the states the prefix has left, those of its convolution
and of its recurrence. Both are the layer's own forward, which takes states from a cache; here the cache is not written
in place, so that gradients flow through it.

Shape suffixes: G segments, N positions of a segment (padded), S positions of the prefix, T = S + all segments,
H hidden size, C channels of the convolution; as in `appo.models.frame_attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionLayer

from appo.models.families.qwen2_vl import Qwen2VL

if TYPE_CHECKING:
    from appo.models.prefix_attention import PrefixLayout


class Qwen35(Qwen2VL):
    """Qwen3.5. The time of each frame is written as text before it."""

    model_types = ("qwen3_5",)
    vllm = False  # nobody has compared its positions and prompts

    def prepare(self) -> None:
        """Have layers of linear attention keep to a packed group's layout. Positions are right as they are."""
        for layer in self.base.base_model.language_model.layers:
            linear = getattr(layer, "linear_attn", None)
            if linear is not None and getattr(linear.forward, "func", None) is not _linear_attention:
                linear.forward = partial(_linear_attention, linear, linear.forward)

    @property
    def packs(self) -> bool:
        """Yes: each segment goes on from the prefix's states."""
        return True


def _linear_attention(
    module: Any,
    forward: Callable[..., Tensor],
    hidden_states: Tensor,
    cache_params: Cache | None = None,
    attention_mask: Tensor | None = None,
    *,
    prefix_layout: PrefixLayout | None = None,
    **kwargs: Any,
) -> Tensor:
    """A layer's forward, (B, L, H); with a layout, (1, T, H) as if each segment stood alone behind the prefix.

    Not in the paper.
    """
    if prefix_layout is None:
        return forward(hidden_states, cache_params=cache_params, attention_mask=attention_mask, **kwargs)
    prefix_layout.layers.add(module.layer_idx)
    S, (G, N) = prefix_layout.prefix, prefix_layout.mask_GN.shape
    # One token behind a state takes the kernels of generation, which have no backward: there, it stands twice.
    index_GN = prefix_layout.index_GN.repeat(1, 2)[:, : max(N, 2)]
    states = _States()
    prefix_1SH = forward(hidden_states[:, :S], cache_params=states.of_layer(module.layer_idx), **kwargs)
    branched = states.repeated(G).of_layer(module.layer_idx)
    segments_GNH = forward(hidden_states[0][index_GN], cache_params=branched, **kwargs)[:, :N]
    return torch.cat([prefix_1SH, segments_GNH[prefix_layout.mask_GN][None]], dim=1)


class _States(LinearAttentionLayer):
    """The states of one layer in transformers' cache, replaced by new tensors instead of written in place."""

    def of_layer(self, index: int) -> Cache:
        """A cache that the layer of this index finds its states in."""
        return Cache(layers=[self] * (index + 1))

    def repeated(self, times: int) -> _States:
        """The same states for so many rows."""
        copy = _States()
        copy.has_previous_state[0] = True
        copy.conv_states[0] = self.conv_states[0].expand(times, -1, -1)
        copy.recurrent_states[0] = self.recurrent_states[0].expand(times, -1, -1, -1)
        return copy

    def update_conv_state(self, new_BCN: Tensor, state_idx: int = 0, conv_kernel_size: int = 0, **_: Any) -> Tensor:
        """The inputs that the convolution reads: those kept before, then the new ones; its last ones are kept."""
        known = [self.conv_states[0]] if self.has_previous_state[0] else []
        inputs = torch.cat([*known, new_BCN], dim=-1)
        self.conv_states[0], self.has_previous_state[0] = inputs[..., -conv_kernel_size:], True
        return inputs

    def update_recurrent_state(self, state: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
        """Keep the state behind the last token."""
        self.recurrent_states[0] = state
        return state
