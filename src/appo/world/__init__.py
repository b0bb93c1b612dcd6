"""The embedded world: short clips with one-second events, questions about them, and a tiny lazy policy.

Everything needed to try reinforcement learning on real video files within minutes on a CPU:

* `generate` writes mp4 clips and their questions; `load_annotations` reads them back as `VideoQA`,
  `planned` says what they will be;
* `load_policy` returns the shipped tiny Qwen2.5-VL and its processor; `policy_path` is their folder.

Names are looked up lazily, so that `appo.world.world` alone loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "LEVELS": "world",
    "generate": "dataset",
    "load_annotations": "dataset",
    "planned": "dataset",
    "build_policy": "policy",
    "load_policy": "policy",
    "policy_path": "policy",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
