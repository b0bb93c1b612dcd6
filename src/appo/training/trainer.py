"""APPOTrainer: TRL's GRPOTrainer with video in and per-token (B, T) advantages out; no line of the loss is copied.

What it overrides is listed in tests/training/test_upstream.py. A batch without videos takes TRL's own path, untouched.

Shape suffixes: B rows = Q groups x G responses, N response tokens (padded), F frames.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation

from appo.models.families import family_of, family_or_generic, has_family, unwrap
from appo.models.frame_attention import use_appo_attention
from appo.models.log_probs import score_group
from appo.models.prompt import Prompt
from appo.models.sharding import as_forward, copy_weights, generate_together, is_sharded
from appo.models.vision_tower import equal_vision_passes, freeze_vision_tower
from appo.rollout.dynamic_sampling import TotalReward, is_flat, resample
from appo.rollout.encoding import PromptEncoder
from appo.rollout.generation import VideoCache, evaluation_mode, has_video, pictures, respond
from appo.rollout.groups import Group, Rollout, ScoredGroup, as_generated, as_groups
from appo.rollout.timers import STEP_PARTS, Stopwatch
from appo.rollout.token_weights import Weigher
from appo.rollout.vllm.colocate import VideoEngine
from appo.training.config import APPOConfig, arguments_of, check_groups, with_overlong_punishment
from appo.training.fault_tolerance import PICTURE_COLUMNS, SteadyTrainer
from appo.training.processes import any_process, most_of_all
from appo.training.trl_batch import PackedModel, SeeingModel, batch_weights, by_group, by_row
from appo.training.vision_check import assert_sight
from appo.types import GroupScores
from appo.video.decode_worker import Decoder
from appo.video.frame_cache import cache_in
from appo.video.reader import FrameSampling

# Arguments of GRPOTrainer behind the settings.
_REST = list(inspect.signature(GRPOTrainer.__init__).parameters)[4:]


class APPOTrainer(SteadyTrainer):
    """Train a video language model with GRPO, DAPO or APPO; constructor and datasets are those of ``GRPOTrainer``.

    Rows hold a ``prompt`` column of messages with ``{"type": "video", "video": path}`` parts, plus the columns the
    reward functions need. After each rollout ``on_rollout(step, groups)`` is called with a list of
    :class:`ScoredGroup`, if it is set.

    Raises:
        ValueError: settings that would silently train something else (named, with the fix).
        BlindPolicyError: before the first step, if the policy's answers do not depend on the video.
        FaultyVideosError: too many videos cannot be shown; others are replaced by the next sample.
        RewardError: a reward function raised.
        appo.training.replays.NotFiniteError: a loss or gradient is not finite.
    """

    _tag_names = ["trl", "appo"]  # noqa: RUF012  # TRL's attribute
    _name = "APPO"

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: APPOConfig | None = None, *rest: Any, **kwargs: Any
    ) -> None:
        kwargs = {**dict(zip(_REST, rest, strict=False)), **kwargs}
        args = arguments_of(model, args, kwargs)
        check_groups(args, kwargs.get("train_dataset"), kwargs.get("eval_dataset"))
        weights, classes = args.reward_weights, kwargs.pop("reward_processing_classes", None)
        reward_funcs, classes, args.reward_weights = with_overlong_punishment(args, reward_funcs, classes)
        super().__init__(model, reward_funcs, args, reward_processing_classes=classes, **kwargs)
        args.reward_weights = weights
        self._shows_pictures = self._is_vlm and has_family(self._base_model)
        if args.method == "appo" and self._shows_pictures:
            family_of(self._base_model).captured_layers(args.attention_layers)
        self._accuracy_column = args.accuracy_column(self.reward_func_names)
        self.weigher = Weigher(args.weight_settings, self._accuracy_column, self.temperature, args.frame_attention)
        self.keep("frame shares", self.weigher.shares.state, self.weigher.shares.restore)
        self._engine = self._never_sample(args) if self._is_vlm else None
        self.on_rollout: Any = None
        self.watch = Stopwatch(STEP_PARTS)
        cache, decoder = cache_in(args.frame_cache), Decoder(args.decode_timeout)
        sampling = FrameSampling(args.video_fps, args.video_max_frames, args.video_min_frames)
        self.encoder = PromptEncoder(
            self.processing_class,
            VideoCache(getattr(self.processing_class, "video_processor", None), sampling, cache, decoder),
            self.accelerator.device,
            self.accelerator.autocast,
            self.watch,
            self.chat_template_kwargs,
        )
        self._rollout: Rollout | None = None
        self._seen_prompts: Sequence[Prompt] | None = None
        self._seen_responses = 1
        if args.freeze_vision_tower and self._is_vlm:
            freeze_vision_tower(self._base_model)
        if self._shows_pictures and self.accelerator.distributed_type != DistributedType.NO:
            equal_vision_passes(self._base_model)
        if args.shared_prefix and self._is_vlm:
            use_appo_attention(self._base_model)
        if self.ref_model is not None:
            self._prepare_reference(isinstance(model, str))

    @property
    def _base_model(self) -> Any:
        """The Hugging Face model below accelerate's and PEFT's wrappers."""
        return unwrap(self.accelerator.unwrap_model(self.model))

    def _as_forward(self, work: Any, *args: Any, **kwargs: Any) -> Any:
        """Work that reads the policy's parameters, on however many processes their shards are."""
        return as_forward(self.model_wrapped, partial(work, *args, **kwargs))

    def _prepare_reference(self, loaded_here: bool) -> None:
        """TRL loads the reference from where the policy's configuration came from; it may have been trained since."""
        reference = unwrap(self.accelerator.unwrap_model(self.ref_model))
        if not loaded_here:
            copy_weights(self._base_model, self.ref_model)
        if self.args.shared_prefix and self._is_vlm:
            use_appo_attention(reference)

    def _never_sample(self, args: APPOConfig) -> VideoEngine | None:
        """Ban vision placeholders from sampling: one in a response asks for features that no video has."""
        if self.use_vllm:
            return VideoEngine(self.vllm_generation, self._base_model, self._tokenizer)
        own = self.generation_kwargs.get("suppress_tokens") or []
        banned = sorted({*family_or_generic(self._base_model).banned_ids, *own})
        self.generation_kwargs["suppress_tokens"] = self.generation_config.suppress_tokens = banned
        return None

    # -- the rollout, in the order TRL calls it ------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [self._prepared(row) for row in inputs]
        rows = self._shown_rows(rows) if self.model.training else rows
        # One answer for all processes: each path has collective calls of its own.
        sees = any_process(any(self._shows(row["prompt"]) for row in rows))
        if sees:
            self.args.check_whole_groups()
        self._rollout, self._seen_prompts = Rollout(rows, sees), None
        try:
            return self._scored(self._rollout)
        finally:
            self._rollout = self._seen_prompts = None

    def _shows(self, prompt: Any) -> bool:
        """Whether a prompt takes our path: it has a video, or a picture that this model's packed groups can hold."""
        return has_video(prompt) or (self._shows_pictures and bool(pictures(prompt)))

    def _scored(self, rollout: Rollout) -> dict[str, Any]:
        """TRL's batch of a rollout; with videos or pictures by group, and weighted."""
        # The pictures of columns are in the prompts by now.
        rows = [{name: row[name] for name in row if name not in PICTURE_COLUMNS} for row in rollout.rows]
        output: dict[str, Any] = super()._generate_and_score_completions(rows if self._is_vlm else rollout.rows)
        self.encoder.forget()
        prompts = self._seen_prompts
        if prompts is None:
            return output
        if self.model.training:
            scored = self._score(rollout, prompts, output["advantages"])
            if self.args.method == "appo":
                gather = self.accelerator.gather if self.args.normalize_weights else None
                weights_BN, metrics = batch_weights([g.weights for g in scored], output["completion_mask"], gather)
                # Method step 9: weights >= 0 commute with the clip, so they go into the advantages.
                output["advantages"] = output["advantages"][:, None] * weights_BN
                self._log_means("appo/", metrics)
            if self.on_rollout is not None:
                self.on_rollout(self.state.global_step, scored)
        return {**by_group(output, self._seen_responses), "vision": list(prompts)}

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        rollout, train = self._rollout, self.model.training
        generated: tuple[Any, ...] = super()._generate(prompts)
        if rollout is None or not (rollout.sees or (train and self.args.max_resampling_rounds)):
            return generated
        generations = self.num_generations if train else self.num_generations_eval
        if not train:
            self._see(rollout.encoded[::generations], generations)
            return generated
        groups = self._groups(rollout.rows, prompts, generated)
        if self._engine is not None:
            self._engine.check(groups, self._score_group, self._as_forward)
        groups = self._resample(groups) if self.args.max_resampling_rounds else groups
        samples = rollout.settle(groups)
        prompts[:] = [sample.row["prompt"] for sample in samples]
        for column in {key for sample in samples for key in sample.extras}:
            self._pending_extra_logs[column] = [sample.extras.get(column) for sample in samples]
        self._see([group[0].inputs for group in groups], generations)
        # TRL asks for old log-probabilities first of all, if it does: for vLLM, or if several updates share a rollout.
        stale = self.args.gradient_accumulation_steps % (self.args.steps_per_generation * self.num_iterations) != 0
        stale = stale or (self.use_vllm and self.vllm_importance_sampling_correction)
        rollout.wants_old_log_probs = self.args.method == "appo" and stale and rollout.sees
        return as_generated(samples, generated)

    def _see(self, prompts: Sequence[Prompt | None], responses: int) -> None:
        """From here on, model calls about these groups carry their videos. Without any video: TRL's own path."""
        seen = [prompt for prompt in prompts if prompt is not None]
        self._seen_prompts = seen or None
        self._seen_responses = responses

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[Any, ...]:
        rollout = self._rollout
        if rollout is None or not rollout.sees:
            if rollout is not None:
                rollout.encoded = [None] * len(prompts)
            return tuple(super()._tokenize_prompts(prompts))
        with self.watch("decode"):
            generations = self.num_generations if self.model.training else self.num_generations_eval
            self._check_sight(prompts)
            encoded = [inputs for inputs in map(self._encode, prompts[::generations]) for _ in range(generations)]
            if self._engine is not None:
                rollout.carried = self._engine.carry(self.encoder, prompts, encoded)
        rollout.encoded = list(encoded)
        return [inputs.ids_1P[0].tolist() for inputs in encoded], None, {}

    def _encode(self, prompt: Any) -> Prompt:
        inputs = self.encoder.read(self._base_model, prompt)
        return self._as_forward(self.encoder.see, self._base_model, prompt, inputs, self._agree)  # type: ignore[no-any-return]

    def _agree(self, passes: int) -> int:
        """How often all processes run the vision tower for a prompt, where they must run it together."""
        return most_of_all(passes) if is_sharded(self.model_wrapped) else passes

    def _check_sight(self, prompts: Sequence[Any]) -> None:
        """Before the first prompt with a video in any process; the others make the same passes about one of theirs."""
        if self._checked_sight or not any_process(any(map(has_video, prompts))):
            return
        prompt = next(filter(has_video, prompts), prompts[0])
        inputs = self.encoder.read(self._base_model, prompt)
        assert_sight(self.model, self._log_probs_of_own_words, inputs, inputs.without_pixels(), has_video(prompt))
        self._checked_sight = True

    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, multimodal_fields: Any, num_generations: int, **kwargs: Any
    ) -> Any:
        rollout = self._rollout or Rollout([], sees=False)
        prompts = [inputs for inputs in rollout.encoded[::num_generations] if inputs is not None]
        if self.use_vllm or not prompts:
            images = rollout.carried or images
            with self.watch("generate"):
                return super()._generate_single_turn(prompt_ids, images, multimodal_fields, num_generations, **kwargs)
        unwrapping = unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            generation_kwargs=self.generation_kwargs,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        )
        whole = self._dist.summon_full_params(self.model_wrapped, recurse=False)
        generate_together(self.model_wrapped, self._base_model)
        with self.watch("generate"), unwrapping as model, whole, evaluation_mode(self.model):
            pad = self._tokenizer.pad_token_id
            groups = respond(model, pad, prompts, num_generations, generation_config=self.generation_config)
        return [ids.tolist() for group in groups for ids in group], None

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rollout = self._rollout
        if rollout is not None and rollout.rewards is not None:
            gathered: Tensor = self.accelerator.gather(rollout.rewards)
            return gathered
        rows = inputs if rollout is None else rollout.rows  # these have the columns of pictures too
        return super()._calculate_rewards(rows, prompts, completions, completion_ids_list)  # type: ignore[no-any-return]

    # -- dynamic sampling ------------------------------------------------------------------------------------------

    def _groups(self, rows: list[dict[str, Any]], prompts: list[Any], generated: tuple[Any, ...]) -> list[Group]:
        """What `_generate` returned, with its rewards, as groups of samples."""
        assert self._rollout is not None
        _, completion_ids, _, completions, _, _, _, _ = generated
        with self.watch("rewards"):
            rewards = super()._calculate_rewards(rows, prompts, completions, completion_ids)
        # TRL gathers the rewards of all processes; each keeps its own slice.
        start = self.accelerator.process_index * len(rows)
        extras = {column: list(values) for column, values in self._pending_extra_logs.items()}
        self._pending_extra_logs.clear()
        local = rewards[start : start + len(rows)]
        return as_groups(rows, prompts, generated, self._rollout.encoded, local, extras, self.num_generations)

    def _resample(self, groups: list[Group]) -> list[Group]:
        """Replace groups whose rewards are all equal by fresh prompts, for a bounded number of rounds."""
        rewards_BR = torch.stack([sample.rewards for group in groups for sample in group])
        given = TotalReward(self.reward_weights)(rewards_BR)
        self._log_means("resampling/", {"first_round_reward": (float(given.nansum()), float((~given.isnan()).sum()))})
        total = TotalReward(self.reward_weights, self.multi_objective_aggregation)
        # Every process generates as many groups as the one that needs most: they meet in the same collectives.
        groups, replaced = resample(groups, total, self.args.max_resampling_rounds, self._fresh_groups, most_of_all)
        self._log_mean("resampling/replaced_groups", replaced / len(groups))
        self._log_mean("resampling/flat_groups", sum(is_flat(group, total) for group in groups) / len(groups))
        return groups

    def _fresh_groups(self, count: int) -> list[Group]:
        assert self._rollout is not None
        sees = self._rollout.sees
        # A rollout without any video takes TRL's own path as a whole, so no video may join it.
        fresh = self._draw_shown(count, keep=lambda row: sees or not self._shows(row["prompt"]))
        if not fresh:
            return []
        rows = [row for row in fresh for _ in range(self.num_generations)]
        prompts = [row["prompt"] for row in rows]
        return self._groups(rows, prompts, super()._generate(prompts))

    # -- sight and weights -----------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> Any:
        if self._rollout is not None and self._rollout.wants_old_log_probs:
            self._rollout.wants_old_log_probs = False
            return self._old_log_probs(logits_to_keep), None, None
        rest: Any = (input_ids, attention_mask, logits_to_keep, *args)
        if self._seen_prompts is None:
            return super()._get_per_token_logps_and_entropies(model, *rest, **kwargs)
        about = (self._seen_prompts, self._seen_responses, self._base_model)
        packed = self.args.shared_prefix
        model = PackedModel(model, *about, self.args.rows_per_chunk) if packed else SeeingModel(model, *about)
        # Old and reference log-probabilities are those of a policy without dropout, as it has sampled.
        with nullcontext() if torch.is_grad_enabled() else evaluation_mode(self.model):
            return super()._get_per_token_logps_and_entropies(model, *rest, **kwargs)

    def _log_probs_of_own_words(self, inputs: Prompt) -> Tensor:
        """Of the prompt's last words repeated as a response, by the path the loss takes."""
        words = 4
        ids = torch.cat([inputs.ids_1P, inputs.ids_1P[:, -words:]], dim=1).to(self.accelerator.device)
        self._see([self._as_forward(self.encoder.look, self._base_model, inputs, self._agree)], 1)
        log_probs: Tensor
        log_probs, _, _ = self._get_per_token_logps_and_entropies(self.model, ids, torch.ones_like(ids), words)
        self._seen_prompts = None
        return log_probs

    def _score(self, rollout: Rollout, prompts: Sequence[Prompt], advantages_B: Tensor) -> list[ScoredGroup]:
        """Weigh each group (method steps 1-8), scoring it first unless that is done; other methods do neither."""
        advantages_QG = advantages_B.view(len(rollout.groups), -1)
        wanted = [self.args.method == "appo" and prompt.has_video for prompt in prompts]
        together = gather_object([wanted]) if is_sharded(self.model_wrapped) and not rollout.scores else [wanted]
        scored = []
        for q, (group, prompt, advantages_G) in enumerate(zip(rollout.groups, prompts, advantages_QG, strict=True)):
            times = self.encoder.videos.timestamps(group[0].row["prompt"])
            scores = rollout.scores[q] if rollout.scores else None
            if scores is None and any(process[q] for process in together):  # where sharded, all score if one does
                scores = self._score_group(group, prompt)
            scored.append(ScoredGroup(group, times, advantages_G, scores if wanted[q] else None, None))
        with self.watch("weights"):
            self.weigher.remember(scored, gather_object)
            return [self._as_forward(self.weigher, self._base_model, group) for group in scored]

    def _score_group(self, group: Group, prompt: Prompt) -> GroupScores:
        # Without dropout: the weights are those of the policy that has sampled, and no random number is drawn.
        with torch.no_grad(), self.watch("score"), self.accelerator.autocast(), evaluation_mode(self.model):
            scores: GroupScores = self._as_forward(
                score_group,
                self._base_model,
                prompt,
                [torch.tensor(sample.completion_ids) for sample in group],
                capture_layers=self.args.attention_layers if prompt.has_video else 0,
                temperature=self.temperature,
                shared_prefix=self.args.shared_prefix,
                rows_per_chunk=self.args.rows_per_chunk,
            )
        return scores

    def _old_log_probs(self, length: int) -> Tensor:
        """(B, length) log-probabilities of the rollout's policy, by the pass that captures: it serves both."""
        assert self._rollout is not None
        assert self._seen_prompts is not None
        pairs = zip(self._rollout.groups, self._seen_prompts, strict=True)
        self._rollout.scores = [self._score_group(group, prompt) for group, prompt in pairs]
        log_probs = [scores.log_probs_GN for scores in self._rollout.scores]
        return torch.cat([nn.functional.pad(part, (0, length - part.shape[1])) for part in log_probs])

    # -- the update --------------------------------------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if "vision" not in inputs:
            return super()._compute_loss(model, inputs)
        # What a checkpoint or a replay has kept is a mapping.
        prompts = [Prompt.of(prompt) for prompt in inputs["vision"]]
        self._seen_prompts, self._seen_responses = prompts, inputs["completion_ids"].shape[1]
        rows = {key: value for key, value in inputs.items() if key != "vision"}
        try:
            return super()._compute_loss(model, by_row(rows))
        finally:
            self._seen_prompts = None

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.watch("update"):
            loss: Tensor = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            parts = self.watch.read()
            for part, seconds in parts.items():
                self._log_mean(f"time/{part}", seconds)
            self._log_mean("appo/score_share", (parts["score"] + parts["weights"]) / sum(parts.values()))
        return loss
