"""Random tiny video language models and prompts without any processor: for tests of the compute rooms."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

VOCAB = 96
VISION_START, VISION_END, IMAGE, VIDEO = 92, 93, 94, 95
PATCH = 14


def tiny_model(
    *,
    heads: int = 4,
    kv_heads: int = 2,
    layers: int = 3,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL with random weights large enough that attention is far from uniform."""
    torch.manual_seed(seed)
    head_dim = 8
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": heads * head_dim,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            "tie_word_embeddings": True,
            "initializer_range": 0.3,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": heads * head_dim,
            "fullatt_block_indexes": [0],
            "window_size": 56,
            "tokens_per_second": 2,
            "initializer_range": 0.3,
        },
        tie_word_embeddings=True,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        attn_implementation=attention,
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval().to(dtype)
    model.config.pad_token_id = 0
    return model


@dataclass(frozen=True)
class PromptShape:
    """What a random prompt holds: videos as (frames, height, width) in merged tokens, images as (height, width)."""

    videos: tuple[tuple[int, int, int], ...] = ((3, 1, 2),)
    images: tuple[tuple[int, int], ...] = ()
    text: int = 5
    seconds: tuple[float, ...] = field(default=())


def random_prompt(shape: PromptShape, seed: int = 0) -> dict[str, Any]:
    """Processor-shaped output for one prompt: videos, then images, then text."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = [1]
    for frames, height, width in shape.videos:
        ids += [VISION_START, *[VIDEO] * (frames * height * width), VISION_END]
    for height, width in shape.images:
        ids += [VISION_START, *[IMAGE] * (height * width), VISION_END]
    ids += torch.randint(2, 90, (shape.text,), generator=generator).tolist()
    input_ids = torch.tensor([ids])
    prompt: dict[str, Any] = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == IMAGE).long() + 2 * (input_ids == VIDEO).long(),
    }
    if shape.videos:
        grid = torch.tensor([(t, 2 * h, 2 * w) for t, h, w in shape.videos])
        prompt["video_grid_thw"] = grid
        prompt["pixel_values_videos"] = _pixels(grid, generator)
        prompt["second_per_grid_ts"] = torch.tensor(shape.seconds or [1.0] * len(shape.videos))
    if shape.images:
        grid = torch.tensor([(1, 2 * h, 2 * w) for h, w in shape.images])
        prompt["image_grid_thw"] = grid
        prompt["pixel_values"] = _pixels(grid, generator)
    return prompt


def random_responses(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    return [torch.randint(2, 90, (length,), generator=generator) for length in lengths]


def _pixels(grid: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(int(grid.prod(-1).sum()), 3 * 2 * PATCH * PATCH, generator=generator)
