"""Conversations -> model inputs, once each within a rollout: a file decoded once, a frozen vision tower run once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from appo.packing import FEATURES, encode_vision, reuses_vision, with_features
from appo.rollout import (
    Messages,
    PromptInputs,
    VideoCache,
    check_time,
    encode_prompt,
    message_parts,
    to_device,
    video_sources,
)
from appo.stopwatch import Stopwatch


@dataclass
class PromptEncoder:
    """Encodes the prompts of one rollout after another.

    Attributes:
        processor: the model's processor.
        videos: sampled videos of this rollout.
        device: where the model is.
        autocast: the precision the model runs in.
        watch: measures the part ``vision``.
        template_kwargs: for the chat template.
        features: vision features of this rollout, by the parts of messages (videos, clips, images) they are of.
    """

    processor: Any
    videos: VideoCache
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]
    watch: Stopwatch
    template_kwargs: dict[str, Any]
    features: dict[str, Any] = field(default_factory=dict)

    def read(self, base: Any, messages: Messages) -> PromptInputs:
        """Ids and pixels of a conversation.

        Raises:
            appo.video.VideoError: a file cannot be decoded.
            ValueError: the model would see two frames at one time.
        """
        videos = [self.videos.read(source) for source in video_sources(messages)]
        inputs = encode_prompt(self.processor, messages, videos, **self.template_kwargs)
        if videos:
            check_time(base, inputs)
        return inputs

    def see(self, base: Any, messages: Messages, inputs: PromptInputs) -> PromptInputs:
        """What was read, with features in the place of pixels where the vision tower is not trained.

        Prefill, scoring and update then share them, and so do several questions about the same videos.
        """
        about = str([part for part in message_parts(messages) if part["type"] != "text"])
        if about in self.features:
            return with_features(inputs, self.features[about])
        seen = self.look(base, inputs)
        if FEATURES in seen:
            self.features[about] = seen[FEATURES]
        return seen

    def look(self, base: Any, inputs: PromptInputs) -> PromptInputs:
        """Run the vision tower, unless it is trained (or this transformers takes pixels only): then pixels stay."""
        if any(p.requires_grad for p in base.base_model.visual.parameters()) or not reuses_vision(base):
            return inputs
        with self.watch("vision"), self.autocast():
            return encode_vision(base, to_device(inputs, self.device))

    def forget(self) -> None:
        """End a rollout: pixels and features are let go, times of frames stay."""
        self.videos.clear()
        self.features.clear()
