"""Model families: a model goes in, the :class:`Family` that knows its particulars comes out; one file a family."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from appo.models.families.base import FAMILIES, Family

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

__all__ = ["Family", "family_of", "family_or_generic", "has_family", "unwrap", "use_pretrained_positions"]


def family_of(model: Any) -> Family:
    """The family of a Hugging Face model (PEFT-wrapped or not).

    Raises:
        ValueError: no family knows the model's type; one line with the way out.
    """
    base = _base(model)
    if not has_family(base):
        raise ValueError(
            f"no model family knows the model type {base.config.model_type!r}, only {', '.join(sorted(FAMILIES))}: "
            "docs/families.md shows how to add one"
        )
    return family_or_generic(base)


def has_family(model: Any) -> bool:
    """Whether :func:`family_of` knows the model's type."""
    return _base(model).config.model_type in FAMILIES


def family_or_generic(model: Any) -> Family:
    """The model's family, or `Family` itself where there is none: enough for text, and for generation."""
    base = _base(model)
    return FAMILIES.get(base.config.model_type, Family)(base)


def use_pretrained_positions(model: Any) -> Any:
    """Have a model number its positions as it was pre-trained; returns the model. Models without a family stay as is.

    Args:
        model: a Hugging Face model (PEFT-wrapped or not).
    """
    family_or_generic(model).prepare()
    return model


def unwrap(model: Any) -> Any:
    """The Hugging Face model below PEFT's wrapper, if there is one; it numbers positions as it was pre-trained with."""
    return use_pretrained_positions(_base(model))


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
