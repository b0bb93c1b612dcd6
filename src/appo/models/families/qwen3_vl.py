"""Qwen3-VL: the time of each frame is written as text before it, and early decoder layers add features of the tower."""

from __future__ import annotations

from typing import Any

from appo.models.families.qwen2_vl import Qwen2VL
from appo.models.prompt import Features


class Qwen3VL(Qwen2VL):
    """Qwen3-VL."""

    model_types = ("qwen3_vl",)

    def prepare(self) -> None:
        """Nothing: every frame is a block of its own between texts, so transformers' positions are right."""

    def model_output(self, features: Features) -> Any:
        """Features as the model's forward takes them, those of its early layers among them."""
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        return BaseModelOutputWithDeepstackFeatures(
            pooler_output=features.tokens, deepstack_features=list(features.deepstack)
        )
