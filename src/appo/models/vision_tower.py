"""The vision tower where several processes run it together: each must run it as often as the others do.

Parameters that lie in pieces on several processes (FSDP2, ZeRO-3) are gathered layer by layer, and gradients are
averaged over all of them. A process whose rows hold no picture runs the tower on a blank one instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from appo.models.prefix_packing import reuses_vision

# A pass of the tower each, in the order of transformers' forward.
PIXELS = ("pixel_values", "pixel_values_videos")


def freeze_vision_tower(base: Any) -> None:
    """Train no parameter of the tower that reads pictures, under whichever name the architecture has it.

    Raises:
        ValueError: no such tower is found.
    """
    tower = base.get_encoder(modality="image")
    if tower in (base, base.base_model):
        raise ValueError(
            f"freeze_vision_tower finds no vision tower in a {base.config.model_type} model: set it to false"
        )
    tower.requires_grad_(False)


def trains_vision(base: Any) -> bool:
    """Whether the vision tower's parameters are trained, so that it runs anew in every forward pass."""
    return any(parameter.requires_grad for parameter in base.base_model.visual.parameters())


def run_on_blank_pixels(base: Any) -> Tensor:
    """One pass of the tower on the smallest picture there is; a float scalar that depends on all of its parameters."""
    visual, vision = base.base_model.visual, base.config.vision_config
    merged = vision.spatial_merge_size
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    device = next(visual.parameters()).device
    pixels = torch.zeros(merged**2, values, device=device)
    grid = torch.tensor([[1, merged, merged]], device=device)
    output = base.base_model.get_image_features(pixels, grid, return_dict=True)
    # Qwen3-VL: features that later layers add, which have parameters of their own.
    features = [*output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
    return torch.stack([feature.float().sum() for feature in features]).sum()


def equal_vision_passes(base: Any) -> None:
    """Have every forward pass of the model run its tower once for each of :data:`PIXELS`, whatever its rows hold.

    What is added to a process's own passes changes no value: it is multiplied by 0. Where the tower runs once a rollout
    (it is frozen, and transformers takes its output) nothing changes; asking twice is asking once.
    """
    inner = base.base_model
    runs_once = reuses_vision(base) and not trains_vision(base)
    if runs_once or getattr(inner, "_appo_equal_passes", False):
        return
    inner._appo_equal_passes = True
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    def add_missing(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal passes
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():  # a response goes on: no process reads a picture
            return None
        embeds = kwargs["inputs_embeds"]
        for _ in range(len(PIXELS) - passes):
            embeds = embeds + 0.0 * run_on_blank_pixels(base).to(embeds)
        passes = 0
        return args, {**kwargs, "inputs_embeds": embeds}

    inner.visual.register_forward_hook(count)
    inner.language_model.register_forward_pre_hook(add_missing, with_kwargs=True)
