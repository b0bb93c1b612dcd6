"""Videos through TRL's vLLM rollouts: the frames, tokens and positions of the training forward, and checks of that.

TRL hands its engine images only. A prompt with videos travels through TRL's code in the place of a list of images, as
one EnginePrompt, and is unpacked right before the engine. Weights, sampling and importance sampling stay TRL's.

Shape suffixes: G responses, N response tokens (padded), P prompt tokens, H hidden size, K banned tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from appo.attention import full_precision
from appo.encoding import PromptEncoder
from appo.groups import Group
from appo.packing import prompt_positions
from appo.rollout import (
    Messages,
    PromptInputs,
    clean_messages,
    message_parts,
    open_image,
    video_sources,
    vision_token_ids,
)
from appo.types import GroupScores

logger = logging.getLogger(__name__)

# Largest mean |log p by vLLM - log p by scoring| over the tokens of a group: both in float32, or one of them not.
TOLERANCE, LOW_PRECISION_TOLERANCE = 1e-3, 0.1
# Settings of vLLM's sampling that leave the log-probabilities it reports those of softmax(logits / temperature).
NEUTRAL = {"top_p": (1.0,), "top_k": (0, -1, None), "min_p": (0.0, None), "repetition_penalty": (1.0,)}
NEUTRAL_EXTRAS = {"bad_words", "seed", "stop", "stop_token_ids", "max_tokens"}


class EngineMismatchError(ValueError):
    """vLLM reads or scores a prompt otherwise than the training forward; the message says what differs."""


@dataclass(frozen=True)
class EnginePrompt:
    """One conversation as vLLM takes it.

    Attributes:
        template_ids: token ids of the chat template, one placeholder a video or image: vLLM expands it itself.
        ids: the same as the training forward reads them, placeholders expanded.
        videos: sampled frames, uint8 (frames, height, width, 3), and metadata of each video: nothing is left to sample.
        images: the pictures of its image parts.
    """

    template_ids: list[int]
    ids: list[int]
    videos: list[tuple[Any, dict[str, Any]]]
    images: list[Any]

    def request(self) -> dict[str, Any]:
        """What vLLM's ``LLM.generate`` takes."""
        data = {"video": self.videos, "image": self.images}
        request: dict[str, Any] = {
            "prompt_token_ids": self.template_ids,
            "multi_modal_data": {kind: items for kind, items in data.items() if items},
        }
        return request | ({"mm_processor_kwargs": {"do_sample_frames": False}} if self.videos else {})


def _engine_prompt(encoder: PromptEncoder, messages: Messages, inputs: PromptInputs) -> EnginePrompt:
    shown = [encoder.videos.read(source) for source in video_sources(messages)]
    messages, processor = clean_messages(messages), encoder.processor
    text = processor.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **encoder.template_kwargs
    )
    return EnginePrompt(
        template_ids=processor.tokenizer(text, add_special_tokens=False)["input_ids"],
        ids=inputs["input_ids"][0].tolist(),
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


class VideoLLM:
    """TRL's colocated engine with videos; all that is not said here is the engine's own."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def generate(self, prompts: Sequence[dict[str, Any]], **settings: Any) -> Any:
        """vLLM's ``generate``, for prompts that may carry an EnginePrompt where TRL puts images."""
        carried = [prompt.get("multi_modal_data", {}).get("image") for prompt in prompts]
        requests = [
            asked.request() if isinstance(asked, EnginePrompt) else prompt
            for asked, prompt in zip(carried, prompts, strict=True)
        ]
        outputs = self._llm.generate(requests, **settings)
        for asked, output in zip(carried, outputs, strict=True):
            if isinstance(asked, EnginePrompt):
                check_tokens(asked, output.prompt_token_ids)
        return outputs

    def reset_prefix_cache(self) -> Any:
        """TRL's call after new weights: what a vision tower of old weights has seen is forgotten too."""
        self._llm.llm_engine.reset_encoder_cache()
        return self._llm.reset_prefix_cache()


class TrainingPositions:
    """Rotary positions for an engine's model by the rule of the model in training.

    vLLM has its own copy of each architecture's rule, and transformers has changed its own more than once: text after a
    video goes on behind its last frame (vLLM) or behind its larger side (transformers 5), and transformers 5.17 drops
    fractions of a second. A policy that answers at other positions than it is trained at is another policy.

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
        positions_3P = prompt_positions(self._base, self._inputs(input_tokens, mm_features))[:, 0]
        if self.remember:
            self.given.setdefault(tuple(input_tokens), []).append(positions_3P)
        # As scoring and update go on: right behind the prompt's last token, which is text.
        return positions_3P, int(positions_3P[0, -1]) + 1 - len(input_tokens)

    def check(self, prompt: PromptInputs) -> None:
        """Assert that a prompt was given the positions of the training forward; from then on remember nothing.

        Raises:
            EngineMismatchError: it was given others, or none.
        """
        given = self.given.get(tuple(prompt["input_ids"][0].tolist()), [])
        self.remember, self.given = False, {}
        if not given:
            raise EngineMismatchError(
                "vLLM has read a video without asking for its temporal positions: this version takes them from "
                "elsewhere, and they may differ from those of training; use vllm 0.22 to 0.31"
            )
        ours_3P = prompt_positions(self._base, prompt)[:, 0].cpu()
        if not any(torch.equal(ours_3P, theirs_3P) for theirs_3P in given):
            at = int((ours_3P != given[0]).any(dim=0).nonzero()[0])
            raise EngineMismatchError(
                f"vLLM reads token {at} of a prompt at (time, height, width) {given[0][:, at].tolist()}, the training "
                f"forward at {ours_3P[:, at].tolist()}: it was given another frame rate or frame size"
            )

    def _inputs(self, tokens: Sequence[int], features: Sequence[Any]) -> dict[str, Tensor]:
        config, ids_1P = self._base.config, torch.tensor([list(tokens)])
        types_1P = (ids_1P == config.image_token_id).long() + 2 * (ids_1P == config.video_token_id).long()
        inputs = {"input_ids": ids_1P, "attention_mask": torch.ones_like(ids_1P), "mm_token_type_ids": types_1P}
        for name in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts"):
            found = [feature.data[name].data for feature in features if name in feature.data]
            if found:
                inputs[name] = torch.stack([torch.as_tensor(value) for value in found])
        return inputs


class VideoEngine:
    """TRL's vLLM generation, made to see: what `APPOTrainer` asks of it.

    Args:
        generation: TRL's ``VLLMGeneration``; its sampling is kept from vision placeholders.
        base: the Hugging Face model in training.
        tokenizer: its tokenizer.
    """

    def __init__(self, generation: Any, base: Any, tokenizer: Any) -> None:
        self._generation, self._base = generation, base
        self._banned = vision_token_ids(base.config)
        self._positions: TrainingPositions | None = None
        self._precision = torch.get_default_dtype()
        self.checked = False
        settings = dict(generation.generation_kwargs)
        words = [*(settings.get("bad_words") or []), *tokenizer.convert_ids_to_tokens(self._banned)]
        generation.generation_kwargs = settings | {"bad_words": words}
        if generation.mode == "colocate":
            self._see_in_process()

    def _see_in_process(self) -> None:
        llm = self._generation.llm
        model = llm.llm_engine.model_executor.driver_worker.model_runner.get_model()
        if hasattr(model, "get_mrope_input_positions"):
            self._positions = TrainingPositions(self._base, model.get_mrope_input_positions)
            model.get_mrope_input_positions = self._positions
        self._precision = llm.model_config.dtype
        self._generation.llm = VideoLLM(llm)

    def carry(
        self, encoder: PromptEncoder, conversations: Sequence[Messages], encoded: Sequence[PromptInputs]
    ) -> list[list[EnginePrompt] | None]:
        """What travels in the place of each row's images: its conversation for vLLM; None for text alone.

        Rows of a group share one EnginePrompt, and it shares the frames that ``encoded`` was made of.

        Raises:
            ValueError: a vLLM server, to which TRL's client can send pictures only.
        """
        if self._generation.mode == "server":
            raise ValueError(
                "vllm_mode='server' carries no videos: TRL's client sends pictures only, and a server reads videos at "
                "other positions than training does (docs/vllm.md); set vllm_mode to 'colocate', or use_vllm to false"
            )
        carried: list[list[EnginePrompt] | None] = []
        for row, messages in enumerate(conversations):
            if row > 0 and encoded[row] is encoded[row - 1]:
                carried.append(carried[-1])
            elif all(part["type"] == "text" for part in message_parts(messages)):
                carried.append(None)
            else:
                carried.append([_engine_prompt(encoder, messages, encoded[row])])
        return carried

    def check(
        self,
        groups: Sequence[Group],
        score: Callable[[Group, PromptInputs], GroupScores],
        as_forward: Callable[..., Any],
    ) -> None:
        """Assert that vLLM reads and scores as training does: once, as soon as every process has a group with a video.

        Args:
            groups: responses sampled by vLLM, with the sampler's log-probabilities.
            score: the scoring pass of training.
            as_forward: calls its first argument with the others where the policy's parameters can be read.

        Raises:
            EngineMismatchError: positions or log-probabilities differ.
        """
        if self.checked:
            return
        seen = [group for group in groups if "video_grid_thw" in (group[0].inputs or {})]
        # Scoring is a collective operation where parameters are sharded: all processes do it, or none.
        self.checked = all(gather_object([bool(seen)]))
        if self.checked:
            inputs = seen[0][0].inputs
            assert inputs is not None
            if self._positions is not None:
                self._positions.check(inputs)
            scores = score(seen[0], inputs)
            self._check_log_probs(seen[0], scores, as_forward(self._allowed, scores))

    def _check_log_probs(self, group: Group, scores: GroupScores, allowed_GN: Tensor) -> None:
        generation = self._generation
        changed = [
            f"{name}={value}" for name, fine in NEUTRAL.items() if (value := getattr(generation, name)) not in fine
        ]
        changed += [name for name in generation.generation_kwargs if name not in NEUTRAL_EXTRAS]
        if changed:
            logger.warning(
                "with %s vLLM's log-probabilities are of a changed distribution and are not compared with the scoring "
                "pass: tokens and positions are checked, pixels are not",
                ", ".join(changed),
            )
            return
        difference = log_prob_difference(group, scores, allowed_GN)
        full = self._precision == scores.log_probs_GN.dtype == self._base.dtype == torch.float32
        tolerance = TOLERANCE if full else LOW_PRECISION_TOLERANCE
        if not difference <= tolerance:
            raise EngineMismatchError(
                f"vLLM's log-probabilities of its own responses differ from the scoring pass by {difference:.3g} a "
                f"token (at most {tolerance:g} is rounding): it has other weights, or sees another video"
            )

    @torch.no_grad()
    def _allowed(self, scores: GroupScores) -> Tensor:
        """(G, N) log-probability of not sampling a vision placeholder: what vLLM's distribution is normalised by."""
        head, banned_K = self._base.get_output_embeddings(), self._banned
        bias_K = None if head.bias is None else head.bias[banned_K]
        logits_GNK = full_precision(nn.functional.linear(scores.hidden_GNH, head.weight[banned_K], bias_K))
        log_probs_GNK = logits_GNK / self._generation.temperature - scores.log_normalizer_GN[..., None]
        return torch.log1p(-log_probs_GNK.exp().sum(-1).clamp(max=1 - 1e-6))


def log_prob_difference(group: Group, scores: GroupScores, allowed_GN: Tensor) -> float:
    """Mean |log p by the sampler - log p by scoring, of what the sampler may say| over the tokens of a group.

    Tokens whose log-probability vLLM does not know (it says NaN) are left out.
    """
    ours = scores.log_probs_GN.detach() - allowed_GN
    pairs = [
        (sampled, float(ours[g, n]))
        for g, sample in enumerate(group)
        for n, sampled in enumerate(sample.logprobs or [])
        if sampled is not None
    ]
    return sum(abs(sampled - scored) for sampled, scored in pairs) / len(pairs) if pairs else float("nan")
