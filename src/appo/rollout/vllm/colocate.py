"""Videos through TRL's vLLM rollouts: the frames, tokens and positions of the training forward, and checks of that.

TRL hands its engine images only. A prompt with videos travels through TRL's code in the place of a list of images, as
one EnginePrompt, and is unpacked right before the engine. Weights, sampling and importance sampling stay TRL's.

Shape suffixes: G responses, N response tokens (padded), K banned tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from appo.models.families import family_or_generic, has_family
from appo.models.log_probs import softcap_of, word_logits
from appo.models.prompt import Prompt
from appo.rollout.collectives import gather_values
from appo.rollout.encoding import PromptEncoder
from appo.rollout.generation import Messages, message_parts
from appo.rollout.vllm.prompts import EngineMismatchError, EnginePrompt, TrainingPositions, check_tokens, engine_prompt
from appo.rollout.vllm.server import VideoClient
from appo.types import Group, GroupScores

logger = logging.getLogger(__name__)

# Largest mean |log p by vLLM - log p by scoring| over the tokens of a group: both in float32, or one of them not.
TOLERANCE, LOW_PRECISION_TOLERANCE = 1e-3, 0.1
# Settings of vLLM's sampling that leave the log-probabilities it reports those of softmax(logits / temperature).
NEUTRAL = {"top_p": (1.0,), "top_k": (0, -1, None), "min_p": (0.0, None), "repetition_penalty": (1.0,)}
NEUTRAL_EXTRAS = {"bad_words", "seed", "stop", "stop_token_ids", "max_tokens"}


def check_family(model: Any) -> None:
    """Refuse families whose prompts are not known to be the same in vLLM. Raises ValueError."""
    if has_family(model) and not family_or_generic(model).vllm:
        raise ValueError(
            f"vLLM samples for no {model.config.model_type} model here: set use_vllm to false (docs/families.md)"
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


class VideoEngine:
    """TRL's vLLM generation, made to see: what `APPOTrainer` asks of it.

    Args:
        generation: TRL's ``VLLMGeneration``; its sampling is kept from vision placeholders.
        base: the Hugging Face model in training.
        tokenizer: its tokenizer.

    Raises:
        ValueError: see `check_family`.
    """

    def __init__(self, generation: Any, base: Any, tokenizer: Any) -> None:
        check_family(base)
        self._generation, self._base = generation, base
        self._banned = family_or_generic(base).banned_ids
        self._positions: TrainingPositions | None = None
        self._precision: str | None = None
        self.checked = False
        settings = dict(generation.generation_kwargs)
        words = [*(settings.get("bad_words") or []), *tokenizer.convert_ids_to_tokens(self._banned)]
        generation.generation_kwargs = settings | {"bad_words": words}
        if generation.mode == "colocate":
            self._see_in_process()
        elif generation.accelerator.is_main_process:  # the others send it their prompts
            self._see_through_server()

    def _see_in_process(self) -> None:
        llm = self._generation.llm
        model = llm.llm_engine.model_executor.driver_worker.model_runner.get_model()
        if hasattr(model, "get_mrope_input_positions"):
            self._positions = TrainingPositions(self._base, model.get_mrope_input_positions)
            model.get_mrope_input_positions = self._positions
        self._precision = str(llm.model_config.dtype)
        self._generation.llm = VideoLLM(llm)

    def _see_through_server(self) -> None:
        generation, place_images = self._generation, self._generation._place_features
        generation.vllm_client = VideoClient(generation.vllm_client, generation.model.name_or_path)
        # Features of videos know their places already; TRL finds those of images alone.
        generation._place_features = lambda features, ids: (
            features if "video" in (features or {}).get("mm_placeholders", {}) else place_images(features, ids)
        )
        self._precision = str(generation.vllm_client.get_server_info()["model_config"]["dtype"])

    def carry(
        self, encoder: PromptEncoder, conversations: Sequence[Messages], encoded: Sequence[Prompt]
    ) -> list[list[EnginePrompt] | None]:
        """What travels in the place of each prompt's images: its conversation for vLLM; None for text alone.

        An EnginePrompt shares the frames that ``encoded`` was made of.
        """
        return [
            None
            if all(part["type"] == "text" for part in message_parts(messages))
            else [engine_prompt(encoder, messages, prompt)]
            for messages, prompt in zip(conversations, encoded, strict=True)
        ]

    def check(
        self,
        groups: Sequence[Group],
        score: Callable[[Group], GroupScores],
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
        seen = [group for group in groups if group.prompt is not None and group.prompt.has_video]
        # Scoring is a collective operation where parameters are sharded: all processes do it, or none.
        self.checked = all(gather_values(bool(seen)))
        if self.checked:
            if self._positions is not None:
                self._positions.check(seen[0].prompt)
            scores = score(seen[0])
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
        full = self._precision == str(self._base.dtype) == "torch.float32"
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
        softcap = softcap_of(self._base)
        logits_GNK = word_logits(head, scores.hidden_GNH, banned_K, softcap) / self._generation.temperature
        log_probs_GNK = logits_GNK - scores.log_normalizer_GN[..., None]
        return torch.log1p(-log_probs_GNK.exp().sum(-1).clamp(max=1 - 1e-6))


def log_prob_difference(group: Group, scores: GroupScores, allowed_GN: Tensor) -> float:
    """Mean |log p by the sampler - log p by scoring, of what the sampler may say| over the tokens of a group.

    Tokens whose log-probability vLLM does not know (it says NaN) are left out.
    """
    scored_GN = scores.log_probs_GN.detach() - allowed_GN
    pairs = [
        (sampled, float(scored_GN[g, n]))
        for g, sample in enumerate(group.samples)
        for n, sampled in enumerate(sample.logprobs or [])
        if sampled is not None
    ]
    return sum(abs(sampled - scored) for sampled, scored in pairs) / len(pairs) if pairs else float("nan")
