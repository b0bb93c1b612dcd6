"""How a group is written as model inputs: as ordinary rows, or packed behind one prompt.

Shape suffixes: G responses, P prompt tokens, N response tokens (padded), S = P - 1 shared positions, T = S + all
response tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from appo.models.frame_attention import PrefixLayout
from appo.models.frame_tokens import frame_spans
from appo.models.mrope import use_pretrained_positions
from appo.types import FrameSpans

# What a processor says per video or image, one entry (or block of patches) after another.
VISION_KEYS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts")
# Where transformers' forward takes the vision tower's output instead of pixels.
FEATURES = "mm_encoder_outputs"
# Model types whose positions and attention are known to pack exactly (tests/models/test_prefix_packing.py).
PACKABLE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
IGNORED = -100


@dataclass(frozen=True)
class PackedGroup:
    """A group as one row: [prompt but its last token | last token, response 1 | last token, response 2 | ..].

    Each segment begins with the prompt's last token and leaves out its response's last one, so every position of a
    segment emits exactly one response token, and a group costs S + (all response tokens) positions.

    Attributes:
        inputs: for the model's forward, the layout among them; vision tensors once.
        layout: where the segments lie.
        labels_1T: int64 (1, T), the token each position emits, -100 in the prefix.
    """

    inputs: dict[str, Any]
    layout: PrefixLayout
    labels_1T: Tensor


def pack_group(base: Any, prompt: Mapping[str, Any], responses: Sequence[Tensor]) -> PackedGroup:
    """Pack a group behind one prompt. Source: ours; exact, see tests/models/test_prefix_packing.py.

    Args:
        base: the Hugging Face model (not PEFT-wrapped), for its rotary positions.
        prompt: processor output of one prompt, ``input_ids`` (1, P).
        responses: G int64 tensors, one of them not empty; an empty one takes no position.

    Raises:
        ValueError: an architecture that is not known to pack exactly.
    """
    if base.config.model_type not in PACKABLE:
        raise ValueError(
            f"shared_prefix knows the architectures {', '.join(PACKABLE)}, not {base.config.model_type!r}: set "
            "shared_prefix to false to run ordinary rows"
        )
    ids_1P: Tensor = prompt["input_ids"]
    device, S = ids_1P.device, ids_1P.shape[1] - 1
    lengths = [len(response) for response in responses]
    labels = torch.cat([response.to(ids_1P) for response in responses])
    segments = [torch.cat([ids_1P[0, -1:], response[:-1].to(ids_1P)]) for response in responses if len(response)]
    N = max(lengths)
    mask_GN = torch.arange(N, device=device) < torch.tensor(lengths, device=device)[:, None]
    index_GN = S + (mask_GN.flatten().cumsum(0) - 1).clamp(min=0).view(mask_GN.shape)
    layout = PrefixLayout(prefix=S, index_GN=index_GN, mask_GN=mask_GN)
    packed_1T = torch.cat([ids_1P[0, :-1], *segments])[None]
    inputs = {
        "input_ids": packed_1T,
        # All ones, not None: without it transformers looks for packed sequences in the positions.
        "attention_mask": torch.ones_like(packed_1T),
        "position_ids": _packed_positions(base, prompt, layout),
        "prefix_layout": layout,
        **join_vision([prompt]),
    }
    return PackedGroup(inputs, layout, torch.cat([labels.new_full((S,), IGNORED), labels])[None])


def _packed_positions(base: Any, prompt: Mapping[str, Any], layout: PrefixLayout) -> Tensor:
    """int64 (3, 1, T): the prompt's own M-RoPE positions, then each segment on from the prompt's last token."""
    positions_31P = prompt_positions(base, prompt)
    # The prompt's last token is text, whose three positions are equal; so are those of all that follows.
    step_GN = torch.arange(layout.mask_GN.shape[1], device=positions_31P.device).expand(layout.mask_GN.shape)
    segments_T = positions_31P[0, 0, -1] + step_GN[layout.mask_GN]
    return torch.cat([positions_31P[:, :, :-1], segments_T.expand(3, 1, -1)], dim=2)


def prompt_positions(base: Any, prompt: Mapping[str, Any]) -> Tensor:
    """int64 (3, 1, P): rotary positions (time, height, width) of a prompt, as the model was pre-trained with."""
    ids_1P: Tensor = prompt["input_ids"]
    if "mm_token_type_ids" not in prompt:
        return torch.arange(ids_1P.shape[1], device=ids_1P.device).expand(3, 1, -1)
    known = (
        "input_ids",
        "attention_mask",
        "mm_token_type_ids",
        "image_grid_thw",
        "video_grid_thw",
        "second_per_grid_ts",
    )
    arguments = {key: prompt[key] for key in known if prompt.get(key) is not None}
    positions_31P: Tensor = use_pretrained_positions(base).base_model.get_rope_index(**arguments)[0]
    return positions_31P


def prompt_spans(base: Any, prompt: Mapping[str, Any]) -> FrameSpans:
    """Which tokens of an encoded prompt are which frame, for this model."""
    return frame_spans(
        prompt["input_ids"][0],
        prompt.get("video_grid_thw"),
        video_token_id=base.config.video_token_id,
        merge_size=base.config.vision_config.spatial_merge_size,
    )


def group_rows(prompt: Mapping[str, Any], responses: Sequence[Tensor]) -> tuple[dict[str, Any], Tensor]:
    """Write a group as ordinary rows: the prompt G times, each followed by its response, right-padded.

    Args:
        prompt: processor output of one prompt, ``input_ids`` (1, P).
        responses: G int64 tensors.

    Returns:
        Model inputs with leading dimension G (vision inputs repeated G times), and the bool (G, N) response mask.
    """
    ids_1P: Tensor = prompt["input_ids"]
    G, P = len(responses), ids_1P.shape[1]
    # Padding repeats the prompt's last token: masked out, and never a vision placeholder, which the model counts.
    pad = int(ids_1P[0, -1])
    ids_GN = nn.utils.rnn.pad_sequence([r.to(ids_1P) for r in responses], batch_first=True, padding_value=pad)
    lengths_G = torch.tensor([len(r) for r in responses], device=ids_1P.device)
    mask_GN = torch.arange(ids_GN.shape[1], device=ids_1P.device) < lengths_G[:, None]
    prompt_mask_1P = prompt.get("attention_mask", torch.ones_like(ids_1P))
    rows: dict[str, Any] = {
        "input_ids": torch.cat([ids_1P.expand(G, P), ids_GN], dim=1),
        "attention_mask": torch.cat([prompt_mask_1P.expand(G, P), mask_GN.to(prompt_mask_1P)], dim=1),
        **join_vision([prompt] * G),
    }
    if "mm_token_type_ids" in prompt:
        types_1P = prompt["mm_token_type_ids"]
        rows["mm_token_type_ids"] = torch.cat([types_1P.expand(G, P), types_1P.new_zeros(G, ids_GN.shape[1])], dim=1)
    return rows, mask_GN


def join_vision(prompts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The vision inputs of rows about these prompts, one after another as a batch needs them: pixels or features."""
    found = {key: [prompt[key] for prompt in prompts if prompt.get(key) is not None] for key in VISION_KEYS}
    joined: dict[str, Any] = {key: _cat(values) for key, values in found.items() if values}
    features = [prompt[FEATURES] for prompt in prompts if FEATURES in prompt]
    return joined | {FEATURES: _join_features(features)} if features else joined


def _cat(values: Sequence[Any]) -> Tensor:
    """Tensors (or lists of numbers) one after another; a single tensor is not copied."""
    return torch.as_tensor(values[0]) if len(values) == 1 else torch.cat([torch.as_tensor(value) for value in values])


def encode_vision(base: Any, prompt: Mapping[str, Any]) -> dict[str, Any]:
    """The prompt with the vision tower's output in the place of its pixels, for a tower that is not trained.

    Everything after (prefill, scoring, update) then reuses it, and the pixels can be forgotten. Source: ours.
    """
    features = {}
    with torch.no_grad():
        if "pixel_values_videos" in prompt:
            features["video"] = base.base_model.get_video_features(
                prompt["pixel_values_videos"], prompt["video_grid_thw"], return_dict=True
            )
        if "pixel_values" in prompt:
            features["image"] = base.base_model.get_image_features(
                prompt["pixel_values"], prompt["image_grid_thw"], return_dict=True
            )
    return with_features(prompt, _join_features([features])) if features else dict(prompt)


def reuses_vision(base: Any) -> bool:
    """Whether the model's forward takes vision features (transformers 5.18 and later); before, it wants pixels."""
    return FEATURES in inspect.signature(type(base.base_model).forward).parameters


def with_features(prompt: Mapping[str, Any], features: Mapping[str, Any]) -> dict[str, Any]:
    """The prompt with these features (another prompt's about the same videos, say) in the place of its pixels."""
    rest = {key: value for key, value in prompt.items() if not key.startswith("pixel_values")}
    return rest | {FEATURES: dict(features)}


def _join_features(features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Vision outputs of several prompts as one, holding only what the language model reads of them."""
    joined = {}
    for modality in ("image", "video"):
        outputs = [output[modality] for output in features if modality in output]
        if not outputs:
            continue
        # Qwen3-VL: features that later layers add, a list over layers of tuples over videos.
        deep = [getattr(output, "deepstack_features", None) or [] for output in outputs]
        layers = [tuple(video for videos in same for video in videos) for same in zip(*deep, strict=True)]
        pooled = tuple(video for output in outputs for video in output.pooler_output)
        extra = {"deepstack_features": layers} if layers else {}
        joined[modality] = type(outputs[0])(pooler_output=pooled, **extra)
    return joined


def unwrap(model: Any) -> Any:
    """The Hugging Face model below PEFT's wrapper, if there is one; it numbers positions as it was pre-trained with."""
    return use_pretrained_positions(model.get_base_model() if hasattr(model, "get_base_model") else model)
