"""The size of a Qwen2.5-VL: its parameters, and the tokens of a video. Arithmetic only, nothing is loaded.

Sources: the models' published ``config.json`` (for the table), transformers' model and video processor (for the rules).
`tests/experiments/test_plan_architecture.py` compares the counts with the model itself, built without memory, and
the tokens with the processor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from appo.models.names import checkpoint_of


@dataclass(frozen=True)
class Architecture:
    """The sizes in a model's configuration."""

    # The language model.
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool  # the LM head is the embedding
    # The vision tower.
    vision_depth: int = 32
    vision_hidden: int = 1280
    vision_intermediate: int = 3420
    patch: int = 14  # pixels of a patch's side
    temporal_patch: int = 2  # frames merged into one
    merge: int = 2  # patches merged along a side

    @property
    def kv_width(self) -> int:
        """Numbers a token's keys (or its values) have."""
        return self.kv_heads * self.hidden // self.heads

    @property
    def linears(self) -> list[tuple[int, int]]:
        """Inputs and outputs of a decoder layer's matrices: q, k, v, o, gate, up, down."""
        H, K, I = self.hidden, self.kv_width, self.intermediate  # noqa: E741  # the papers' letter
        return [(H, H), (H, K), (H, K), (H, H), (H, I), (H, I), (I, H)]

    @property
    def layer_parameters(self) -> int:
        """Of one decoder layer: matrices, biases of q, k and v, two norms."""
        matrices = sum(inputs * outputs for inputs, outputs in self.linears)
        return matrices + self.hidden + 2 * self.kv_width + 2 * self.hidden

    @property
    def embedding_parameters(self) -> int:
        """Of the embedding, and of the LM head where it is another matrix."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def language_parameters(self) -> int:
        """Of embedding, layers, last norm and head: what is trained when the vision tower is frozen."""
        return self.embedding_parameters + self.layers * self.layer_parameters + self.hidden

    @property
    def vision_parameters(self) -> int:
        """Of the vision tower and the merger behind it."""
        h, i, merged = self.vision_hidden, self.vision_intermediate, self.vision_hidden * self.merge**2
        attention = h * 3 * h + 3 * h + h * h + h
        mlp = 2 * (h * i + i) + i * h + h
        merger = h + merged * merged + merged + merged * self.hidden + self.hidden
        return self.patch_values * h + self.vision_depth * (attention + mlp + 2 * h) + merger

    @property
    def patch_values(self) -> int:
        """Numbers in one patch: 3 colours, ``temporal_patch`` frames, ``patch`` x ``patch`` pixels."""
        return 3 * self.temporal_patch * self.patch**2

    def lora_parameters(self, rank: int) -> int:
        """Of adapters of this rank on every matrix of the decoder layers."""
        return self.layers * sum(rank * (inputs + outputs) for inputs, outputs in self.linears)


# From config.json of Qwen/Qwen2.5-VL-3B-Instruct and Qwen/Qwen2.5-VL-7B-Instruct.
PUBLISHED = {
    "qwen2.5-vl-3b": Architecture(2048, 36, 16, 2, 11008, 151936, tied=True),
    "qwen2.5-vl-7b": Architecture(3584, 28, 28, 4, 18944, 152064, tied=False),
}


def read_architecture(name: str) -> Architecture:
    """By a name of `PUBLISHED`, or from the ``config.json`` of a folder, a hub id or ``spotlight``, the tiny policy.

    Raises:
        ValueError: another kind of model.
        OSError: no such folder or id, or no network.
    """
    if name.lower() in PUBLISHED:
        return PUBLISHED[name.lower()]
    source = checkpoint_of(name)
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source)
    if config.model_type != "qwen2_5_vl":
        raise ValueError(f"model {name}: plans are made for qwen2_5_vl, and this is {config.model_type}")
    text, vision = config.get_text_config(), config.vision_config
    return Architecture(
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        intermediate=text.intermediate_size,
        vocabulary=text.vocab_size,
        tied=config.tie_word_embeddings,
        vision_depth=vision.depth,
        vision_hidden=vision.hidden_size,
        vision_intermediate=vision.intermediate_size,
        patch=vision.patch_size,
        temporal_patch=vision.temporal_patch_size,
        merge=vision.spatial_merge_size,
    )


@dataclass(frozen=True)
class VideoShape:
    """A sampled video as the model's input."""

    frames: int  # of the language model: ``temporal_patch`` sampled ones each
    height: int  # pixels of a frame after resizing
    width: int
    patches: int  # of the vision tower
    tokens: int  # of the language model

    @property
    def tokens_per_frame(self) -> int:
        """Of one frame of the language model."""
        return self.tokens // self.frames


def video_shape(
    architecture: Architecture, frames: int, height: int, width: int, least_pixels: int, most_pixels: int
) -> VideoShape:
    """What Qwen2-VL's video processor makes of a video, by its own rule. ``frames``: how many are sampled.

    Raises:
        ValueError: no frame, or one so long and thin that the processor refuses it.
    """
    if frames < 1 or min(height, width) < 1 or max(height, width) > 200 * min(height, width):
        raise ValueError(f"a video of {frames} frames of {width}x{height} pixels: the processor takes none such")
    a = architecture
    height, width = _resized(height, width, a.patch * a.merge, least_pixels, most_pixels)
    merged = -(-frames // a.temporal_patch)
    patches = merged * (height // a.patch) * (width // a.patch)
    return VideoShape(merged, height, width, patches, patches // a.merge**2)


def _resized(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """Sides that are multiples of ``factor``, with an area from ``least`` to ``most`` and nearly the same ratio."""
    near = round(height / factor) * factor, round(width / factor) * factor
    if math.prod(near) > most:
        shrink = math.sqrt(height * width / most)
        down = [max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)]
        return down[0], down[1]
    if math.prod(near) < least:
        grow = math.sqrt(least / (height * width))
        return math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return near
