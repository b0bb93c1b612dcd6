"""What TRL does in a rollout: sampling, reward functions, advantages, and what it logs of them.

Where TRL has no method of its own for a step, its arithmetic is written here again and held equal to it by
tests/training/test_trl_engine.py: the lengths that `_generate` logs, and the advantages of
`_generate_and_score_completions`.

Shape suffixes: B rows of this process = Q groups x G responses, A rows of all processes, R reward functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from trl.chat_template_utils import parse_response
from trl.data_utils import is_conversational
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import nanstd

from appo.data.table import question_of
from appo.models.sharding import generate_together
from appo.rollout.collectives import gather_list, gather_tensor, gather_values, process_slice
from appo.rollout.dynamic_sampling import TotalReward
from appo.rollout.generation import evaluation_mode, respond
from appo.rollout.pipeline import RolloutPipeline, Row
from appo.rollout.vllm.colocate import VideoEngine
from appo.types import Group, Sample


class TRLEngine:
    """The `Engine` of a rollout pipeline, made of a GRPOTrainer.

    Args:
        trainer: the trainer.
        vllm: its vLLM generation with videos; None: transformers generates.
    """

    def __init__(self, trainer: Any, vllm: VideoEngine | None) -> None:
        self._trainer, self.vllm = trainer, vllm

    # -- sampling ------------------------------------------------------------------------------------------------

    def generate(self, groups: Sequence[Group], responses: int) -> list[Group]:
        """Sample G responses to each encoded prompt, with the trainer's generation settings."""
        sample = self._by_transformers if self.vllm is None else self._by_vllm
        ids, logprobs = sample(groups, responses)
        prompts = [group.row["prompt"] for group in groups for _ in range(responses)]
        prompt_ids = [group.prompt_ids for group in groups for _ in range(responses)]
        self._log_lengths(prompt_ids, ids)
        return _with_samples(groups, ids, self._completions(prompts, prompt_ids, ids), logprobs, responses)

    def generate_text(self, rows: Sequence[Row], responses: int) -> list[Group]:
        """TRL's own rollout of text, up to the rewards."""
        prompts = [row["prompt"] for row in rows for _ in range(responses)]
        with self._trainer.watch("generate"):
            prompt_ids, ids, _, completions, logprobs, _, _, _ = self._trainer._generate(prompts)
        groups = [Group(row, question_of(row), prompt_ids=prompt_ids[q * responses]) for q, row in enumerate(rows)]
        return _with_samples(groups, ids, completions, logprobs, responses)

    def _by_transformers(self, groups: Sequence[Group], responses: int) -> tuple[list[list[int]], None]:
        trainer = self._trainer
        unwrapping = unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
            generation_kwargs=trainer.generation_kwargs,
            gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
        )
        whole = trainer._dist.summon_full_params(trainer.model_wrapped, recurse=False)
        generate_together(trainer.model_wrapped, trainer.base_model)
        with unwrapping as model, whole, evaluation_mode(trainer.model):
            pad = trainer._tokenizer.pad_token_id
            prompts = [group.prompt for group in groups]
            sampled = respond(model, pad, prompts, responses, generation_config=trainer.generation_config)
        return [ids.tolist() for ids_G in sampled for ids in ids_G], None

    def _by_vllm(self, groups: Sequence[Group], responses: int) -> tuple[list[list[int]], list[Any]]:
        assert self.vllm is not None
        conversations, prompts = [group.row["prompt"] for group in groups], [group.prompt for group in groups]
        with self._trainer.watch("decode"):
            carried = self.vllm.carry(self._trainer.encoder, conversations, prompts)
        prompt_ids = [group.prompt_ids for group in groups for _ in range(responses)]
        images = [one for one in carried for _ in range(responses)]
        return self._trainer._generate_single_turn(prompt_ids, images, {}, responses)  # type: ignore[no-any-return]

    def check(self, groups: Sequence[Group], pipeline: RolloutPipeline) -> None:
        """Assert that vLLM reads and scores a video as training does: with the first groups that have one."""
        if self.vllm is not None:
            self.vllm.check(groups, pipeline.scores_of, pipeline.as_forward)

    def _completions(self, prompts: list[Any], prompt_ids: list[list[int]], ids: list[list[int]]) -> list[Any]:
        """Responses as reward functions see them, as TRL's `_generate` makes them."""
        trainer = self._trainer
        tokenizer = trainer._tokenizer
        names = ("response_template", "response_schema")
        if is_conversational({"prompt": prompts[0]}) and any(getattr(tokenizer, name, None) for name in names):
            pairs = zip(ids, prompt_ids, strict=True)
            return [[parse_response(tokenizer, own, prefix=prefix, tools=trainer.tools)] for own, prefix in pairs]
        texts = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
        if not is_conversational({"prompt": prompts[0]}):
            return list(texts)
        return [[{"role": "assistant", "content": text}] for text in texts]

    def _log_lengths(self, prompt_ids: Sequence[list[int]], ids: Sequence[list[int]]) -> None:
        """The metrics of TRL's `_generate`."""
        trainer, device = self._trainer, self._trainer.accelerator.device
        train = trainer.model.training
        metrics = trainer._metrics["train" if train else "eval"]
        prompt_A = gather_tensor(torch.tensor([len(one) for one in prompt_ids], device=device))
        length_A = gather_tensor(torch.tensor([len(one) for one in ids], device=device))
        truncated_A = gather_tensor(self.truncated(ids))
        if train:
            trainer.state.num_input_tokens_seen += (prompt_A.sum() + length_A.sum()).item()
        metrics["num_tokens"] = [trainer.state.num_input_tokens_seen]
        metrics["completions/clipped_ratio"].append(truncated_A.float().mean().item())
        ended_A = length_A[~truncated_A] if not truncated_A.all() else torch.zeros(1, device=device)
        for infix, lengths in (("", length_A.float()), ("terminated_", ended_A.float())):
            metrics[f"completions/mean_{infix}length"].append(lengths.mean().item())
            metrics[f"completions/min_{infix}length"].append(lengths.min().item())
            metrics[f"completions/max_{infix}length"].append(lengths.max().item())

    def truncated(self, ids: Sequence[list[int]]) -> Tensor:
        """bool (B,): responses that reached their largest length."""
        ends = [*self._trainer.eos_token_ids, self._trainer._tokenizer.pad_token_id]
        return torch.tensor([one[-1] not in ends for one in ids], device=self._trainer.accelerator.device)

    # -- rewards and advantages ----------------------------------------------------------------------------------

    def reward(self, groups: Sequence[Group]) -> list[Group]:
        """TRL's call of the reward functions; each sample gets its numbers and the columns logged for it."""
        trainer = self._trainer
        samples = [(group.row, sample) for group in groups for sample in group.samples]
        rows, prompts = [row for row, _ in samples], [row["prompt"] for row, _ in samples]
        completions, ids = [sample.completion for _, sample in samples], [sample.ids for _, sample in samples]
        rewards_AR = trainer._calculate_rewards(rows, prompts, completions, ids)
        rewards_BR = rewards_AR[process_slice(len(samples))]
        columns = {column: list(values) for column, values in trainer._pending_extra_logs.items()}
        trainer._pending_extra_logs.clear()
        rewarded = iter(
            replace(sample, rewards_R=rewards_BR[b], extras={column: values[b] for column, values in columns.items()})
            for b, (_, sample) in enumerate(samples)
        )
        return [replace(group, samples=[next(rewarded) for _ in group.samples]) for group in groups]

    def advantages(self, groups: Sequence[Group]) -> list[Group]:
        """The advantages of TRL, over the rewards of all processes; logs what TRL logs of them."""
        responses = len(groups[0].samples)
        rewards_AR = gather_tensor(torch.cat([group.rewards_GR for group in groups]))
        totals_A = TotalReward(self._trainer.reward_weights)(rewards_AR)
        advantages_A, is_flat = self._advantages(rewards_AR, totals_A, responses)
        self._log_rewards(rewards_AR, totals_A, is_flat)
        self._log_completions(groups, rewards_AR, advantages_A)
        own_QG = advantages_A[process_slice(len(groups) * responses)].view(-1, responses)
        return [replace(group, advantages_G=own_QG[q]) for q, group in enumerate(groups)]

    def _advantages(self, rewards_AR: Tensor, totals_A: Tensor, responses: int) -> tuple[Tensor, Tensor]:
        """float (A,): TRL's advantages, 0 where no function has rewarded; and bool: where deviations are 0."""
        trainer = self._trainer
        if trainer.multi_objective_aggregation == "normalize_then_sum":
            rewards_QGR = rewards_AR.view(-1, responses, rewards_AR.shape[1])
            mean_Q1R = rewards_QGR.nanmean(dim=1, keepdim=True)
            std_Q1R = nanstd(rewards_QGR, dim=1, keepdim=True) if responses > 1 else torch.zeros_like(mean_Q1R)
            summands_AR = ((rewards_QGR - mean_Q1R) / (std_Q1R + 1e-4)).view(rewards_AR.shape)
            weights_R = trainer.reward_weights.to(rewards_AR.device)
            totals_A = (summands_AR * weights_R).nansum(dim=1).masked_fill(totals_A.isnan(), torch.nan)
            std_A = _std_of_all(totals_A)
            advantages_A = (totals_A - totals_A.nanmean()) / (std_A + 1e-4)
        else:
            totals_QG = totals_A.view(-1, responses)
            if trainer.scale_rewards == "batch":
                std_A = _std_of_all(totals_A)
            else:
                std_Q = nanstd(totals_QG, dim=1) if responses > 1 else torch.zeros_like(totals_QG[:, 0])
                std_A = std_Q.repeat_interleave(responses)
            advantages_A = totals_A - totals_QG.nanmean(dim=1).repeat_interleave(responses)
            if trainer.scale_rewards != "none":
                advantages_A = advantages_A / (std_A + 1e-4)
        return advantages_A.nan_to_num(nan=0.0), torch.isclose(std_A, torch.zeros_like(std_A))

    def _log_rewards(self, rewards_AR: Tensor, totals_A: Tensor, is_flat: Tensor) -> None:
        trainer = self._trainer
        metrics = trainer._metrics["train" if trainer.model.training else "eval"]
        for r, name in enumerate(trainer.reward_func_names):
            metrics[f"rewards/{name}/mean"].append(rewards_AR[:, r].nanmean().item())
            metrics[f"rewards/{name}/std"].append(nanstd(rewards_AR[:, r]).item())
        metrics["reward"].append(totals_A.nanmean().item())
        metrics["reward_std"].append(nanstd(totals_A).item())
        metrics["frac_reward_zero_std"].append(is_flat.float().mean().item())
        pending = trainer._pending_metrics
        for name in sorted(set(gather_list(list(pending)))):
            own = torch.tensor([sum(pending.get(name, [])), len(pending.get(name, []))], dtype=torch.float32)
            total, count = gather_tensor(own[None].to(rewards_AR.device)).sum(dim=0).tolist()
            metrics[name].append(total / count)
        pending.clear()

    def _log_completions(self, groups: Sequence[Group], rewards_AR: Tensor, advantages_A: Tensor) -> None:
        """The queues that TRL's table of completions is made from."""
        trainer, logs = self._trainer, self._trainer._logs
        samples = [sample for group in groups for sample in group.samples]
        logs["prompt"].extend(gather_list([group.row["prompt"] for group in groups for _ in group.samples]))
        logs["completion"].extend(gather_list([sample.completion for sample in samples]))
        for r, name in enumerate(trainer.reward_func_names):
            logs["rewards"][name].extend(rewards_AR[:, r].tolist())
        logs["advantages"].extend(advantages_A.tolist())
        own = sorted({column for sample in samples for column in sample.extras})
        for column in sorted({name for names in gather_values(own) for name in names}):
            logs["extra"][column].extend(gather_list([sample.extras.get(column) for sample in samples]))


def _std_of_all(totals_A: Tensor) -> Tensor:
    return nanstd(totals_A).expand_as(totals_A) if totals_A.numel() > 1 else torch.zeros_like(totals_A)


def _with_samples(
    groups: Sequence[Group], ids: list[list[int]], completions: list[Any], logprobs: list[Any] | None, responses: int
) -> list[Group]:
    """The groups with what was sampled, given one response after another."""
    none = torch.empty(0)
    samples = [
        Sample(own, completions[b], none, None if logprobs is None else logprobs[b]) for b, own in enumerate(ids)
    ]
    return [replace(group, samples=samples[q * responses :][:responses]) for q, group in enumerate(groups)]
