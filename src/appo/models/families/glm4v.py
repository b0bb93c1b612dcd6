"""GLM-4.1V and GLM-4.6V: frames stand as pictures, each before its time, between the marks of a video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from appo.models.families.base import FEATURES
from appo.models.families.qwen2_vl import Qwen2VL
from appo.models.prompt import PIXELS, Features, Prompt
from appo.types import FrameSpans


class Glm4V(Qwen2VL):
    """GLM-4.1V and GLM-4.6V, dense."""

    model_types = ("glm4v", "glm46v")
    vllm = False  # nobody has compared its positions and prompts

    def prepare(self) -> None:
        """Nothing: every frame is a block of its own between texts, so transformers' positions are right."""

    def token_types(self, ids: Tensor) -> Tensor:
        """int64: 0 text, 1 image, 2 video: an image between the marks of a video."""
        starts = torch.eq(ids, self.config.video_start_token_id)
        ends = torch.eq(ids, self.config.video_end_token_id)
        inside = starts.cumsum(-1) > ends.cumsum(-1)
        return torch.eq(ids, self.config.image_token_id) * (1 + inside.long())

    def spans(self, prompt: Prompt) -> FrameSpans:
        """Which input positions are which video frame: frames are runs of image placeholders, as many as the grid says.

        Raises:
            ValueError: they are not.
        """
        is_video_1P = self.token_types(prompt.ids_1P) == 2
        return super().spans(replace(prompt, ids_1P=prompt.ids_1P.masked_fill(is_video_1P, self.config.video_token_id)))

    def vision_inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """As in the base, but the model puts either kind at all placeholders: both together have to be one kind.

        Raises:
            ValueError: images beside videos, and this transformers takes pixels only.
        """
        if len({name for prompt in prompts for name in PIXELS if getattr(prompt, name) is not None}) > 1:
            if not self.reuses_vision:
                raise ValueError("GLM takes images beside videos from transformers 5.18 on: ask about one of them")
            prompts = [self._encoded(prompt) for prompt in prompts]
        inputs = super().vision_inputs(prompts)
        if FEATURES in inputs:
            tokens = [self._in_order(prompt) for prompt in prompts if prompt.image_features or prompt.video_features]
            inputs[FEATURES] = {"image": self.model_output(Features(tuple(tokens)))}
        return inputs

    def _encoded(self, prompt: Prompt) -> Prompt:
        """With features in the place of pixels, as in `encode_vision`, but a tower that is trained gets gradients."""
        images = None if prompt.pixel_values is None else self.image_features(prompt)
        videos = None if prompt.pixel_values_videos is None else self.video_features(prompt)
        return prompt.with_features(images, videos)

    def _in_order(self, prompt: Prompt) -> Tensor:
        """(tokens, H): features of a prompt's images and frames as their placeholders follow one another."""
        kinds = self.token_types(prompt.ids_1P[0])
        kinds = kinds[kinds > 0]
        given = {1: prompt.image_features, 2: prompt.video_features}
        parts = {kind: torch.cat(one.tokens) for kind, one in given.items() if one is not None}
        first = next(iter(parts.values()))
        ordered = first.new_zeros(len(kinds), first.shape[1])
        for kind, tokens in parts.items():
            ordered[kinds.to(first.device) == kind] = tokens
        return ordered
