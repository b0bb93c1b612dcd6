"""Vision check: the policy's log-probabilities must depend on the pixels. Stock TRL scores video prompts without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from appo.rollout.generation import evaluation_mode

Inputs = TypeVar("Inputs")


class BlindPolicyError(RuntimeError):
    """The policy's log-probabilities do not depend on the pixels: it would be trained without seeing."""


def assert_vision(
    model: Any, log_probs: Callable[[Inputs], Tensor], prompt: Inputs, blank: Inputs, has_video: bool = True
) -> None:
    """Compare log-probabilities about a video with those about blank frames. Not in the paper.

    Args:
        model: the policy; put into eval mode meanwhile, else dropout would make any two passes differ.
        log_probs: log-probabilities of some fixed words after an encoded prompt, by the path that training takes.
        prompt: an encoded prompt with its pixels.
        blank: the same about blank frames.
        has_video: whether it has one. A process without one makes the same passes as the others, and compares nothing.

    Raises:
        BlindPolicyError: they are the same.
    """
    with evaluation_mode(model), torch.no_grad():
        difference = (log_probs(prompt) - log_probs(blank)).abs().max()
    if has_video and not bool(difference > 0):
        raise BlindPolicyError(
            "the policy's log-probabilities are the same for the video and for blank frames: it would be trained "
            "blind. Check that the model is a video model and that its vision tower's output is not constant"
        )
