"""SmolVLM2: frames stand as pictures ("Frame from 00:05:<image>..."), at ordinary positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from appo.models.families.base import Family
from appo.models.prompt import Features, Prompt

_IMAGES = ("pixel_values", "pixel_attention_mask")


class SmolVLM(Family):
    """SmolVLM2. Its processor loses pictures beside videos, so a prompt has either."""

    model_types = ("smolvlm",)

    def image_features(self, prompt: Prompt) -> Features:
        """The tower's output for a prompt's pictures or frames; masked pixels are padding."""
        inner = self.base.base_model
        return Features.of(inner.get_image_features(prompt.pixel_values, prompt.pixel_attention_mask, return_dict=True))

    def vision_inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """The images of all prompts as one list: (1, images, ..) instead of (videos, frames, ..), which may differ."""
        inputs = super().vision_inputs([prompt.with_each(_IMAGES, lambda x: x.flatten(0, 1)) for prompt in prompts])
        return {name: value[None] if name in _IMAGES else value for name, value in inputs.items()}

    def run_on_blank_pixels(self) -> Tensor:
        """One pass of the tower on one blank picture; a float scalar that depends on all its parameters."""
        vision = self.config.vision_config
        shape = (1, 1, vision.num_channels, vision.image_size, vision.image_size)
        blank = torch.zeros(shape, device=next(self.tower.parameters()).device)
        return self._features("image", blank, None).tokens[0].float().sum()
