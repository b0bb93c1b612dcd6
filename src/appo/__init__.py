"""appo: train video language models to see better, with reinforcement learning.

``from appo import APPOTrainer, APPOConfig`` is all a training script needs. The names are looked up when they are first
used, so that rooms which need neither transformers nor trl stay light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from appo.training.config import APPOConfig
    from appo.training.trainer import APPOTrainer

__version__ = "0.1.0"
__all__ = ["APPOConfig", "APPOTrainer", "__version__"]

_ROOMS = {"APPOConfig": "appo.training.config", "APPOTrainer": "appo.training.trainer"}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'appo' has no attribute {name!r}")
    return getattr(import_module(_ROOMS[name]), name)
