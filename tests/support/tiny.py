"""Random tiny video language models and prompts without any processor: for tests of the compute rooms."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
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
VISION_START, VISION_END, IMAGE, VIDEO = 92, 93, 94, 95
IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
PATCH = 14
SIDE = 4 * PATCH  # pixels of a picture, where all have one size: 4 tokens

# Those whose processors write a time as text before each frame.
TIMESTAMPED = ("qwen3_vl", "qwen3_5")
QWEN = ("qwen2_vl", "qwen2_5_vl", *TIMESTAMPED)
FRAMES_AS_PICTURES = ("internvl", "smolvlm")
ARCHITECTURES = (*QWEN, *FRAMES_AS_PICTURES)


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
        "internvl": (InternVLConfig, InternVLForConditionalGeneration),
        "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration),
    }[architecture]
    head_dim = 8
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
    if architecture in QWEN:
        rope |= {"mrope_section": [1, 1, 2]} | ({"mrope_interleaved": True} if architecture in TIMESTAMPED else {})
    config = config_class(
        text_config={
            **({"internvl": {"model_type": "qwen3"}, "smolvlm": {"model_type": "llama"}}.get(architecture, {})),
            "vocab_size": VOCAB,
            "hidden_size": heads * head_dim,
            "intermediate_size": 48,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "rope_parameters": rope,
            "tie_word_embeddings": True,
            "initializer_range": 0.3,
            **(_hybrid(layers) if architecture == "qwen3_5" else {}),
            **(text or {}),
        },
        vision_config=_vision_config(architecture, heads * head_dim),
        tie_word_embeddings=True,
        attn_implementation=attention,
        **(ids if architecture in QWEN else {"image_token_id": ids["image_token_id"]}),
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
    """Within ``with``, what is float64 is not cast to float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
        return func(*args, **kwargs)


def norms_in_double(model: torch.nn.Module) -> None:
    """transformers' norms (and states) round to float32 even in a float64 model; not so here."""
    for module in model.modules():
        if type(module).__name__.endswith(("RMSNorm", "RMSNormGated", "GatedDeltaNet")):
            module.forward = partial(_in_double, module.forward)


def _in_double(forward: Any, *args: Any, **kwargs: Any) -> Any:
    with _KeepDouble():
        return forward(*args, **kwargs)


def _vision_config(architecture: str, out: int) -> dict[str, Any]:
    """A vision tower of one or two blocks; 2 x 2 patches are merged."""
    if architecture in FRAMES_AS_PICTURES:
        size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        return size | {"initializer_range": 0.3, "patch_size": PATCH, "image_size": SIDE}
    shared = {"depth": 1, "num_heads": 2, "initializer_range": 0.3, "patch_size": PATCH, "spatial_merge_size": 2}
    if architecture == "qwen2_vl":
        return shared | {"embed_dim": 16, "hidden_size": out, "mlp_ratio": 2}
    wide = shared | {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": out}
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
    if architecture in FRAMES_AS_PICTURES:
        return frames_as_pictures(shape, architecture, seed)[0]
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = [1]
    for frames, height, width in shape.videos:
        blocks = frames if shape.timestamps else 1
        for block in range(blocks):
            time = [10 + block] if shape.timestamps else []
            ids += [*time, VISION_START, *[VIDEO] * (frames * height * width // blocks), VISION_END]
    for height, width in shape.images:
        ids += [VISION_START, *[IMAGE] * (height * width), VISION_END]
    ids += torch.randint(2, 90, (shape.text,), generator=generator).tolist()
    ids_1P = torch.tensor([ids])
    vision: dict[str, Tensor] = {}
    if shape.videos:
        grid = torch.tensor([(t, 2 * h, 2 * w) for t, h, w in shape.videos])
        vision |= {"pixel_values_videos": _pixels(grid, generator), "video_grid_thw": grid}
        vision["second_per_grid_ts"] = torch.tensor(shape.seconds or [1.0] * len(shape.videos))
    if shape.images:
        grid = torch.tensor([(1, 2 * h, 2 * w) for h, w in shape.images])
        vision |= {"pixel_values": _pixels(grid, generator), "image_grid_thw": grid}
    return Prompt(ids_1P, (ids_1P == IMAGE).long() + 2 * (ids_1P == VIDEO).long(), **vision)


def frames_as_pictures(shape: PromptShape, architecture: str, seed: int = 0) -> tuple[Prompt, list[int]]:
    """The same where each frame is a run of image placeholders, and the true frame of each token.

    Pictures and frames have 4 tokens, whatever the shape says; InternVL's last picture is of two pieces, and SmolVLM's
    prompts have no pictures, but shorter videos are padded.
    """
    generator = torch.Generator().manual_seed(seed)
    ids, frames, spans = [1], [-1], []

    def add(tokens: list[int], frame: int = -1) -> None:
        ids.extend(tokens)
        frames.extend([frame] * len(tokens))

    for count, _, _ in shape.videos:
        start, before = len(ids) + 2, max(frames) + 1
        for frame in range(count):
            add([10 + frame, VISION_START])
            add([IMAGE] * 4, before + frame)
            add([VISION_END])
        spans.append((start, len(ids) - 1, count))
    images = len(shape.images) if architecture == "internvl" else 0
    for image in range(images):
        add([VISION_START, *[IMAGE] * (4 if image + 1 < images else 8), VISION_END])
    add(torch.randint(2, 90, (shape.text,), generator=generator).tolist())
    counts, pictures = [count for count, _, _ in shape.videos], images + (images > 0)
    pixels = torch.randn(sum(counts) + pictures, 3, SIDE, SIDE, generator=generator)
    vision = {"pixel_values": pixels} if len(pixels) else {}
    if architecture == "smolvlm" and vision:
        videos = pixels.split(counts)
        padded = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        mask = padded([torch.ones(len(video), SIDE, SIDE, dtype=torch.long) for video in videos])
        vision = {"pixel_values": padded(videos), "pixel_attention_mask": mask}
    return Prompt(torch.tensor([ids]), video_spans=torch.tensor(spans).view(-1, 3), **vision), frames


def in_double(prompt: Prompt) -> Prompt:
    """The prompt with its pixels as float64."""
    found = {name: getattr(prompt, name) for name in PIXELS}
    return replace(prompt, **{name: pixels.double() for name, pixels in found.items() if pixels is not None})


def random_responses(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    return [torch.randint(2, 90, (length,), generator=generator) for length in lengths]


def _pixels(grid: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(int(grid.prod(-1).sum()), 3 * 2 * PATCH * PATCH, generator=generator)
