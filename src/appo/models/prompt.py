"""One encoded prompt: token ids, and what belongs to its images and videos, as pixels or as the vision tower's output.

Shape suffixes: P prompt tokens, H hidden size of the language model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

PIXELS = ("pixel_values", "pixel_values_videos")
# What a processor says per image or video, one entry (or block of patches) after another.
_PLACES = ("pixel_attention_mask", "image_position_ids", "video_position_ids", "num_frames_per_video")
VISION = (*PIXELS, *_PLACES, "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
_TOKENS = {"ids_1P": "input_ids", "types_1P": "mm_token_type_ids"}
_OUTPUTS, _SPANS = "mm_encoder_outputs", "video_spans"


@dataclass(frozen=True, eq=False)
class Features:
    """The vision tower's output for all images, or all videos, of one prompt.

    Attributes:
        tokens: for each image or video, (tokens, H).
        deepstack: features that early decoder layers add (Qwen3-VL): for each such layer the same as ``tokens``.
    """

    tokens: tuple[Tensor, ...]
    deepstack: tuple[tuple[Tensor, ...], ...] = ()

    @classmethod
    def of(cls, output: Mapping[str, Any]) -> Features:
        """From a model output of transformers, or the same as a plain mapping."""
        layers = output.get("deepstack_features") or ()
        return cls(tuple(output["pooler_output"]), tuple(tuple(layer) for layer in layers))

    def mapping(self) -> dict[str, Any]:
        """Undo :meth:`of`."""
        return {"pooler_output": self.tokens, "deepstack_features": [*self.deepstack] or None}


@dataclass(frozen=True, eq=False)
class Prompt:
    """One conversation as a model reads it. A group shares it: it exists once, however many responses there are.

    Attributes:
        types_1P: int64 (1, P), modality of each token (0 text, 1 image, 2 video); None where the processor has none.
        pixel_values: of all images, as the processor returns them: for the Qwen families (patches, values of a patch).
            Some families have their videos here, too.
        pixel_values_videos: of all videos. None of either: there are none, or features are in their place.
        image_grid_thw: int64 (images, 3), patches in time, height and width; None where a processor has no grid.
        second_per_grid_ts: float32 (videos,), seconds between two frames as the language model sees them.
        video_spans: int64 (videos, 3), where the tokens of each video start and end, and its frames, where a processor
            has no grid; None: it has, or the prompt is a processor's output as it is.
    """

    ids_1P: Tensor  # int64 (1, P), placeholders expanded
    types_1P: Tensor | None = None
    pixel_values: Tensor | None = None
    pixel_values_videos: Tensor | None = None
    pixel_attention_mask: Tensor | None = None  # int64, the pixels of images that are not padding (SmolVLM)
    image_position_ids: Tensor | None = None  # int64 (images, patches, 2), where each patch is, -1: padding (Gemma 4)
    video_position_ids: Tensor | None = None  # int64 (frames, patches, 2)
    num_frames_per_video: Tensor | None = None  # int64 (videos,)
    image_grid_thw: Tensor | None = None
    video_grid_thw: Tensor | None = None  # int64 (videos, 3), the same
    second_per_grid_ts: Tensor | None = None
    video_spans: Tensor | None = None
    image_features: Features | None = None  # the vision tower's output for the images
    video_features: Features | None = None  # the same for the videos

    @classmethod
    def of(cls, prompt: Prompt | Mapping[str, Any]) -> Prompt:
        """A processor's output of one prompt; a prompt stays what it is. Masked positions (padding) are left out.

        Raises:
            ValueError: it holds several rows.
        """
        if isinstance(prompt, Prompt):
            return prompt
        given: dict[str, Any] = {
            name: torch.as_tensor(value) for name, value in prompt.items() if name in _NAMES and value is not None
        }
        shape, mask_1P = tuple(given["input_ids"].shape), given.pop("attention_mask", None)
        if len(shape) != 2 or shape[0] != 1:
            raise ValueError(f"a group has one prompt: input_ids must be (1, P), got {shape}")
        tokens: dict[str, Any] = {field: given.pop(name) for field, name in _TOKENS.items() if name in given}
        if mask_1P is not None and not mask_1P.all():
            tokens = {field: values_1P[:, mask_1P[0].bool()] for field, values_1P in tokens.items()}
        outputs = prompt.get(_OUTPUTS) or {}
        tokens |= {f"{kind}_features": Features.of(output) for kind, output in outputs.items()}
        return cls(**tokens, **given)

    def mapping(self) -> dict[str, Any]:
        """Undo :meth:`of`: plain values, for files. There is no padding, so there is no mask."""
        features = {"image": self.image_features, "video": self.video_features}
        outputs = {kind: one.mapping() for kind, one in features.items() if one is not None}
        fields = {**_TOKENS, **{name: name for name in (*VISION, _SPANS)}}
        named = {name: getattr(self, field) for field, name in fields.items()}
        return {name: value for name, value in {**named, _OUTPUTS: outputs or None}.items() if value is not None}

    @property
    def length(self) -> int:
        """P."""
        return self.ids_1P.shape[1]

    @property
    def has_video(self) -> bool:
        """Whether there are frames that a response can attend to."""
        spans = self.video_spans
        given = (self.pixel_values_videos, self.video_grid_thw, self.video_features)
        return any(one is not None for one in given) if spans is None else len(spans) > 0

    @property
    def passes(self) -> int:
        """How often the vision tower has yet to run for this prompt: once for images, once for videos."""
        return sum(getattr(self, name) is not None for name in PIXELS)

    @property
    def has_pixels(self) -> bool:
        """Whether the vision tower has yet to run."""
        return self.passes > 0

    def with_features(self, images: Features | None, videos: Features | None) -> Prompt:
        """The prompt with these features (or those of another prompt about the same) in the place of its pixels."""
        gone: dict[str, Any] = dict.fromkeys((*PIXELS, *_PLACES))
        return replace(self, **gone, image_features=images, video_features=videos)

    def without_pixels(self) -> Prompt:
        """The same prompt about blank images and frames."""
        return self.with_each(PIXELS, blank)

    def to(self, device: torch.device | str) -> Prompt:
        """The same on another device. Features stay where the model has made them."""
        return self.with_each((*_TOKENS, *VISION), lambda value: value.to(device))

    def with_each(self, fields: Sequence[str], change: Callable[[Tensor], Tensor]) -> Prompt:
        """The same with these tensors changed, where there are any."""
        given = {field: value for field in fields if (value := getattr(self, field)) is not None}
        changed: dict[str, Any] = {field: change(value) for field, value in given.items()}
        return replace(self, **changed)


_NAMES = {*_TOKENS.values(), *VISION, _SPANS, "attention_mask"}


def blank(pixels: Tensor) -> Tensor:
    """Pictures of one colour, of the same shape. Zeros stay: SmolVLM has them in the place of pictures it lacks."""
    return (pixels != 0).to(pixels)


def joined_vision(prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """The pixels, grids and seconds of several prompts, one after another; a single tensor is not copied."""
    given = {
        name: [getattr(prompt, name) for prompt in prompts if getattr(prompt, name) is not None] for name in VISION
    }
    return {name: values[0] if len(values) == 1 else torch.cat(values) for name, values in given.items() if values}


def joined_features(features: Sequence[Features | None]) -> Features | None:
    """Those of several prompts, one after another; None where no prompt has any."""
    given = [one for one in features if one is not None]
    if not given:
        return None
    layers = zip(*(one.deepstack for one in given), strict=True)
    return Features(
        tuple(tokens for one in given for tokens in one.tokens),
        tuple(tuple(tokens for part in layer for tokens in part) for layer in layers),
    )
