"""Conversations -> prompts, once each within a rollout: a file decoded once, a frozen vision tower run once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from appo.models.families import family_of
from appo.models.prompt import Features, Prompt
from appo.rollout.generation import Messages, VideoCache, encode_messages, video_sources
from appo.rollout.timers import Stopwatch

# The vision tower's output for a prompt's images and videos.
Known = tuple[Features | None, Features | None]
# Turns a number of this process into that of all of them.
Agree = Callable[[int], int]


def own_count(number: int) -> int:
    """One process alone: its own number."""
    return number


@dataclass
class PromptEncoder:
    """Encodes the prompts of one rollout after another.

    Attributes:
        features: vision features of this rollout, by what they show: files and clips, and the digest of pictures.
    """

    processor: Any  # the model's processor
    videos: VideoCache  # sampled videos of this rollout
    device: torch.device  # where the model is
    autocast: Callable[[], AbstractContextManager[Any]]  # the precision the model runs in
    watch: Stopwatch  # measures the part ``vision``
    template_kwargs: dict[str, Any]  # for the chat template
    features: dict[Hashable, Known] = field(default_factory=dict)

    def read(self, base: Any, messages: Messages) -> Prompt:
        """A conversation with its pixels.

        Raises:
            appo.video.reader.VideoError: a file cannot be decoded.
            ValueError: a model type without a family, or the model would see two frames at one time.
        """
        prompt = encode_messages(self.processor, messages, self.videos, **self.template_kwargs)
        if prompt.has_video:
            family_of(base).check_time(prompt)
        return prompt

    def encode_vision(self, base: Any, messages: Messages, prompt: Prompt, agree: Agree = own_count) -> Prompt:
        """What was read, with features in the place of pixels where the vision tower is not trained.

        Prefill, scoring and update then share them, and so do several questions about the same videos.
        """
        # A video by its file and clip; pictures by their pixels, for they may have no name.
        about = (*video_sources(messages), _digest(prompt.pixel_values, prompt.image_grid_thw))
        encoded = self.vision_features(base, prompt, agree, self.features.get(about))
        if prompt.has_pixels and not encoded.has_pixels:
            self.features[about] = encoded.image_features, encoded.video_features
        return encoded

    def vision_features(
        self, base: Any, prompt: Prompt, agree: Agree = own_count, known: Known | None = None
    ) -> Prompt:
        """Run the vision tower, unless it is trained (or this transformers takes pixels only): then pixels stay.

        Args:
            base: the Hugging Face model.
            prompt: with its pixels.
            agree: turns the passes that this prompt needs into those that all processes make: where the tower lies in
                pieces on several of them, they meet in each of its layers.
            known: the tower's output, if it is known already.
        """
        family = family_of(base)
        if family.trains_vision or not family.reuses_vision:
            return prompt
        passes = prompt.passes if known is None else 0
        all_passes = agree(passes)
        with self.watch("vision"), self.autocast(), torch.no_grad():
            encoded = family.encode_vision(prompt.to(self.device)) if passes else prompt
            for _ in range(all_passes - passes):
                family.run_on_blank_pixels()
        return encoded if known is None else prompt.with_features(*known)

    def clear(self) -> None:
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
