"""What differs between model families: the class that each family derives from, one file a family (docs/families.md).

Shape suffixes: B rows, L input positions, P prompt tokens (padded), n tokens of responses.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from transformers.modeling_outputs import BaseModelOutputWithPooling

from appo.models.frame_tokens import check_time_advances, frame_spans, spans_of_runs
from appo.models.prompt import Features, Prompt, joined_features, joined_vision
from appo.types import FrameSpans

# Where transformers' forward takes the vision tower's output instead of pixels (5.18 and later).
FEATURES = "mm_encoder_outputs"
# model type -> class, filled as classes are defined
FAMILIES: dict[str, type[Family]] = {}


class Family:
    """One model, and what is particular to its family.

    The methods here are what most video language models of transformers have in common, with ordinary (1-D) positions;
    a family overrides what differs. An instance is cheap: it only refers to the model.

    Attributes:
        model_types: ``config.model_type`` of its models. Defining a class with some is enough to make them known.
        vllm: whether vLLM may sample its rollouts (`appo.rollout.vllm`).
        base: the Hugging Face model (not PEFT-wrapped).
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    vllm: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        FAMILIES.update(dict.fromkeys(vars(cls).get("model_types", ()), cls))

    def __init__(self, base: Any) -> None:
        self.base, self.config = base, base.config

    # -- tokens -------------------------------------------------------------------------------------------------------

    @property
    def banned_ids(self) -> list[int]:
        """Ids of the vision placeholders, which a policy must never sample.

        A sampled placeholder asks for features that no video has: the next forward pass fails, or reads another row's.
        """
        names = [f"{kind}{mark}_token_id" for kind in ("image", "video", "vision") for mark in ("", "_start", "_end")]
        return sorted({getattr(self.config, name) for name in names if getattr(self.config, name, None) is not None})

    def token_types(self, ids: Tensor) -> Tensor:
        """int64, modality of each token: 0 text, 1 image (or a frame that stands as one), 2 video."""
        return torch.eq(ids, self.config.image_token_id).long() + 2 * torch.eq(ids, self._video_token_id).long()

    @property
    def _video_token_id(self) -> int:
        """-1 where frames stand as images."""
        return getattr(self.config, "video_token_id", -1)

    def spans(self, prompt: Prompt) -> FrameSpans:
        """Which input positions are which video frame. Source: paper step 1.

        Raises:
            ValueError: the placeholders are not as many as the frames need, or not known to be frames.
        """
        ids_P = prompt.ids_1P[0]
        if prompt.video_spans is not None:
            return spans_of_runs(self.token_types(ids_P) > 0, prompt.video_spans)
        if self._video_token_id < 0 and bool(self.token_types(ids_P).any()):
            raise ValueError(
                f"{self.config.model_type} has frames as pictures, and a processor's output does not say which are "
                "which: encode the prompt with appo.rollout.generation.encode_prompt"
            )
        return frame_spans(
            ids_P,
            prompt.video_grid_thw,
            video_token_id=self._video_token_id,
            merge_size=self.config.vision_config.spatial_merge_size,
        )

    # -- positions ----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Change the model where transformers has other positions than its pre-training had. Twice is as once."""

    def positions(self, prompt: Prompt) -> Tensor:
        """int64 (1, P), or (3, 1, P) for time, height and width: rotary positions of a prompt, as pre-trained."""
        return torch.arange(prompt.length, device=prompt.ids_1P.device)[None]

    def positions_after(self, positions: Tensor, steps_n: Tensor) -> Tensor:
        """(.., n): those of tokens so many steps behind the prompt's last one, which must be text."""
        return positions[..., -1:] + steps_n

    def generation_positions(self, mask_BP: Tensor) -> Tensor | None:
        """int64 (B, P), of prompts padded on the left; None where the model's forward heeds the padding itself."""
        return (mask_BP.cumsum(-1) - 1).clamp(min=0)

    def check_time(self, prompt: Prompt) -> None:
        """Assert that the model will see the frames of a prompt at different times.

        Raises:
            ValueError: frames share a temporal position (the fps metadata was lost or is too high).
        """
        positions = self.positions(prompt)
        check_time_advances(positions.reshape(-1, prompt.length), self.spans(prompt))

    def start_generation(self) -> None:
        """Forget the positions at which an earlier batch went on; text-only prompts would go on from them."""
        self.base.base_model.rope_deltas = None

    def repeat_generation(self, responses: int) -> None:
        """After the prompts have been read: each is continued by so many responses."""
        inner = self.base.base_model
        if inner.rope_deltas is not None:  # where text goes on behind the video, one number a prompt
            inner.rope_deltas = inner.rope_deltas.repeat_interleave(responses, dim=0)

    # -- the vision tower ---------------------------------------------------------------------------------------------

    @property
    def tower(self) -> nn.Module:
        """The part of the model that reads pixels."""
        tower: nn.Module = self.base.get_encoder(modality="image")
        return tower

    @property
    def vision_parameters(self) -> list[Parameter]:
        """Those between pixels and the language model: the tower's, and of what follows it."""
        inner = self.base.base_model
        after = [getattr(inner, name, None) for name in ("multi_modal_projector", "connector", "embed_vision")]
        return [parameter for module in (self.tower, *filter(None, after)) for parameter in module.parameters()]

    @property
    def trains_vision(self) -> bool:
        """Whether they are trained, so that the tower runs anew in every forward pass."""
        return any(parameter.requires_grad for parameter in self.vision_parameters)

    @property
    def reuses_vision(self) -> bool:
        """Whether the model's forward takes the tower's output instead of pixels (transformers 5.18 and later)."""
        return FEATURES in inspect.signature(type(self.base.base_model).forward).parameters

    def encode_vision(self, prompt: Prompt) -> Prompt:
        """The prompt with the tower's output in the place of its pixels, for a tower that is not trained.

        Prefill, scoring and update then reuse it, and the pixels can be forgotten. Not in the paper.
        """
        with torch.no_grad():
            videos = None if prompt.pixel_values_videos is None else self.video_features(prompt)
            images = None if prompt.pixel_values is None else self.image_features(prompt)
        return prompt.with_features(images, videos)

    def image_features(self, prompt: Prompt) -> Features:
        """The tower's output for a prompt's images."""
        return self._features("image", prompt.pixel_values, prompt.image_grid_thw)

    def video_features(self, prompt: Prompt) -> Features:
        """The tower's output for a prompt's videos."""
        return self._features("video", prompt.pixel_values_videos, prompt.video_grid_thw)

    def _features(self, kind: str, pixels: Any, grid: Tensor | None) -> Features:
        grids = {} if grid is None else {f"{kind}_grid_thw": grid}
        return Features.of(getattr(self.base.base_model, f"get_{kind}_features")(pixels, return_dict=True, **grids))

    def model_output(self, features: Features) -> Any:
        """Features as the model's forward takes them."""
        return BaseModelOutputWithPooling(pooler_output=features.tokens)

    def run_on_blank_pixels(self) -> Tensor:
        """One pass of the tower on the smallest picture there is; a float scalar that depends on all its parameters.

        Raises:
            ValueError: the family does not say what that picture is.
        """
        raise ValueError(
            f"{self.config.model_type} models with pictures run in one process only: their family says no "
            "`run_on_blank_pixels` (docs/families.md)"
        )

    # -- the decoder --------------------------------------------------------------------------------------------------

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The decoder layers that attend to frames, first to last: all but those of linear attention."""
        text = self.config.get_text_config()
        kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
        return tuple(layer for layer, kind in enumerate(kinds) if "linear" not in kind)

    def captured_layers(self, count: int) -> frozenset[int]:
        """The last so many of them. Raises ValueError unless there are so many."""
        layers = self.attention_layers
        if not 1 <= count <= len(layers):
            raise ValueError(
                f"attention_layers must be between 1 and the model's {len(layers)} decoder layers, got {count}"
            )
        return frozenset(layers[-count:])

    @property
    def packs(self) -> bool:
        """Whether responses can stand one after another behind one prompt: where no layer has a state."""
        return bool(len(self.attention_layers) == self.config.get_text_config().num_hidden_layers)

    # -- what the model's forward takes -------------------------------------------------------------------------------

    def vision_inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """The vision arguments of a forward pass over rows about these prompts, one prompt a row."""
        features = {
            "image": joined_features([prompt.image_features for prompt in prompts]),
            "video": joined_features([prompt.video_features for prompt in prompts]),
        }
        outputs = {kind: self.model_output(one) for kind, one in features.items() if one is not None}
        return {**joined_vision(prompts), **({FEATURES: outputs} if outputs else {})}
