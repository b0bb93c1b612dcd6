"""An untrained policy of the tiny architecture: a real Qwen2.5-VL of 1.3 million parameters."""

from __future__ import annotations

from typing import Any

import torch
from recipes.tiny_policy.processor import PLACEHOLDERS, build_processor
from torch import nn
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from appo.models.families import use_pretrained_positions

ROPE_THETA = 1e4
LOOKUP_SCALE = 0.8
PREVIOUS_SCALE = 4.0


def build_policy(seed: int = 0) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """An untrained policy of the same architecture, initialised so that it can learn (see `initialise`)."""
    processor = build_processor()
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(_config(processor)).float()
    initialise(model)
    model.generation_config = _generation(processor)
    return use_pretrained_positions(model), processor


def initialise(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Scale the initial weights to the layers' widths.

    1 / sqrt(fan_in), halved where a layer writes to the residual stream (not in the paper). With the default, 0.02
    everywhere, nothing is learned within hundreds of steps: a hidden size of 128 makes residual updates too small.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            halved = name.endswith(("o_proj", "down_proj", "attn.proj"))
            nn.init.normal_(module.weight, std=module.in_features**-0.5 * (0.5 if halved else 1.0))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv3d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    nn.init.normal_(model.get_input_embeddings().weight, std=0.1)
    model.tie_weights()
    for number, layer in enumerate(model.model.language_model.layers):
        start_as_lookup(layer.self_attn, previous=number == 0)


@torch.no_grad()
def start_as_lookup(attention: Any, *, previous: bool) -> None:
    """Initialise attention as a copy of similar tokens («mimetic» initialisation, Trockman and Kolter).

    The first query head of each group equals its key head, so similar tokens attend to each other, and its output
    undoes its value, so a copy reaches the tied output embeddings unchanged. With `previous`, the first group attends
    to the previous token instead: constant queries and keys that rotary positions turn by one step.
    """
    size = attention.head_dim
    groups = attention.num_key_value_groups
    query, key, value, out = (getattr(attention, f"{name}_proj") for name in "qkvo")
    for head in range(key.out_features // size):
        rows = slice(head * size, (head + 1) * size)
        first = slice(head * groups * size, (head * groups + 1) * size)
        key.weight[rows] *= LOOKUP_SCALE
        query.weight[first] = key.weight[rows]
        out.weight[:, first] = value.weight[rows].T
        if previous and head == 0:
            steps = ROPE_THETA ** (-torch.arange(size // 2) / (size // 2))
            for weight in (query.weight[first], key.weight[rows]):
                weight.zero_()
            key.bias[rows] = torch.cat([torch.ones_like(steps), torch.zeros_like(steps)]) * PREVIOUS_SCALE
            query.bias[first] = torch.cat([steps.cos(), -steps.sin()]) * PREVIOUS_SCALE


def _config(processor: Qwen2_5_VLProcessor) -> Qwen2_5_VLConfig:
    tokenizer = processor.tokenizer
    ids = tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA, "mrope_section": [4, 6, 6]},
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 96,
        "intermediate_size": 192,
        "out_hidden_size": 128,
        "depth": 2,
        "num_heads": 4,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [0, 1],  # every patch sees its whole frame of 4 x 4 patches, clock included
        "tokens_per_second": 1,  # one position a second, and a frame lasts one second
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )


def _generation(processor: Qwen2_5_VLProcessor) -> GenerationConfig:
    """Plain sampling at temperature 1, never of a vision placeholder: features and tokens would not match."""
    tokenizer = processor.tokenizer
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=128,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=tokenizer.convert_tokens_to_ids(list(PLACEHOLDERS)),
    )
