"""Rows of a dataset go in; groups of scored, weighted responses come out.

Conversations become prompts, each file decoded once and a frozen vision tower run once (`encoding`); prompts become
responses, read once for all of a group (`generation`, or vLLM by `vllm`). Groups whose rewards are all equal are
replaced (`dynamic_sampling`), and the others get their token weights (`token_weights`). `timers` says where the time
of a step went. Names are looked up when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "PromptEncoder": "encoding",
    "VideoCache": "generation",
    "encode_prompt": "generation",
    "generate": "generation",
    "respond": "generation",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
