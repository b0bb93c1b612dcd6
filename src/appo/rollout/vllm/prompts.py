"""A prompt with videos as vLLM takes it, and what it must have in common with the training forward: tokens, positions.

Loads neither vLLM nor TRL: workers of a vLLM server import it too.

Shape suffixes: P prompt tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from appo.models.families import family_of
from appo.models.prompt import Prompt
from appo.rollout.encoding import PromptEncoder
from appo.rollout.generation import Messages, clean_messages, message_parts, open_image, video_sources


class EngineMismatchError(ValueError):
    """vLLM reads or scores a prompt differently from the training forward; the message says what differs."""


@dataclass(frozen=True)
class EnginePrompt:
    """One conversation as vLLM takes it.

    Attributes:
        videos: sampled frames, uint8 (frames, height, width, 3), and metadata of each video: nothing is left to sample.
    """

    template_ids: list[int]  # token ids of the chat template, one placeholder a video or image: vLLM expands it itself
    ids: list[int]  # the same as the training forward reads them, placeholders expanded
    videos: list[tuple[Any, dict[str, Any]]]
    images: list[Any]  # the pictures of its image parts

    def request(self) -> dict[str, Any]:
        """What vLLM's ``LLM.generate`` takes."""
        data = {"video": self.videos, "image": self.images}
        request: dict[str, Any] = {
            "prompt_token_ids": self.template_ids,
            "multi_modal_data": {kind: items for kind, items in data.items() if items},
        }
        return request | ({"mm_processor_kwargs": {"do_sample_frames": False}} if self.videos else {})


def engine_prompt(encoder: PromptEncoder, messages: Messages, prompt: Prompt) -> EnginePrompt:
    """A conversation for vLLM, of the frames that its ``prompt`` was made of."""
    shown = [encoder.videos.read(source) for source in video_sources(messages)]
    messages, processor = clean_messages(messages), encoder.processor
    text = processor.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **encoder.template_kwargs
    )
    return EnginePrompt(
        template_ids=processor.tokenizer(text, add_special_tokens=False)["input_ids"],
        ids=prompt.ids_1P[0].tolist(),
        videos=[(video.frames_THWC, dict(video.metadata)) for video in shown],
        images=[open_image(part["image"]) for part in message_parts(messages) if part["type"] == "image"],
    )


def check_tokens(prompt: EnginePrompt, read: Sequence[int] | None) -> None:
    """Assert that vLLM has read the tokens the training forward reads.

    Raises:
        EngineMismatchError: it has not.
    """
    if list(read or ()) == prompt.ids:
        return
    raise EngineMismatchError(
        f"vLLM reads a prompt as {len(read or ())} tokens, the training forward as {len(prompt.ids)} (or as others): "
        "it loads another processor or tokenizer than processing_class; save yours into the model's folder"
    )


class TrainingPositions:
    """Rotary positions for an engine's model by the rule of the model in training.

    vLLM has its own copy of each architecture's rule, and transformers has changed its own more than once (see
    `appo.models.families.qwen2_vl`; 5.17 also drops fractions of a second). A policy that answers at other positions
    than it is trained at is another policy.

    Attributes:
        given: the positions given to prompts with videos or images, by their tokens, while ``remember`` is set.
    """

    def __init__(self, base: Any, own_rule: Callable[..., tuple[Tensor, int]], *, remember: bool = True) -> None:
        self._base, self._own_rule = base, own_rule
        self.remember = remember
        self.given: dict[tuple[int, ...], list[Tensor]] = {}

    def __call__(self, input_tokens: Sequence[int], mm_features: Sequence[Any]) -> tuple[Tensor, int]:
        """(3, P) positions of a prompt, and how far its continuation is ahead of its length."""
        if not mm_features:
            return self._own_rule(input_tokens, mm_features)
        positions_3P = family_of(self._base).positions(self._prompt(input_tokens, mm_features))[:, 0]
        if self.remember:
            self.given.setdefault(tuple(input_tokens), []).append(positions_3P)
        # As scoring and update go on: right behind the prompt's last token, which is text.
        return positions_3P, int(positions_3P[0, -1]) + 1 - len(input_tokens)

    def check(self, prompt: Prompt) -> None:
        """Assert that a prompt was given the positions of the training forward; from then on remember nothing.

        Raises:
            EngineMismatchError: it was given others, or none.
        """
        given = self.given.get(tuple(prompt.ids_1P[0].tolist()), [])
        self.remember, self.given = False, {}
        if not given:
            raise EngineMismatchError(
                "vLLM has read a video without asking for its temporal positions: this version takes them from "
                "elsewhere, and they may differ from those of training; use vllm 0.22 to 0.31"
            )
        ours_3P = family_of(self._base).positions(prompt)[:, 0].cpu()
        if not any(torch.equal(ours_3P, theirs_3P) for theirs_3P in given):
            at = int((ours_3P != given[0]).any(dim=0).nonzero()[0])
            raise EngineMismatchError(
                f"vLLM reads token {at} of a prompt at (time, height, width) {given[0][:, at].tolist()}, the training "
                f"forward at {ours_3P[:, at].tolist()}: it was given another frame rate or frame size"
            )

    def _prompt(self, tokens: Sequence[int], features: Sequence[Any]) -> Prompt:
        ids_1P = torch.tensor([list(tokens)])
        inputs = {"input_ids": ids_1P, "mm_token_type_ids": family_of(self._base).token_types(ids_1P)}
        for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts"):
            found = [feature.data[name].data for feature in features if name in feature.data]
            if found:
                inputs[name] = torch.stack([torch.as_tensor(value) for value in found])
        return Prompt.of(inputs)
