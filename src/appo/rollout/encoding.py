"""Conversations -> model inputs, once each within a rollout: a file decoded once, a frozen vision tower run once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from appo.models.prefix_packing import FEATURES, encode_vision, reuses_vision, with_features
from appo.models.vision_tower import PIXELS, run_on_blank_pixels, trains_vision
from appo.rollout.generation import (
    Messages,
    PromptInputs,
    VideoCache,
    check_time,
    encode_prompt,
    to_device,
    video_sources,
)
from appo.rollout.timers import Stopwatch

# Turns a number of this process into that of all of them.
Agree = Callable[[int], int]


def own_number(number: int) -> int:
    """One process alone: its own number."""
    return number


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
        features: vision features of this rollout, by what they show: files and clips, and the digest of pictures.
    """

    processor: Any
    videos: VideoCache
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]
    watch: Stopwatch
    template_kwargs: dict[str, Any]
    features: dict[Hashable, Any] = field(default_factory=dict)

    def read(self, base: Any, messages: Messages) -> PromptInputs:
        """Ids and pixels of a conversation.

        Raises:
            appo.video.reader.VideoError: a file cannot be decoded.
            ValueError: the model would see two frames at one time.
        """
        videos = [self.videos.read(source) for source in video_sources(messages)]
        inputs = encode_prompt(self.processor, messages, videos, **self.template_kwargs)
        if videos:
            check_time(base, inputs)
        return inputs

    def see(self, base: Any, messages: Messages, inputs: PromptInputs, agree: Agree = own_number) -> PromptInputs:
        """What was read, with features in the place of pixels where the vision tower is not trained.

        Prefill, scoring and update then share them, and so do several questions about the same videos.
        """
        # A video by its file and clip; pictures by their pixels, for they may have no name.
        about = (*video_sources(messages), _digest(inputs.get("pixel_values"), inputs.get("image_grid_thw")))
        seen = self.look(base, inputs, agree, self.features.get(about))
        if FEATURES in seen:
            self.features[about] = seen[FEATURES]
        return seen

    def look(
        self, base: Any, inputs: PromptInputs, agree: Agree = own_number, known: Mapping[str, Any] | None = None
    ) -> PromptInputs:
        """Run the vision tower, unless it is trained (or this transformers takes pixels only): then pixels stay.

        Args:
            base: the Hugging Face model.
            inputs: of a prompt, with its pixels.
            agree: turns the passes that these inputs need into those that all processes make: where the tower lies in
                pieces on several of them, they meet in each of its layers.
            known: the tower's output, if it is known already.
        """
        if trains_vision(base) or not reuses_vision(base):
            return inputs
        passes = sum(key in inputs for key in PIXELS) if known is None else 0
        all_passes = agree(passes)
        with self.watch("vision"), self.autocast(), torch.no_grad():
            seen = encode_vision(base, to_device(inputs, self.device)) if passes else inputs
            for _ in range(all_passes - passes):
                run_on_blank_pixels(base)
        return seen if known is None else with_features(inputs, known)

    def forget(self) -> None:
        """End a rollout: pixels and features are let go, times of frames stay."""
        self.videos.clear()
        self.features.clear()


def _digest(*tensors: Tensor | None) -> bytes:
    """Of tensors' values and shapes."""
    found = hashlib.blake2b()
    for tensor in tensors:
        if tensor is not None:
            found.update(str(tuple(tensor.shape)).encode())
            found.update(tensor.contiguous().numpy().tobytes())
    return found.digest()
