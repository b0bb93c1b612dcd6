"""Gemma 4: the time of each frame is written as text before it; most layers see a window of the last tokens alone."""

from __future__ import annotations

import torch
from torch import Tensor

from appo.models.families.base import Family
from appo.models.prompt import Features, Prompt


class Gemma4(Family):
    """Gemma 4, images and videos; no sound."""

    model_types = ("gemma4",)

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The layers that see the whole prompt."""
        kinds = self.config.get_text_config().layer_types
        return tuple(layer for layer, kind in enumerate(kinds) if kind == "full_attention")

    @property
    def packs(self) -> bool:
        """Where no token sees what follows: in the larger models a frame's tokens see each other."""
        return self.config.get_text_config().use_bidirectional_attention is None

    def image_features(self, prompt: Prompt) -> Features:
        """The tower's output for a prompt's images."""
        inner = self.base.base_model
        return Features.of(inner.get_image_features(prompt.pixel_values, prompt.image_position_ids, return_dict=True))

    def video_features(self, prompt: Prompt) -> Features:
        """The tower's output for a prompt's videos."""
        places, frames = prompt.video_position_ids, prompt.num_frames_per_video
        inner = self.base.base_model
        return Features.of(inner.get_video_features(prompt.pixel_values_videos, places, frames, return_dict=True))

    def run_on_blank_pixels(self) -> Tensor:
        """One pass of the tower on one token's patches; a float scalar that depends on all its parameters."""
        vision = self.config.vision_config
        side = torch.arange(vision.pooling_kernel_size, device=next(self.tower.parameters()).device)
        places = torch.cartesian_prod(side, side)[None]
        pixels = torch.zeros(1, len(side) ** 2, 3 * vision.patch_size**2, device=side.device)
        inner = self.base.base_model
        return Features.of(inner.get_image_features(pixels, places, return_dict=True)).tokens[0].float().sum()
