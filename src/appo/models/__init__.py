"""A model and encoded prompts go in; log-probabilities, hidden states and attention to frames come out.

What differs between model families is one class a family (`families`). `score_group` scores a prompt's responses in one
forward pass: packed behind the prompt (`prefix_packing`), with the attention of their tokens to each video frame
(`frame_attention`, `frame_tokens`). Beside it: checkpoints and adapters (`loading`, `lora`, `names`), parameters and
vision towers on several processes (`sharding`, `vision_tower`). Names are looked up when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Family": "families",
    "Prompt": "prompt",
    "family_of": "families",
    "freeze_vision_tower": "vision_tower",
    "has_family": "families",
    "load_model": "loading",
    "log_probs_at": "log_probs",
    "score_group": "log_probs",
    "use_pretrained_positions": "families",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
