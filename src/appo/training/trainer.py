"""APPOTrainer: TRL's GRPOTrainer with video in and per-token (B, N) advantages out; no line of the loss is copied.

A rollout with videos or pictures is `appo.rollout.pipeline`; one of text alone is TRL's own, untouched. What is
overridden is listed in docs/upstream.md.

Shape suffixes: B rows = Q groups x G responses, N response tokens (padded).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from trl import GRPOTrainer

from appo.models.families import family_of, family_or_generic, has_family, unwrap
from appo.models.frame_attention import use_appo_attention
from appo.models.prompt import Prompt
from appo.models.sharding import copy_weights
from appo.models.vision_tower import equal_vision_passes, freeze_vision_tower
from appo.rollout.collectives import any_process
from appo.rollout.dynamic_sampling import TotalReward
from appo.rollout.encoding import PromptEncoder
from appo.rollout.generation import (
    VideoCache,
    has_video,
    has_vision,
    pictures,
)
from appo.rollout.pipeline import RolloutPipeline, RolloutSettings
from appo.rollout.timers import Stopwatch
from appo.rollout.token_weights import Weigher
from appo.rollout.vllm.colocate import VideoEngine, check_family
from appo.training.config import APPOConfig, arguments_of, check_groups, with_overlong_punishment
from appo.training.fault_tolerance import PICTURE_COLUMNS, FaultTolerantTrainer
from appo.training.trl_batch import UNWEIGHED, BatchMaker, by_group, by_row
from appo.training.trl_engine import TRLEngine
from appo.training.update import PackedModel, RowsModel, UpdateScoring, scores_first
from appo.training.vision_check import assert_vision
from appo.types import STEP_PARTS, Group
from appo.video.decode_worker import Decoder
from appo.video.frame_cache import cache_in
from appo.video.reader import FrameSampling

# Arguments of GRPOTrainer behind the settings.
_REST = list(inspect.signature(GRPOTrainer.__init__).parameters)[4:]


class APPOTrainer(FaultTolerantTrainer):
    """Train a video language model with GRPO, DAPO or APPO; constructor and datasets are those of ``GRPOTrainer``.

    Rows hold a ``prompt`` column of messages with ``{"type": "video", "video": path}`` parts, plus the columns the
    reward functions need. ``on_rollout(step, groups)`` is called, if it is set, with each rollout's list of
    `appo.types.Group` as soon as they have all that they will get: before the update, or, where the update makes the
    token weights, after its last forward pass.

    Raises:
        ValueError: settings that would silently train something else (named, with the fix).
        BlindPolicyError: before the first step, if the policy's answers do not depend on the video.
        FaultyVideosError: too many videos cannot be shown; others are replaced by the next sample.
        RewardError: a reward function raised.
        appo.training.fault_tolerance.NotFiniteError: a loss or gradient is not finite.
    """

    _tag_names = ["trl", "appo"]  # noqa: RUF012  # TRL's attribute
    _name = "APPO"

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: APPOConfig | None = None, *rest: Any, **kwargs: Any
    ) -> None:
        kwargs = {**dict(zip(_REST, rest, strict=False)), **kwargs}
        args = arguments_of(model, args, kwargs)
        check_groups(args, kwargs.get("train_dataset"), kwargs.get("eval_dataset"))
        if args.use_vllm and not isinstance(model, str):
            check_family(model)  # before TRL builds the engine
        weights, classes = args.reward_weights, kwargs.pop("reward_processing_classes", None)
        reward_funcs, classes, args.reward_weights = with_overlong_punishment(args, reward_funcs, classes)
        super().__init__(model, reward_funcs, args, reward_processing_classes=classes, **kwargs)
        args.reward_weights = weights
        self._has_family = self._is_vlm and has_family(self.base_model)
        if args.method == "appo" and self._has_family:
            family_of(self.base_model).captured_layers(args.attention_layers)
        weigher = Weigher(args.weight_settings, args.accuracy_column(self.reward_func_names), self.temperature,
                          args.frame_attention)  # fmt: skip
        self.register_state("frame shares", weigher.shares.state, weigher.shares.restore)
        self.on_rollout: Any = None
        self.watch = Stopwatch(STEP_PARTS)
        self.encoder = self._prompt_encoder(args)
        self.engine = TRLEngine(self, self._without_placeholders() if self._is_vlm else None)
        self.make_batch, self.update_scoring = BatchMaker(self), UpdateScoring(self)
        self.pipeline = RolloutPipeline(
            self, self.engine, self.encoder, weigher, self._rollout_settings(args), self._fresh_rows, self.log_means,
            self.accelerator.autocast, self.watch,
        )  # fmt: skip
        self._prepare_models(args, loaded_here=isinstance(model, str))

    def _prompt_encoder(self, args: APPOConfig) -> PromptEncoder:
        cache, decoder = cache_in(args.frame_cache), Decoder(args.decode_timeout)
        sampling = FrameSampling(args.video_fps, args.video_max_frames, args.video_min_frames)
        return PromptEncoder(
            self.processing_class,
            VideoCache(getattr(self.processing_class, "video_processor", None), sampling, cache, decoder),
            self.accelerator.device,
            self.accelerator.autocast,
            self.watch,
            self.chat_template_kwargs,
        )

    def _rollout_settings(self, args: APPOConfig) -> RolloutSettings:
        return RolloutSettings(
            weighted=args.method == "appo",
            old_log_probs=self.needs_old_log_probs,
            in_update=args.method == "appo" and self._has_family and self.scores_first == "",
            attention_layers=args.attention_layers,
            temperature=self.temperature,
            shared_prefix=args.shared_prefix,
            rows_per_chunk=args.rows_per_chunk,
            max_resampling_rounds=args.max_resampling_rounds or 0,
            reward=TotalReward(self.reward_weights, self.multi_objective_aggregation),
        )

    def _without_placeholders(self) -> VideoEngine | None:
        """Ban vision placeholders from sampling: one in a response asks for features that no video has."""
        if self.use_vllm:
            return VideoEngine(self.vllm_generation, self.base_model, self._tokenizer)
        own = self.generation_kwargs.get("suppress_tokens") or []
        banned = sorted({*family_or_generic(self.base_model).banned_ids, *own})
        self.generation_kwargs["suppress_tokens"] = self.generation_config.suppress_tokens = banned
        return None

    def _prepare_models(self, args: APPOConfig, loaded_here: bool) -> None:
        """Freeze, keep processes in step, and set the attention function of policy and reference."""
        if args.freeze_vision_tower and self._is_vlm:
            freeze_vision_tower(self.base_model)
        if self._has_family and self.accelerator.distributed_type != DistributedType.NO:
            equal_vision_passes(self.base_model)
        # TRL loads the reference from where the policy's configuration came from; it may have been trained since.
        if self.ref_model is not None and not loaded_here:
            copy_weights(self.base_model, self.ref_model)
        reentrant = args.gradient_checkpointing and (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
        if reentrant and getattr(self.base_model.config.get_text_config(), "num_kv_shared_layers", 0):
            raise ValueError(
                "gradient_checkpointing_kwargs: with use_reentrant transformers loses gradients of layers that share "
                "their keys: set it to false"
            )
        for model in filter(None, (self.model, self.ref_model)):
            base = unwrap(self.accelerator.unwrap_model(model))  # with the positions of pre-training
            if args.shared_prefix and self._is_vlm:
                use_appo_attention(base)

    @property
    def base_model(self) -> Any:
        """The Hugging Face model below accelerate's and PEFT's wrappers."""
        return unwrap(self.accelerator.unwrap_model(self.model))

    @property
    def needs_old_log_probs(self) -> bool:
        """Whether the loss reads the log-probabilities of the policy that has sampled (TRL's rule)."""
        every = self.args.steps_per_generation * self.num_iterations
        several = self.args.gradient_accumulation_steps % every != 0
        return several or bool(self.use_vllm and self.vllm_importance_sampling_correction)

    @property
    def scores_first(self) -> str:
        """Why groups are scored before the update, by a pass of their own; "": the update's forward pass does it."""
        return (
            "the loss reads old log-probabilities" if self.needs_old_log_probs else scores_first(self.args, self.model)
        )

    # -- the rollout ---------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        rows, train = [self._prepared(row) for row in inputs], self.model.training
        rows = self._readable_rows(rows) if train else rows
        # One answer for all processes: each path has collective calls of its own.
        vision = any_process(any(self._is_visual(row["prompt"]) for row in rows))
        if not vision and not (train and self.args.max_resampling_rounds):
            # The pictures of columns are in the prompts by now.
            plain = [{name: row[name] for name in row if name not in PICTURE_COLUMNS} for row in rows]
            with self.watch("generate"):
                text: dict[str, Any] = super()._generate_and_score_completions(plain if self._is_vlm else rows)
            return text
        self._check_rows(rows, vision)
        responses = self.num_generations if train else self.num_generations_eval
        try:
            groups = self.pipeline(rows[::responses], responses, vision=vision, train=train)
            batch = self.make_batch(groups)
        finally:
            self.encoder.clear()
        if UNWEIGHED in batch:
            self.update_scoring.open(groups)
        elif train and vision:
            self._report(groups)
        return batch

    def _report(self, groups: Sequence[Group]) -> None:
        if groups and self.on_rollout is not None:
            self.on_rollout(self.state.global_step, groups)

    def _is_visual(self, prompt: Any) -> bool:
        """Whether a prompt takes our path: it has a video, or a picture that this model's packed groups can hold."""
        return has_video(prompt) or (self._has_family and bool(pictures(prompt)))

    def _check_rows(self, rows: Sequence[dict[str, Any]], vision: bool) -> None:
        """Refuse rows that the pipeline cannot take; before the first video, check that the policy depends on it.

        Raises:
            ValueError: batches cut groups with videos or pictures, or dynamic sampling would need pictures of a model
                that is no known family.
            BlindPolicyError: see `vision_check`.
        """
        if vision:
            self.args.check_whole_groups()
        elif any(pictures(row["prompt"]) for row in rows):
            raise ValueError(
                f"dynamic sampling of prompts with pictures needs a known model family, not "
                f"{self.base_model.config.model_type!r}: set max_resampling_rounds to 0 (docs/families.md)"
            )
        prompts = [row["prompt"] for row in rows]
        if self._checked_vision or not vision or not any_process(any(map(has_video, prompts))):
            return
        # The processes without a video make the same passes about one of their prompts.
        prompt = next(filter(has_video, prompts), prompts[0])
        with self.watch("decode"):
            inputs = self.encoder.read(self.base_model, prompt)
            assert_vision(self.model, self._log_probs_of_own_words, inputs, inputs.without_pixels(), has_video(prompt))
        self._checked_vision = True

    def _log_probs_of_own_words(self, inputs: Prompt) -> Tensor:
        """Of the prompt's last words repeated as a response, by the path the loss takes."""
        words = 4
        prompt = self.pipeline.as_forward(self.encoder.vision_features, self.base_model, inputs, self.pipeline.agree)
        ids = torch.cat([inputs.ids_1P, inputs.ids_1P[:, -words:]], dim=1).to(self.accelerator.device)
        model = self.carrying(self.model, [prompt], 1)
        log_probs: Tensor
        log_probs, _, _ = self._get_per_token_logps_and_entropies(model, ids, torch.ones_like(ids), words)
        return log_probs

    def _fresh_rows(self, count: int, vision: bool) -> list[dict[str, Any]]:
        """For dynamic sampling. A rollout of text takes TRL's own path as a whole, so no video may join it."""
        return self._draw_readable(count, keep=lambda row: vision or not has_vision(row))

    # -- the update --------------------------------------------------------------------------------------------------

    def carrying(self, model: Any, prompts: Sequence[Prompt], responses: int) -> Any:
        """A model for TRL to call with the rows of whole groups, which adds what their prompts show."""
        if self.args.shared_prefix:
            return PackedModel(model, prompts, responses, self.base_model, self.args.rows_per_chunk)
        return RowsModel(model, prompts, responses, self.base_model)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if "vision" not in inputs:
            text: Tensor = super()._compute_loss(model, inputs)
            return text
        rows = by_row({key: value for key, value in inputs.items() if key not in ("vision", UNWEIGHED)})
        prompts = [Prompt.of(prompt) for prompt in inputs["vision"]]  # mappings, if a checkpoint holds them
        responses = inputs["completion_ids"].shape[1]
        if UNWEIGHED in inputs:
            model, rows["advantages"] = self.update_scoring(model, prompts, rows, inputs.pop(UNWEIGHED))
            inputs["advantages"] = by_group({"advantages": rows["advantages"]}, responses)["advantages"]  # for a replay
            self._report(self.update_scoring.close())
        else:
            model = self.carrying(model, prompts, responses)
        loss: Tensor = super()._compute_loss(model, rows)
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.watch("update"):
            loss: Tensor = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            parts = self.watch.read()
            share = (parts["score"] + parts["weights"]) / sum(parts.values())
            means = {f"time/{part}": seconds for part, seconds in parts.items()} | {"appo/score_share": share}
            self.log_means({name: (value, 1.0) for name, value in means.items()})
        return loss
