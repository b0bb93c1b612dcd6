"""How a group is written as model inputs: as ordinary rows, or packed behind one prompt.

Shape suffixes: G responses, P prompt tokens, N response tokens (padded), S = P - 1 shared positions, T = S + all
response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from appo.models.families import Family, family_of
from appo.models.prefix_attention import PrefixLayout
from appo.models.prompt import Prompt

IGNORED = -100


@dataclass(frozen=True)
class PackedGroup:
    """A group as one row: [prompt but its last token | last token, response 1 | last token, response 2 | ..].

    Each segment begins with the prompt's last token and leaves out its response's last one, so every position of a
    segment emits exactly one response token, and a group costs S + (all response tokens) positions.
    """

    inputs: dict[str, Any]  # for the model's forward, the layout among them; vision tensors once
    layout: PrefixLayout  # where the segments lie
    labels_1T: Tensor  # int64 (1, T), the token each position emits, -100 in the prefix


def pack_group(model: Any, prompt: Prompt, responses: Sequence[Tensor]) -> PackedGroup:
    """Pack a group behind one prompt. Not in the paper; exact, see tests/models/test_families.py.

    Args:
        model: a Hugging Face model, for its family.
        prompt: on the model's device; its last token must be text.
        responses: G int64 tensors, one of them not empty; an empty one takes no position.

    Raises:
        ValueError: a model type without a family, or a family that cannot pack.
    """
    family = family_of(model)
    if not family.packs:
        raise ValueError(
            f"{family.config.model_type} models like this one cannot have a group packed behind one prompt: set "
            "shared_prefix to false to run ordinary rows"
        )
    ids_1P = prompt.ids_1P
    device, S = ids_1P.device, prompt.length - 1
    lengths = [len(response) for response in responses]
    labels = torch.cat([response.to(ids_1P) for response in responses])
    segments = [torch.cat([ids_1P[0, -1:], response[:-1].to(ids_1P)]) for response in responses if len(response)]
    N = max(lengths)
    mask_GN = torch.arange(N, device=device) < torch.tensor(lengths, device=device)[:, None]
    index_GN = S + (mask_GN.flatten().cumsum(0) - 1).clamp(min=0).view(mask_GN.shape)
    layout = PrefixLayout(S, index_GN, mask_GN, family.config.get_text_config().num_hidden_layers)
    packed_1T = torch.cat([ids_1P[0, :-1], *segments])[None]
    inputs = {
        "input_ids": packed_1T,
        # All ones, not None: without it transformers looks for packed sequences in the positions.
        "attention_mask": torch.ones_like(packed_1T),
        "position_ids": _packed_positions(family, prompt, mask_GN),
        "prefix_layout": layout,
        **family.vision_inputs([prompt]),
    }
    return PackedGroup(inputs, layout, torch.cat([labels.new_full((S,), IGNORED), labels])[None])


def _packed_positions(family: Family, prompt: Prompt, mask_GN: Tensor) -> Tensor:
    """int64 (1, T) or (3, 1, T): the prompt's own rotary positions, then each segment on from the prompt's last."""
    positions = family.positions(prompt)
    step_GN = torch.arange(mask_GN.shape[1], device=mask_GN.device).expand(mask_GN.shape)
    return torch.cat([positions[..., :-1], family.positions_after(positions, step_GN[mask_GN])], dim=-1)


def group_rows(model: Any, prompt: Prompt, responses: Sequence[Tensor]) -> tuple[dict[str, Any], Tensor]:
    """Write a group as ordinary rows: the prompt G times, each followed by its response, right-padded.

    Args:
        model: a Hugging Face model, for its family.
        prompt: on the model's device.
        responses: G int64 tensors.

    Returns:
        Model inputs with leading dimension G (vision inputs repeated G times), and the bool (G, N) response mask.

    Raises:
        ValueError: a model type without a family.
    """
    ids_1P, G, P = prompt.ids_1P, len(responses), prompt.length
    # Padding repeats the prompt's last token: masked out, and never a vision placeholder, which the model counts.
    pad = int(ids_1P[0, -1])
    ids_GN = nn.utils.rnn.pad_sequence([r.to(ids_1P) for r in responses], batch_first=True, padding_value=pad)
    lengths_G = torch.tensor([len(r) for r in responses], device=ids_1P.device)
    mask_GN = torch.arange(ids_GN.shape[1], device=ids_1P.device) < lengths_G[:, None]
    rows: dict[str, Any] = {
        "input_ids": torch.cat([ids_1P.expand(G, P), ids_GN], dim=1),
        "attention_mask": nn.functional.pad(mask_GN.to(ids_1P), (P, 0), value=1),
        **family_of(model).vision_inputs([prompt] * G),
    }
    if prompt.types_1P is not None:
        rows["mm_token_type_ids"] = nn.functional.pad(prompt.types_1P.expand(G, P), (0, ids_GN.shape[1]))
    return rows, mask_GN
