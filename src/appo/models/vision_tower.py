"""The vision tower where several processes run it together: each must run it as often as the others do.

Parameters that lie in pieces on several processes (FSDP2, ZeRO-3) are gathered layer by layer, and gradients are
averaged over all of them. A process whose rows hold no picture runs the tower on a blank one instead.
"""

from __future__ import annotations

from typing import Any

from appo.models.families import family_of, family_or_generic

# The forward pass of a model runs its tower at most so often: on all images, and on all videos.
PASSES = 2


def freeze_vision_tower(base: Any) -> None:
    """Train no parameter between pixels and the language model, under whichever name the architecture has them.

    Raises:
        ValueError: no such tower is found.
    """
    tower = base.get_encoder(modality="image")
    if tower in (base, base.base_model):
        raise ValueError(
            f"freeze_vision_tower finds no vision tower in a {base.config.model_type} model: set it to false"
        )
    for parameter in family_or_generic(base).vision_parameters:
        parameter.requires_grad = False


def equal_vision_passes(base: Any) -> None:
    """Have every forward pass of the model run its tower :data:`PASSES` times, whatever its rows hold.

    What is added to a process's own passes changes no value: it is multiplied by 0. Where the tower runs once a rollout
    (it is frozen, and transformers takes its output) nothing changes; asking twice is asking once.

    Raises:
        ValueError: a model type without a family.
    """
    inner, family = base.base_model, family_of(base)
    runs_once = family.reuses_vision and not family.trains_vision
    if runs_once or getattr(inner, "_appo_equal_passes", False):
        return
    inner._appo_equal_passes = True
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    def add_missing(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal passes
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():  # a response goes on: no process reads a picture
            return None
        embeds = kwargs["inputs_embeds"]
        for _ in range(PASSES - passes):
            embeds = embeds + 0.0 * family.run_on_blank_pixels().to(embeds)
        passes = 0
        return args, {**kwargs, "inputs_embeds": embeds}

    family.tower.register_forward_hook(count)
    inner.get_decoder().register_forward_pre_hook(add_missing, with_kwargs=True)
