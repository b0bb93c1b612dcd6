"""Work on a model whose parameters may lie in pieces on several processes: FSDP2 and DeepSpeed ZeRO-3.

Both gather parameters when a module's ``forward`` is called. Scoring, weighing and reading pictures once call parts of
the model, or read its LM head, outside of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

Result = TypeVar("Result")
_METHOD = "_appo_forward"


def is_sharded(model: Any) -> bool:
    """Whether parameters lie in pieces on several processes, so that every pass of a layer is made by all of them.

    Args:
        model: the policy as accelerate prepared it.
    """
    return isinstance(model, FSDPModule) or any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def generate_together(model: Any, base: Any) -> None:
    """Have transformers' ``generate`` go on in every process until all have ended: a step is a pass of all layers.

    It does so by itself for FSDP1 and ZeRO-3, and for FSDP2 where transformers, not accelerate, has sharded the model.

    Args:
        model: the policy as accelerate prepared it.
        base: the Hugging Face model that generates.
    """
    if isinstance(model, FSDPModule):
        base._is_fsdp_managed_module = True


def as_forward(model: Any, work: Callable[[], Result]) -> Result:
    """Do `work` as if it were a forward pass of the model: what it needs of the parameters is there.

    Every process must call it the same number of times, and `work` must call the same layers in each: they meet in
    the same collectives.

    Args:
        model: the policy as accelerate prepared it (FSDP2's root, a DeepSpeed engine, DDP, or the plain model).
        work: takes nothing, so that FSDP's mixed precision casts none of its arguments.
    """
    if isinstance(model, FSDPModule):
        if not hasattr(model, _METHOD):
            setattr(model, _METHOD, lambda work: work())
            register_fsdp_forward_method(cast(nn.Module, model), _METHOD)
        result: Result = getattr(model, _METHOD)(work)
        return result
    with _gathered_head(model):
        return work()


def _gathered_head(model: Any) -> AbstractContextManager[Any]:
    """ZeRO-3 gathers a module's parameters when it is called; the LM head is also read without a call."""
    unwrapped = getattr(model, "module", model)
    head = unwrapped.get_output_embeddings() if hasattr(unwrapped, "get_output_embeddings") else None
    pieces = [parameter for parameter in (head.parameters() if head is not None else ()) if hasattr(parameter, "ds_id")]
    if not pieces:
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(pieces)
    return gathered
