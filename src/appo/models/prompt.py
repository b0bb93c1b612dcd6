"""One encoded prompt: token ids, and what belongs to its images and videos, as pixels or as the vision tower's output.

Shape suffixes: P prompt tokens, H hidden size of the language model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


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
        """From a model output of transformers, or the mapping that :meth:`Prompt.mapping` makes."""
        layers = output.get("deepstack_features") or ()
        return cls(tuple(output["pooler_output"]), tuple(tuple(layer) for layer in layers))

    @classmethod
    def join(cls, features: Sequence[Features]) -> Features:
        """Those of several prompts, one after another."""
        layers = zip(*(one.deepstack for one in features), strict=True)
        joined = tuple(tuple(token for part in layer for token in part) for layer in layers)
        return cls(tuple(token for one in features for token in one.tokens), joined)


@dataclass(frozen=True, eq=False)
class Vision:
    """All images, or all videos, of one prompt, in order of appearance.

    Attributes:
        pixels: as the processor returns them; for the Qwen families (patches, values of a patch). None: not kept.
        grid_thw: int64 (images or videos, 3), patches in time, height and width; None where a processor has no grid.
        seconds: float32 (videos,), seconds between two frames as the language model sees them; None where unknown.
        features: the vision tower's output, in the place of pixels.
    """

    pixels: Tensor | None = None
    grid_thw: Tensor | None = None
    seconds: Tensor | None = None
    features: Features | None = None

    def to(self, device: torch.device | str) -> Vision:
        """As :meth:`Prompt.to`."""
        pixels, grid_thw, seconds = (_to(value, device) for value in (self.pixels, self.grid_thw, self.seconds))
        return Vision(pixels, grid_thw, seconds, self.features)

    @classmethod
    def join(cls, visions: Sequence[Vision | None]) -> Vision | None:
        """The images, or videos, of several prompts, one after another; None where no prompt has any."""
        given = [vision for vision in visions if vision is not None]
        if not given:
            return None
        features = [vision.features for vision in given if vision.features is not None]
        return cls(
            pixels=_cat([vision.pixels for vision in given]),
            grid_thw=_cat([vision.grid_thw for vision in given]),
            seconds=_cat([vision.seconds for vision in given]),
            features=Features.join(features) if features else None,
        )


@dataclass(frozen=True, eq=False)
class Prompt:
    """One conversation as a model reads it. The group shares it: it exists once, however many responses there are.

    Attributes:
        ids_1P: int64 (1, P), placeholders expanded.
        types_1P: int64 (1, P), modality of each token (0 text, 1 image, 2 video); None where the processor has none.
        images: its images; None: none.
        videos: its videos; None: none.
    """

    ids_1P: Tensor
    types_1P: Tensor | None = None
    images: Vision | None = None
    videos: Vision | None = None

    @classmethod
    def of(cls, prompt: Prompt | Mapping[str, Any]) -> Prompt:
        """A processor's output of one prompt; a prompt stays what it is. Masked positions (padding) are left out.

        Raises:
            ValueError: it holds several rows.
        """
        if isinstance(prompt, Prompt):
            return prompt
        names = ("input_ids", "mm_token_type_ids", "attention_mask")
        ids_1P, types_1P, mask_1P = (_tensor(prompt.get(name)) for name in names)
        if ids_1P is None or ids_1P.ndim != 2 or ids_1P.shape[0] != 1:
            shape = None if ids_1P is None else tuple(ids_1P.shape)
            raise ValueError(f"a group has one prompt: input_ids must be (1, P), got {shape}")
        if mask_1P is not None and not mask_1P.all():
            kept_P = mask_1P[0].bool()
            ids_1P, types_1P = ids_1P[:, kept_P], None if types_1P is None else types_1P[:, kept_P]
        return cls(ids_1P, types_1P, *(_vision(prompt, *names) for names in _NAMES))

    def mapping(self) -> dict[str, Any]:
        """Undo :meth:`of`: plain values under the names of processors, for files. No padding, so no mask."""
        found: dict[str, Any] = {"input_ids": self.ids_1P, "mm_token_type_ids": self.types_1P}
        features = {}
        for (kind, pixels, grid), vision in zip(_NAMES, (self.images, self.videos), strict=True):
            if vision is not None:
                found |= {pixels: vision.pixels, grid: vision.grid_thw}
                found |= {_SECONDS: vision.seconds} if kind == "video" else {}
                if vision.features is not None:
                    tokens, layers = vision.features.tokens, [*vision.features.deepstack]
                    features[kind] = {"pooler_output": tokens, "deepstack_features": layers or None}
        return {key: value for key, value in {**found, _FEATURES: features or None}.items() if value is not None}

    @property
    def length(self) -> int:
        """P."""
        return self.ids_1P.shape[1]

    @property
    def has_video(self) -> bool:
        """Whether there are frames that a response can attend to."""
        return self.videos is not None

    @property
    def vision(self) -> tuple[Vision, ...]:
        """Images and videos, as far as there are any."""
        return tuple(vision for vision in (self.images, self.videos) if vision is not None)

    @property
    def passes(self) -> int:
        """How often the vision tower runs for this prompt: once for images and once for videos, unless it has run."""
        return sum(vision.pixels is not None for vision in self.vision)

    @property
    def has_pixels(self) -> bool:
        """Whether the vision tower has yet to run."""
        return self.passes > 0

    @property
    def features(self) -> tuple[Features | None, Features | None]:
        """The vision tower's output for images and for videos."""
        images, videos = (None if vision is None else vision.features for vision in (self.images, self.videos))
        return images, videos

    def with_features(self, images: Features | None = None, videos: Features | None = None) -> Prompt:
        """The prompt with these features (or those of another prompt about the same) in the place of its pixels."""
        return replace(self, images=_encoded(self.images, images), videos=_encoded(self.videos, videos))

    def without_pixels(self) -> Prompt:
        """The same prompt about blank images and frames."""
        return replace(self, images=_blank(self.images), videos=_blank(self.videos))

    def to(self, device: torch.device | str) -> Prompt:
        """The same on another device. Features stay where the model has made them."""
        images, videos = (None if vision is None else vision.to(device) for vision in (self.images, self.videos))
        return Prompt(self.ids_1P.to(device), _to(self.types_1P, device), images, videos)


# Processors' names: modality, pixels, grid.
_NAMES = (("image", "pixel_values", "image_grid_thw"), ("video", "pixel_values_videos", "video_grid_thw"))
_SECONDS, _FEATURES = "second_per_grid_ts", "mm_encoder_outputs"


def _vision(prompt: Mapping[str, Any], kind: str, pixels: str, grid: str) -> Vision | None:
    output = (prompt.get(_FEATURES) or {}).get(kind)
    if prompt.get(pixels) is None and prompt.get(grid) is None and output is None:
        return None
    return Vision(
        pixels=_tensor(prompt.get(pixels)),
        grid_thw=_tensor(prompt.get(grid)),
        seconds=_tensor(prompt.get(_SECONDS)) if kind == "video" else None,
        features=None if output is None else Features.of(output),
    )


def _tensor(value: Any) -> Tensor | None:
    return None if value is None else torch.as_tensor(value)


def _encoded(vision: Vision | None, features: Features | None) -> Vision | None:
    return vision if vision is None or features is None else replace(vision, pixels=None, features=features)


def _blank(vision: Vision | None) -> Vision | None:
    if vision is None or vision.pixels is None:
        return vision
    return replace(vision, pixels=torch.zeros_like(vision.pixels))


def _to(value: Tensor | None, device: torch.device | str) -> Tensor | None:
    return None if value is None else value.to(device)


def _cat(values: Sequence[Tensor | None]) -> Tensor | None:
    """Those there are, one after another; a single tensor is not copied."""
    given = [value for value in values if value is not None]
    return given[0] if len(given) == 1 else torch.cat(given) if given else None
