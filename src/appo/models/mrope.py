"""Rotary positions as Qwen-VL was pre-trained with: what follows a video stands behind its last frame in time.

transformers 5 (5.17 to 5.23, at least) puts it behind the larger side of a frame instead, however long the video is,
while its own generation goes on behind the last frame. So a policy would read its prompts at positions its weights have
never seen, and be scored at other positions than it was sampled at. vLLM and transformers 4 have the rule below.

Shape suffixes: B rows, L positions of a row (padded), n of them that are not padding.
"""

from __future__ import annotations

import inspect
from itertools import groupby
from types import MethodType
from typing import Any

import torch
from torch import Tensor

_RULE = "get_rope_index"


def use_pretrained_positions(model: Any) -> Any:
    """Have a Qwen-VL model number its positions as it was pre-trained; returns the model.

    Where transformers' own rule is right already (Qwen3-VL, images, another version), nothing changes. Asking twice is
    asking once; models without such a rule are left alone.

    Args:
        model: a Hugging Face model (not PEFT-wrapped).
    """
    inner = getattr(model, "base_model", None)
    if hasattr(inner, _RULE) and _RULE not in vars(inner):
        setattr(inner, _RULE, MethodType(_rope_index, inner))
    return model


def _rope_index(inner: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """transformers' ``get_rope_index``, each run of text or vision moved behind all that precedes it."""
    own_rule = getattr(type(inner), _RULE)
    given = inspect.signature(own_rule).bind(inner, *args, **kwargs).arguments
    positions_3BL, _ = own_rule(inner, *args, **kwargs)
    ids_BL, types_BL, mask_BL = given["input_ids"], given["mm_token_type_ids"], given.get("attention_mask")
    kept_BL = torch.ones_like(ids_BL, dtype=torch.bool) if mask_BL is None else mask_BL.bool()
    deltas = []
    for row, kept_L in enumerate(kept_BL):
        positions_3n, end = in_sequence(positions_3BL[:, row, kept_L], types_BL[row, kept_L].tolist())
        positions_3BL[:, row, kept_L] = positions_3n
        deltas.append(end - positions_3n.shape[1])
    return positions_3BL, torch.tensor(deltas, device=ids_BL.device)[:, None]


def in_sequence(positions_3n: Tensor, types_n: list[int]) -> tuple[Tensor, int]:
    """Move each run of one modality so that it begins right behind the largest position before it.

    Args:
        positions_3n: int64 (3, n), time, height and width of each token.
        types_n: modality of each token: 0 text, 1 image, 2 video.

    Returns:
        The moved positions, and the position that comes next.
    """
    moved_3n, start, end = positions_3n.clone(), 0, 0
    for _, run in groupby(types_n):
        tokens = slice(start, start + len(list(run)))
        moved_3n[:, tokens] += end - positions_3n[:, tokens].min()
        start, end = tokens.stop, int(moved_3n[:, tokens].max()) + 1
    return moved_3n, end
