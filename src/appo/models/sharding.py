"""Work on a model whose parameters may lie in pieces on several processes: FSDP2 and DeepSpeed ZeRO-3.

Both gather parameters when a module's ``forward`` is called. Scoring, weighing and reading pictures once call parts of
the model, or read its LM head, outside of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, register_fsdp_forward_method

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


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the weights that `source` has in the first process. Every process must call it.

    Args:
        source: a Hugging Face model, whole or in pieces. FSDP's ``cpu_ram_efficient_loading`` hands out what the first
            process has of it, so the others may have anything.
        target: a model of the same build, as TRL prepared it: FSDP2's root, a DeepSpeed engine, or the plain model.

    Raises:
        ValueError: FSDP version 1, which keeps its pieces in another form.
    """
    if isinstance(target, FullyShardedDataParallel):
        raise ValueError(
            "beta > 0 needs fsdp_version: 2: FSDP version 1 cannot give the reference model the policy's weights"
        )
    if isinstance(target, FSDPModule):
        weights = get_model_state_dict(source, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(cast(nn.Module, target), weights, options=options)
        return
    whole: nn.Module = getattr(target, "module", target)
    if any(hasattr(parameter, "ds_id") for parameter in whole.parameters()):
        _copy_gathered(source, whole)
    else:
        whole.load_state_dict(source.state_dict())


def _copy_gathered(source: nn.Module, target: nn.Module) -> None:
    """Of ZeRO-3's pieces, one parameter at a time: the first process writes it, the others are sent it."""
    import deepspeed

    own = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        pieces = [one for one in (own[name], parameter) if hasattr(one, "ds_id")]
        with torch.no_grad(), deepspeed.zero.GatheredParameters(pieces, modifier_rank=0):
            if distributed.get_rank() == 0:
                parameter.copy_(own[name])
