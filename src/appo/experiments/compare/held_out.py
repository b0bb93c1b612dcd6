"""The held-out questions of a comparison, as all of its policies' language models read them: encoded once.

The vision tower is frozen in every cell, so what it says of a clip is the same before and after training, and no cell
decodes and encodes thousands of clips again.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from appo.files import atomic_write
from appo.models.families import family_of
from appo.models.prompt import Features, Prompt
from appo.rollout.generation import generate
from appo.types import VideoQA
from appo.world.measure import MAX_NEW_TOKENS, prompt_of

BATCH = 128  # responses generated at once


@dataclass(frozen=True)
class HeldOut:
    """Questions, and each one's prompt with the vision tower's features in the place of pixels."""

    questions: Sequence[VideoQA]
    prompts: Sequence[Prompt]


def encoded(file: Path, questions: Sequence[VideoQA], model: Any, processor: Any) -> HeldOut:
    """The questions as prompts, from `file`, which is written first if it is not there.

    Args:
        file: of these questions and of policies with this vision tower; complete or absent.
        questions: of the embedded world.
        model: with the vision tower; a policy on which every cell starts.
        processor: its processor.

    Raises:
        ValueError: this transformers cannot take features in the place of pixels.
    """
    family = family_of(model)
    if not family.reuses_vision:
        raise ValueError("appo compare needs transformers 5.18 or later: older ones take pixels only")
    if not file.exists():
        prompts = [_features_apart(family.encode_vision(prompt_of(processor, question))) for question in questions]
        torch.save(prompts, content := io.BytesIO())
        atomic_write(file, content.getvalue())
    return HeldOut(questions, [_together(*parts) for parts in torch.load(file, weights_only=True)])


def sampled(
    model: Any, processor: Any, prompts: Sequence[Prompt], *, responses: int = 1, temperature: float = 0.0
) -> list[list[Tensor]]:
    """Each prompt's responses as int64 tensors; greedy at temperature 0."""
    step = max(1, BATCH // responses)
    how: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "responses": responses, "temperature": temperature}
    return [
        group
        for start in range(0, len(prompts), step)
        for group in generate(model, processor, prompts[start : start + step], **how)
    ]


def _features_apart(prompt: Prompt) -> tuple[dict[str, Any], list[Tensor]]:
    """What plain tensors can hold: the prompt without features, and the features of its videos."""
    assert prompt.video_features is not None
    return replace(prompt, video_features=None).mapping(), list(prompt.video_features.tokens)


def _together(mapping: dict[str, Any], features: Sequence[Tensor]) -> Prompt:
    return Prompt.of(mapping).with_features(None, Features(tuple(features)))
