"""InternVL 3 and 3.5: frames stand as pictures ("Frame1: <img>...") of one size, at ordinary positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from appo.models.families.base import Family
from appo.models.prompt import Features


class InternVL(Family):
    """InternVL. Pictures, cut into pieces of the size of a frame, and frames are one list in ``pixel_values``."""

    model_types = ("internvl",)

    def model_output(self, features: Features) -> Any:
        """The model wants one tensor."""
        return BaseModelOutputWithPooling(pooler_output=torch.stack(features.tokens))

    def run_on_blank_pixels(self) -> Tensor:
        """One pass of the tower on one blank picture; a float scalar that depends on all its parameters."""
        vision = self.config.vision_config
        shape = (1, vision.num_channels, *vision.image_size)
        blank = torch.zeros(shape, device=next(self.tower.parameters()).device)
        return self._features("image", blank, None).tokens[0].float().sum()
