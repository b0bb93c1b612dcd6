"""A tiny model with random weights of each family, with its real processor's code over a tokenizer of bytes.

A family is one line of `FAMILY_MODELS`. A frame of any video becomes 4 tokens, of 56 x 56 pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from recipes.tiny_policy.processor import CHAT_TEMPLATE
from transformers import (
    Gemma4AudioFeatureExtractor,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4VideoProcessor,
    GenerationConfig,
    Glm4vImageProcessor,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    Glm46VImageProcessor,
    Glm46VProcessor,
    Glm46VVideoProcessor,
    GotOcr2ImageProcessor,
    InternVLProcessor,
    InternVLVideoProcessor,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.tiny import IDS, PATCH, SIDE, tiny_model

# What the tokenizer calls the tokens that InternVL's processor asks it for.
INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
GEMMA4_TOKENS = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
}
QWEN_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
GLM_MARKS = ("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>")
SMOLVLM_TOKENS = ("<image>", "<video>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")


def qwen_processor(processor: Any, video_processor: Any, **settings: Any) -> Any:
    size = {"shortest_edge": SIDE**2, "longest_edge": SIDE**2}
    shared = {"size": size, "patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2}
    images, videos = Qwen2VLImageProcessor(**shared), video_processor(**shared, **settings)
    return processor(images, byte_tokenizer(), videos, chat_template=CHAT_TEMPLATE)


def glm_processor(processor: Any, image_processor: Any, video_processor: Any) -> Any:
    size = {"shortest_edge": SIDE**2, "longest_edge": 64 * SIDE**2}  # of all frames together
    shared = {"size": size, "patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2}
    image, video, *marks = ("<|image|>", "<|video|>", *GLM_MARKS)
    template = CHAT_TEMPLATE.replace("".join(QWEN_TOKENS[at] for at in (2, 1, 3)), marks[2] + video + marks[3])
    template = template.replace("".join(QWEN_TOKENS[at] for at in (2, 0, 3)), marks[0] + image + marks[1])
    named = {"image_token": image, "video_token": video, **{f"own_{at}": mark for at, mark in enumerate(marks)}}
    images, videos = image_processor(**shared), video_processor(**shared)
    return processor(images, byte_tokenizer(named), videos, chat_template=template)


def internvl_processor() -> Any:
    template = CHAT_TEMPLATE.replace("<|vision_start|><|video_pad|><|vision_end|>", "<video>\n")
    template = template.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\n")
    size = {"height": SIDE, "width": SIDE}
    images, videos = GotOcr2ImageProcessor(size=size, max_patches=4), InternVLVideoProcessor(size=size)
    tokenizer = byte_tokenizer(INTERNVL_TOKENS)
    return InternVLProcessor(images, tokenizer, videos, image_seq_length=4, chat_template=template)


def smolvlm_processor() -> Any:
    sizes = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    tokens = {f"own_{number}": token for number, token in enumerate(SMOLVLM_TOKENS)}
    images, videos = SmolVLMImageProcessor(**sizes), SmolVLMVideoProcessor(**sizes)
    # For prompts with videos the processor has a template of its own.
    template = CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>")
    return SmolVLMProcessor(images, byte_tokenizer(tokens), videos, image_seq_len=4, chat_template=template)


def gemma4_processor() -> Any:
    """70 tokens a frame are its least; a patch of 2 x 2 pixels keeps the tower small."""
    template = CHAT_TEMPLATE.replace("<|vision_start|><|video_pad|><|vision_end|>", "<|video|>")
    template = template.replace("<|vision_start|><|image_pad|><|vision_end|>", "<|image|>")
    shared = {"patch_size": PATCH, "max_soft_tokens": 70, "pooling_kernel_size": 2}
    parts = Gemma4AudioFeatureExtractor(), Gemma4ImageProcessor(**shared), byte_tokenizer(GEMMA4_TOKENS)
    return Gemma4Processor(*parts, Gemma4VideoProcessor(**shared), chat_template=template)


PROCESSORS: dict[str, Callable[[], Any]] = {
    "qwen2_vl": lambda: qwen_processor(Qwen2VLProcessor, Qwen2VLVideoProcessor, cap_pixels_per_frame=False),
    "qwen2_5_vl": lambda: qwen_processor(Qwen2_5_VLProcessor, Qwen2VLVideoProcessor, cap_pixels_per_frame=False),
    "qwen3_vl": lambda: qwen_processor(Qwen3VLProcessor, Qwen3VLVideoProcessor, cap_pixels_per_frame=False),
    "qwen3_5": lambda: qwen_processor(Qwen3VLProcessor, Qwen3VLVideoProcessor, cap_pixels_per_frame=False),
    "glm4v": lambda: glm_processor(Glm4vProcessor, Glm4vImageProcessor, Glm4vVideoProcessor),
    "glm46v": lambda: glm_processor(Glm46VProcessor, Glm46VImageProcessor, Glm46VVideoProcessor),
    "internvl": internvl_processor,
    "smolvlm": smolvlm_processor,
    "gemma4": gemma4_processor,
}


def family_model(architecture: str) -> tuple[Any, Any]:
    """The model in float32, and its processor."""
    processor = PROCESSORS[architecture]()
    tokenizer = processor.tokenizer
    ids = dict(zip(IDS, tokenizer.convert_tokens_to_ids([*QWEN_TOKENS, *GLM_MARKS]), strict=True))
    ids |= {name: getattr(processor, name, -1) for name in ("image_token_id", "video_token_id")}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    words = dict.fromkeys(("vocab_size", *["vocab_size_per_layer_input"] * (architecture == "gemma4")), len(tokenizer))
    model = tiny_model(architecture=architecture, ids=ids, text=words | ends)
    model.generation_config = GenerationConfig(do_sample=True, top_k=0, **ends)
    return model, processor
