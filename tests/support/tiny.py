"""Random tiny video language models and prompts without any processor: for tests of the compute rooms."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from appo.models.prompt import PIXELS, Prompt

VOCAB = 96
VIDEO_START, VIDEO_END, VISION_START, VISION_END, IMAGE, VIDEO = range(90, 96)
IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
    "image_start_token_id": VISION_START,
    "image_end_token_id": VISION_END,
    "video_start_token_id": VIDEO_START,
    "video_end_token_id": VIDEO_END,
}
PATCH = 14
SIDE = 4 * PATCH  # pixels of a picture, where all have one size: 4 tokens

GLM = ("glm4v", "glm46v")
# Those whose processors write the time of each frame as text.
TIMESTAMPED = ("qwen3_vl", "qwen3_5", *GLM)
MROPE = ("qwen2_vl", "qwen2_5_vl", *TIMESTAMPED)
BY_RUNS = ("internvl", "smolvlm", "gemma4")
ARCHITECTURES = (*MROPE, *BY_RUNS)
# Gemma 4: a window of 8 tokens in the first layers; a layer that has the keys of another; logits that are bent.
TEXT_MODELS: dict[str, dict[str, Any]] = {
    "internvl": {"model_type": "qwen3"},
    "smolvlm": {"model_type": "llama"},
    "gemma4": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", *["full_attention"] * 3],
        "sliding_window": 8,
        "num_kv_shared_layers": 1,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
        "final_logit_softcapping": 3.0,
    },
}


def tiny_model(
    *,
    heads: int = 4,
    kv_heads: int = 2,
    layers: int = 3,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    architecture: str = "qwen2_5_vl",
    seed: int = 0,
    text: dict[str, Any] | None = None,
    ids: dict[str, int] = IDS,
) -> Any:
    """A model with random weights large enough that attention is far from uniform; `text`: settings of its layers."""
    torch.manual_seed(seed)
    config_class, model_class = {
        "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
        "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
        "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
        "qwen3_5": (Qwen3_5Config, Qwen3_5ForConditionalGeneration),
        "glm4v": (Glm4vConfig, Glm4vForConditionalGeneration),
        "glm46v": (Glm46VConfig, Glm46VForConditionalGeneration),
        "internvl": (InternVLConfig, InternVLForConditionalGeneration),
        "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration),
        "gemma4": (Gemma4Config, Gemma4ForConditionalGeneration),
    }[architecture]
    head_dim = 8
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
    if architecture in MROPE:
        rope |= {"mrope_section": [1, 1, 2]} | ({"mrope_interleaved": True} if "qwen3" in architecture else {})
    config = config_class(
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": heads * head_dim,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            **({} if architecture == "gemma4" else {"rope_parameters": rope}),
            "tie_word_embeddings": True,
            "initializer_range": 0.3,
            **TEXT_MODELS.get(architecture, {}),
            **(_hybrid(layers) if architecture == "qwen3_5" else {}),
            **(text or {}),
        },
        vision_config=_vision_config(architecture, heads * head_dim),
        tie_word_embeddings=True,
        attn_implementation=attention,
        **{name: number for name, number in ids.items() if name in config_class.__dataclass_fields__},
    )
    model = model_class(config).eval().to(dtype)
    model.config.pad_token_id = 0
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):  # how fast a state is forgotten: slowly enough that a prompt reaches its responses
            torch.nn.init.uniform_(parameter, -4, -1)
    if dtype == torch.float64:
        norms_in_double(model)
    return model


def _hybrid(layers: int) -> dict[str, Any]:
    """Settings of a text model that has as many layers of linear attention as of full attention."""
    return {
        "num_hidden_layers": 2 * layers,
        "layer_types": ["linear_attention", "full_attention"] * layers,
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }


class _KeepDouble(TorchFunctionMode):
    """Within ``with``, nothing is cast to float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.float:
            return args[0].double()
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
        return func(*args, **kwargs)


def norms_in_double(model: torch.nn.Module) -> None:
    """transformers' norms (and states) round to float32 even in a float64 model; not so here."""
    for module in model.modules():
        if type(module).__name__.endswith(("RMSNorm", "RMSNormGated", "GatedDeltaNet", "Pooler")):
            module.forward = partial(_in_double, module.forward)


def _in_double(forward: Any, *args: Any, **kwargs: Any) -> Any:
    with _KeepDouble():
        return forward(*args, **kwargs)


def _vision_config(architecture: str, out: int) -> dict[str, Any]:
    """A vision tower of one or two blocks; 2 x 2 patches are merged."""
    if architecture in BY_RUNS:
        size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        size |= {"initializer_range": 0.3, "patch_size": PATCH}
        own = {"pooling_kernel_size": 2, "position_embedding_size": 64, "head_dim": 8, "num_key_value_heads": 2}
        return size | (own if architecture == "gemma4" else {"image_size": SIDE})
    shared = {"depth": 1, "num_heads": 2, "initializer_range": 0.3, "patch_size": PATCH, "spatial_merge_size": 2}
    if architecture == "qwen2_vl":
        return shared | {"embed_dim": 16, "hidden_size": out, "mlp_ratio": 2}
    wide = shared | {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": out}
    if architecture in GLM:
        return wide | {"image_size": SIDE}
    if architecture == "qwen2_5_vl":
        return wide | {"fullatt_block_indexes": [0], "window_size": 56, "tokens_per_second": 2}
    deepstack = {"deepstack_visual_indexes": [0, 1]} if architecture == "qwen3_vl" else {}
    return wide | {"depth": 2, "num_position_embeddings": 64} | deepstack


@dataclass(frozen=True)
class PromptShape:
    """What a random prompt holds: videos as (frames, height, width) in merged tokens, images as (height, width).

    ``timestamps``: each frame is a block of its own behind a time written as text, as Qwen3-VL has it.
    """

    videos: tuple[tuple[int, int, int], ...] = ((3, 1, 2),)
    images: tuple[tuple[int, int], ...] = ()
    text: int = 5
    seconds: tuple[float, ...] = field(default=())
    timestamps: bool = False


def random_prompt(shape: PromptShape, seed: int = 0, architecture: str = "qwen2_5_vl") -> Prompt:
    """Videos, then images, then text."""
    if architecture in BY_RUNS:
        return prompt_by_runs(shape, architecture, seed)[0]
    generator = torch.Generator().manual_seed(seed)
    if architecture in GLM and shape.videos:
        shape = replace(shape, images=())  # the model has either
    frame_token = IMAGE if architecture in GLM else VIDEO
    ids, types = [1], [0]

    def add(tokens: list[int], kind: int = 0) -> None:
        ids.extend(tokens)
        types.extend([kind] * len(tokens))

    for frames, height, width in shape.videos:
        add([VIDEO_START] if architecture in GLM else [])
        blocks = frames if shape.timestamps else 1
        for block in range(blocks):
            add([10 + block, VISION_START] if shape.timestamps else [VISION_START])
            add([frame_token] * (frames * height * width // blocks), 2)
            add([VISION_END])
        add([VIDEO_END] if architecture in GLM else [])
    for height, width in shape.images:
        add([VISION_START])
        add([IMAGE] * (height * width), 1)
        add([VISION_END])
    add(torch.randint(2, 90, (shape.text,), generator=generator).tolist())
    vision: dict[str, Tensor] = {}
    if shape.videos:
        grid = torch.tensor([(t, 2 * h, 2 * w) for t, h, w in shape.videos])
        vision |= {"pixel_values_videos": _pixels(grid, generator), "video_grid_thw": grid}
        vision["second_per_grid_ts"] = torch.tensor(shape.seconds or [1.0] * len(shape.videos))
    if shape.images:
        grid = torch.tensor([(1, 2 * h, 2 * w) for h, w in shape.images])
        vision |= {"pixel_values": _pixels(grid, generator), "image_grid_thw": grid}
    return Prompt(torch.tensor([ids]), torch.tensor([types]), **vision)


def prompt_by_runs(shape: PromptShape, architecture: str, seed: int = 0) -> tuple[Prompt, list[int]]:
    """The same where each frame is a run of placeholders behind its time, and the true frame of each token.

    InternVL, SmolVLM: pictures and frames have 4 tokens, whatever the shape says. InternVL's last picture is of two
    pieces; SmolVLM's prompts have no pictures, but shorter videos are padded.
    """
    generator = torch.Generator().manual_seed(seed)
    ids, frames, spans = [1], [-1], []
    sizes, placeholder = [(2, 2)] * sum(count for count, _, _ in shape.videos), IMAGE
    images = [(2, 2)] * len(shape.images) if architecture == "internvl" else []
    if architecture == "gemma4":
        sizes, images = [(h, w) for count, h, w in shape.videos for _ in range(count)], [*shape.images]
        placeholder = VIDEO

    def add(tokens: list[int], frame: int = -1) -> None:
        ids.extend(tokens)
        frames.extend([frame] * len(tokens))

    for count, _, _ in shape.videos:
        start = len(ids) + 2
        for _ in range(count):
            frame = max(frames) + 1
            add([10 + frame, VISION_START])
            add([placeholder] * math.prod(sizes[frame]), frame)
            add([VISION_END])
        spans.append((start, len(ids) - 1, count))
    for number, size in enumerate(images):
        pieces = 2 if architecture == "internvl" and number + 1 == len(images) else 1
        add([VISION_START, *[IMAGE] * (pieces * math.prod(size)), VISION_END])
    add(torch.randint(2, 90, (shape.text,), generator=generator).tolist())
    ids_1P, video_spans = torch.tensor([ids]), torch.tensor(spans, dtype=torch.long).view(-1, 3)
    if architecture == "gemma4":
        types_1P = (ids_1P == IMAGE).long() + 2 * (ids_1P == VIDEO).long()
        counts = {"num_frames_per_video": video_spans[:, 2]} if sizes else {}
        vision = counts | _patches("pixel_values_videos", "video_position_ids", sizes, generator)
        vision |= _patches("pixel_values", "image_position_ids", images, generator)
        return Prompt(ids_1P, types_1P, video_spans=video_spans, **vision), frames
    pixels = torch.randn(len(sizes) + len(images) + (len(images) > 0), 3, SIDE, SIDE, generator=generator)
    vision = {"pixel_values": pixels} if len(pixels) else {}
    if architecture == "smolvlm" and vision:
        videos = pixels.split(video_spans[:, 2].tolist())
        padded = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        mask = padded([torch.ones(len(video), SIDE, SIDE, dtype=torch.long) for video in videos])
        vision = {"pixel_values": padded(videos), "pixel_attention_mask": mask}
    return Prompt(ids_1P, video_spans=video_spans, **vision), frames


def _patches(pixels: str, places: str, sizes: list[tuple[int, int]], generator: torch.Generator) -> dict[str, Tensor]:
    """Pictures of (height, width) tokens of 2 x 2 patches each as Gemma 4 takes them, padded to 36 patches."""
    if not sizes:
        return {}
    where = [torch.cartesian_prod(torch.arange(2 * width), torch.arange(2 * height)) for height, width in sizes]
    values = [torch.rand(len(one), 3 * PATCH**2, generator=generator) for one in where]
    padded = [torch.nn.functional.pad(one, (0, 0, 0, 36 - len(one))) for one in values]
    known = [torch.nn.functional.pad(one, (0, 0, 0, 36 - len(one)), value=-1) for one in where]
    return {pixels: torch.stack(padded), places: torch.stack(known)}


def in_double(prompt: Prompt) -> Prompt:
    """The prompt with its pixels as float64."""
    found = {name: getattr(prompt, name) for name in PIXELS}
    return replace(prompt, **{name: pixels.double() for name, pixels in found.items() if pixels is not None})


def random_responses(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    return [torch.randint(2, 90, (length,), generator=generator) for length in lengths]


def _pixels(grid: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(int(grid.prod(-1).sum()), 3 * 2 * PATCH * PATCH, generator=generator)
