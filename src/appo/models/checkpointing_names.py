"""Gradient checkpointing by its two names: TRL's ``gradient_checkpointing``, transformers 5.23's ``activation_...``.

TRL 1.16 sets the old name by default and asks models by it, which transformers 5.23 warns of, though users of
either have set no deprecated name. transformers before 5.23 knows the old name only.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_NEW_OF = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
_WARNING = r"`(is_)?gradient_checkpointing\w*` is deprecated"


def adopt_new_names(config: Any) -> None:
    """Set what is set by an old name by its new one as well, where transformers has it; a new name given wins.

    Args:
        config: training arguments whose own ``__post_init__`` has not run yet.
    """
    for old, new in _NEW_OF.items():
        if hasattr(config, new) and getattr(config, new) is None:
            setattr(config, new, getattr(config, old))


@contextmanager
def quiet() -> Iterator[None]:
    """Within ``with``, TRL and PEFT may use the old names of a model's methods without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _WARNING, FutureWarning)
        yield
