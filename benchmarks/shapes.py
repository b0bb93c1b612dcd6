"""Models of real shapes with random weights, and groups of synthetic tokens and pixels for them.

Costs depend on shapes, not on what the weights know, so nothing is downloaded.

Shape suffixes: G responses, P prompt tokens, N response tokens.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from frame_cache import write_clip
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from appo.experiments.plan.architecture import PUBLISHED, Architecture
from appo.models.checkpointing_names import quiet
from appo.models.families import use_pretrained_positions
from appo.models.prompt import Prompt
from appo.training.lora import LANGUAGE_LAYERS

TOKENS_PER_FRAME = 64  # 8 x 8 merged patches: the paper's 64 * 28 * 28 pixels
TEXT_TOKENS = 64
RANK, ALPHA = 64, 128  # of the adapters: recipes/seed-bench-r1-3b-lora.yaml
TILE = 4_194_319  # random numbers that fill all matrices, over and over; a prime, so that no two rows are alike


@dataclass(frozen=True)
class ModelShape(Architecture):
    """An architecture with what else a model needs to run; by default that of the published 3B and 7B."""

    mrope: tuple[int, int, int] = (16, 24, 24)
    vision_heads: int = 16
    vision_full: tuple[int, ...] = (7, 15, 23, 31)


SHAPES = {
    # Every part there is, as small as it goes: for the tests.
    "tiny": ModelShape(32, 3, 4, 2, 48, 512, True, 1, 16, 32, mrope=(1, 1, 2), vision_heads=2, vision_full=(0,)),
    # For CPU: 8 layers. The vocabulary makes the head 19 % of the layers' cost (3B: 11 %, 7B: 8 %), the vision tower
    # is next to nothing, so that ratios are the language model's and comparable with the token-count limit.
    "cpu": ModelShape(512, 8, 8, 2, 1408, 8192, True, 2, 64, 128, mrope=(8, 12, 12), vision_heads=2, vision_full=(1,)),
    **{name: ModelShape(**asdict(architecture)) for name, architecture in PUBLISHED.items()},
}


def config_of(shape: ModelShape) -> Qwen2_5_VLConfig:
    """The configuration; special token ids are the last four of the vocabulary."""
    last = shape.vocabulary - 1
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(shape.mrope)},
            "tie_word_embeddings": shape.tied,
            "bos_token_id": 0,
            "eos_token_id": 1,
        },
        vision_config={
            "depth": shape.vision_depth,
            "hidden_size": shape.vision_hidden,
            "num_heads": shape.vision_heads,
            "intermediate_size": shape.vision_intermediate,
            "out_hidden_size": shape.hidden,
            "patch_size": shape.patch,
            "temporal_patch_size": shape.temporal_patch,
            "spatial_merge_size": shape.merge,
            "window_size": 112,
            "fullatt_block_indexes": list(shape.vision_full),
            "tokens_per_second": 2,
        },
        tie_word_embeddings=shape.tied,
        vision_start_token_id=last - 3,
        vision_end_token_id=last - 2,
        image_token_id=last - 1,
        video_token_id=last,
    )


def build_model(name: str, device: str, dtype: torch.dtype, *, checkpointing: bool = False) -> Any:
    """A random model of a shape, vision tower frozen (the trainer's default), ready to train."""
    config = config_of(SHAPES[name])
    config._attn_implementation = "sdpa"
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: Any = Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)
    model.model.visual.requires_grad_(False)
    return _ready_to_train(model, checkpointing=checkpointing)


def _ready_to_train(model: Any, *, checkpointing: bool) -> Any:
    model.generation_config.pad_token_id = 0
    model.train()
    if checkpointing:
        with quiet():  # transformers before 5.23 knows this name only
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return use_pretrained_positions(model)


def skeleton(name: str) -> Any:
    """The model without memory for its parameters."""
    config = config_of(SHAPES[name])
    config._attn_implementation = "sdpa"
    with init_empty_weights(include_buffers=False):
        model: Any = Qwen2_5_VLForConditionalGeneration(config)
    model.tie_weights()
    return model


def build_adapted(name: str, seed: int) -> Any:
    """A random model with adapters on its language model, checkpointing on; 15 GB are filled in seconds."""
    model = skeleton(name)
    tile = 0.02 * torch.randn(TILE, generator=torch.Generator().manual_seed(seed))
    for path, parameter in list(model.named_parameters()):
        module, leaf = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        setattr(module, leaf, nn.Parameter(filled(parameter.shape, leaf, tile), requires_grad=False))
    model.tie_weights()
    torch.manual_seed(seed)
    adapters = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LANGUAGE_LAYERS, task_type="CAUSAL_LM")
    inject_adapter_in_model(adapters, model)
    for path, parameter in model.named_parameters():
        if "lora_B" in path:  # zero at first, which would leave the other matrix without a gradient
            nn.init.normal_(parameter, std=0.01)
    return _ready_to_train(model, checkpointing=True)


def filled(shape: torch.Size, leaf: str, tile: Tensor) -> Tensor:
    """Norms are 1, biases 0, matrices the tile repeated."""
    if len(shape) == 1:
        return torch.ones(shape) if leaf == "weight" else torch.zeros(shape)
    values = torch.empty(math.prod(shape))
    for part in values.split(len(tile)):
        part.copy_(tile[: len(part)])
    return values.view(shape)


def prompt_of(model: Any, tokens: int, device: str, seed: int = 0) -> Prompt:
    """A prompt of P tokens: 64 of text around a video of 64 tokens a frame (fewer when tiny)."""
    text = min(TEXT_TOKENS, tokens // 2)
    frames, rest = divmod(tokens - text, TOKENS_PER_FRAME)
    height = 8
    if frames == 0 or rest:  # tiny prompts: frames of 2 x 2 merged tokens
        frames, height = (tokens - text) // 4, 2
    text = tokens - frames * height * height
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(2, config.video_token_id - 4, (text - 2,), generator=generator).tolist()
    video = [config.vision_start_token_id, *[config.video_token_id] * (frames * height**2), config.vision_end_token_id]
    ids_1P = torch.tensor([[*words[:2], *video, *words[2:]]])
    grid = torch.tensor([[frames, 2 * height, 2 * height]])
    pixels = torch.randn(int(grid.prod()), 3 * 2 * 14 * 14, generator=generator)
    return Prompt(
        ids_1P,
        2 * (ids_1P == config.video_token_id).long(),
        pixel_values_videos=pixels.to(next(model.parameters()).dtype),
        video_grid_thw=grid,
        second_per_grid_ts=torch.tensor([1.0]),
    ).to(device)


def responses_of(model: Any, group: int, tokens: int, device: str, seed: int = 0) -> list[Tensor]:
    """G responses of N tokens each: equal lengths, so that stock rows carry no padding."""
    generator = torch.Generator().manual_seed(seed + 1)
    high = model.config.video_token_id - 4
    return [torch.randint(2, high, (tokens,), generator=generator).to(device) for _ in range(group)]


def messages_of(processor: Any, path: Path, tokens: int, frame_tokens: int, seed: int) -> list[dict[str, Any]]:
    """A conversation about a clip, which is written, of P tokens; a frame of the model is a second of the clip."""
    frames = (tokens - min(TEXT_TOKENS, tokens // 2)) // frame_tokens
    write_clip(path, frames, 224, 224, seed)

    def asked(words: int) -> list[dict[str, Any]]:
        text = {"type": "text", "text": "the " * words + "?"}
        return [{"role": "user", "content": [{"type": "video", "video": str(path)}, text]}]

    template = processor.apply_chat_template(asked(0), tokenize=False, add_generation_prompt=True)
    return asked(tokens - frames * frame_tokens - len(processor.tokenizer(template)["input_ids"]) + 1)


# --- what a group costs on paper -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Tokens through the layers and forward FLOPs of a group, as rows and packed (vision tower left out)."""

    row_tokens: int
    packed_tokens: int
    row_flops: float
    packed_flops: float

    @property
    def token_limit(self) -> float:
        """How much cheaper packing could be if cost were proportional to tokens: G(P+N)/(P+GN)."""
        return self.row_tokens / (self.packed_tokens + 1)

    @property
    def flops_limit(self) -> float:
        """The same with attention, whose cost grows with the square of a row, and with the head."""
        return self.row_flops / self.packed_flops


def work_of(shape: ModelShape, prompt: int, response: int, group: int, *, head_everywhere: bool = True) -> Work:
    """Work of one forward pass over a group.

    ``head_everywhere``: TRL's fused head projects every position where there is no Triton (CPU), else only those that
    emit a response token.
    """
    P, N, G = prompt, response, group
    head_size = shape.hidden // shape.heads
    attention_weights = 2 * shape.hidden * (shape.heads + shape.kv_heads) * head_size
    per_token = 2 * shape.layers * (attention_weights + 3 * shape.hidden * shape.intermediate)
    per_pair = 4 * shape.layers * shape.hidden
    head = 2 * shape.hidden * shape.vocabulary
    rows, packed = G * (P + N), P - 1 + G * N
    row_heads, packed_heads = (rows, packed) if head_everywhere else (G * N, G * N)
    row_pairs = G * (P + N) ** 2 / 2
    packed_pairs = P**2 / 2 + G * (P * N + N**2 / 2)
    return Work(
        row_tokens=rows,
        packed_tokens=packed,
        row_flops=rows * per_token + row_pairs * per_pair + row_heads * head,
        packed_flops=packed * per_token + packed_pairs * per_pair + packed_heads * head,
    )
