"""Groups -> TRL's batch dictionary.

TRL shuffles and splits whatever has a first dimension. Handing it groups instead of rows keeps each group, and the one
copy of its pixels, together through both.

Shape suffixes: B rows = Q groups x G responses, P prompt tokens (padded), N response tokens (padded).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import pad, use_adapter

from appo.rollout.collectives import gather_tensor
from appo.rollout.generation import evaluation_mode
from appo.types import Group, PerceptionWeights

# Of the importance sampling ratio's logs: TRL's name, and over the tokens of all processes.
RATIOS = "sampling/importance_sampling_ratio"
# Key of a batch whose weights the update makes: of each of its groups, the number in its rollout.
UNWEIGHED = "unweighed"


@dataclass(frozen=True)
class Rows:
    """The rows of a batch as TRL's loss takes them, on the trainer's device."""

    prompt_ids_BP: Tensor  # int64 (B, P), padded on the left
    prompt_mask_BP: Tensor  # int64 (B, P), 1 on prompt tokens
    ids_BN: Tensor  # int64 (B, N), padded on the right
    mask_BN: Tensor  # (B, N), 1 on response tokens that count


def rows_of_groups(groups: Sequence[Group], pad_token_id: int, multiple: int | None, device: torch.device) -> Rows:
    """The groups' rows, one group after another.

    Args:
        groups: of a rollout.
        pad_token_id: where there is no token.
        multiple: TRL's ``pad_to_multiple_of``.
        device: of the tensors.
    """
    prompts = [torch.tensor(group.prompt_ids) for group in groups for _ in group.samples]
    responses = [torch.tensor(sample.ids) for group in groups for sample in group.samples]

    def padded(rows: list[Tensor], value: int, side: str) -> Tensor:
        tensor: Tensor = pad(rows, padding_value=value, padding_side=side, pad_to_multiple_of=multiple)
        return tensor.to(device)

    return Rows(
        padded(prompts, pad_token_id, "left"),
        padded([torch.ones_like(ids) for ids in prompts], 0, "left"),
        padded(responses, pad_token_id, "right"),
        padded([torch.ones_like(ids) for ids in responses], 0, "right"),
    )


class BatchMaker:
    """Groups of a rollout -> the dictionary that TRL's loss takes.

    It has what TRL's own `_generate_and_score_completions` makes of rows (the tests compare them), and by group where
    prompts have videos or pictures, with these under ``vision``; see :data:`UNWEIGHED`.

    Args:
        trainer: a GRPOTrainer.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def __call__(self, groups: Sequence[Group]) -> dict[str, Any]:
        """The batch of this process's groups."""
        trainer = self._trainer
        rows = rows_of_groups(
            groups, trainer._tokenizer.pad_token_id, trainer.pad_to_multiple_of, trainer.accelerator.device
        )
        if trainer.mask_truncated_completions:
            truncated_B = trainer.engine.truncated([sample.ids for group in groups for sample in group.samples])
            rows = Rows(rows.prompt_ids_BP, rows.prompt_mask_BP, rows.ids_BN, rows.mask_BN * ~truncated_B[:, None])
        advantages = [group.advantages_G for group in groups if group.advantages_G is not None]
        batch: dict[str, Any] = {
            "prompt_ids": rows.prompt_ids_BP,
            "prompt_mask": rows.prompt_mask_BP,
            "completion_ids": rows.ids_BN,
            "completion_mask": rows.mask_BN,
            "advantages": torch.cat(advantages),
            "num_items_in_batch": gather_tensor(rows.mask_BN.sum()).sum(),
        }
        batch |= self._log_probs(groups, rows)
        if groups[0].prompt is None:
            return batch
        grouped = {"vision": [group.prompt for group in groups]}
        if trainer.model.training and trainer.pipeline.settings.in_update:
            grouped[UNWEIGHED] = list(range(len(groups)))
        elif trainer.model.training and trainer.args.method == "appo":
            gather = gather_tensor if trainer.args.normalize_weights else None
            weights_BN, metrics = batch_weights([group.weights for group in groups], rows.mask_BN, gather)
            # Method step 9: weights >= 0 commute with the clip, so they go into the advantages.
            batch["advantages"] = batch["advantages"][:, None] * weights_BN
            trainer.log_means({f"appo/{name}": pair for name, pair in metrics.items()})
        return {**by_group(batch, len(groups[0].samples)), **grouped}

    # -- log-probabilities of other policies -----------------------------------------------------------------------

    def _log_probs(self, groups: Sequence[Group], rows: Rows) -> dict[str, Tensor]:
        """Those of the policy that has sampled, the sampler and the reference, where the loss reads them."""
        trainer, found = self._trainer, {}
        sampler = [sample.logprobs for group in groups for sample in group.samples]
        if trainer.needs_old_log_probs:
            found["old_per_token_logps"] = self._old(groups, rows)
        if sampler[0] is not None:
            found["sampling_per_token_logps"] = _sampled_log_probs(sampler, rows.ids_BN)  # type: ignore[arg-type]
        if trainer.use_vllm and trainer.vllm_importance_sampling_correction:
            old_BN, sampled_BN = found["old_per_token_logps"], found["sampling_per_token_logps"]
            ratio = importance_ratio(
                old_BN, sampled_BN, rows.mask_BN, trainer.vllm_importance_sampling_mode,
                (trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max),
            )  # fmt: skip
            found["importance_sampling_ratio"] = ratio
            self._log_ratio(old_BN, sampled_BN, ratio, rows.mask_BN.bool())
        if trainer.beta != 0.0:
            found["ref_per_token_logps"] = self._reference(groups, rows)
        return found

    def _old(self, groups: Sequence[Group], rows: Rows) -> Tensor:
        """(B, N), of the scoring pass if it has scored all groups: one pass serves both."""
        scores = [group.scores for group in groups if group.scores is not None]
        if len(scores) < len(groups):
            return self.log_probs(self._trainer.model, groups, rows)
        width = rows.ids_BN.shape[1]
        return torch.cat([nn.functional.pad(s.log_probs_GN, (0, width - s.log_probs_GN.shape[1])) for s in scores])

    def _reference(self, groups: Sequence[Group], rows: Rows) -> Tensor:
        trainer = self._trainer
        if trainer.ref_model is not None:
            return self.log_probs(trainer.ref_model, groups, rows)
        # Adapters: the base model, or the copy of an adapter that is trained on.
        model = trainer.accelerator.unwrap_model(trainer.model)
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            return self.log_probs(trainer.model, groups, rows)

    def log_probs(self, model: Any, groups: Sequence[Group], rows: Rows) -> Tensor:
        """float (B, N) log-probabilities of the responses by a model, by the path that the loss takes."""
        trainer, responses = self._trainer, len(groups[0].samples)
        ids = torch.cat([rows.prompt_ids_BP, rows.ids_BN], dim=1)
        mask = torch.cat([rows.prompt_mask_BP, rows.mask_BN], dim=1)
        train, vision = trainer.model.training, groups[0].prompt is not None
        size = trainer.args.per_device_train_batch_size if train else trainer.args.per_device_eval_batch_size
        step = max(1, size // responses) * responses if vision else size
        parts = []
        recomputing = trainer.args.gradient_checkpointing_kwargs
        # As sampled: without dropout. Text alone is TRL's own, which scores it in the mode of training.
        mode = evaluation_mode(trainer.model) if vision else nullcontext()
        with torch.no_grad(), disable_gradient_checkpointing(trainer.model, recomputing), mode:
            for start in range(0, len(ids), step):
                prompts = [group.prompt for group in groups[start // responses : (start + step) // responses]]
                seeing = trainer.carrying(model, prompts, responses) if vision else model
                part, _, _ = trainer._get_per_token_logps_and_entropies(
                    seeing, ids[start : start + step], mask[start : start + step], rows.ids_BN.shape[1]
                )
                parts.append(part)
        return torch.cat(parts)

    def _log_ratio(self, old_BN: Tensor, sampled_BN: Tensor, ratio: Tensor, mask_BN: Tensor) -> None:
        """The metrics of TRL's correction; tokens that vLLM could not score are left out."""
        metrics = self._trainer._metrics["train" if self._trainer.model.training else "eval"]
        difference = (old_BN - sampled_BN).abs()
        difference = difference[mask_BN & ~difference.isnan()]
        ratios = ratio[mask_BN] if ratio.shape == mask_BN.shape else ratio.flatten()
        difference, ratios = (one if one.numel() else one.new_zeros(1) for one in (difference, ratios))
        name = "sampling/sampling_logp_difference"
        metrics[f"{name}/mean"].append(gather_tensor(difference.mean()).mean().item())
        metrics[f"{name}/max"].append(gather_tensor(difference.max()).max().item())
        for kind, own in (("min", ratios.min()), ("mean", ratios.mean()), ("max", ratios.max())):
            over_processes = gather_tensor(own)
            over_processes = over_processes[~over_processes.isnan()]
            metrics[f"{RATIOS}/{kind}"].append(getattr(over_processes, kind)().item())


def _sampled_log_probs(rows: Sequence[Sequence[float | None]], like_BN: Tensor) -> Tensor:
    """float (B, N) of the sampler, NaN where it does not know, 0 where padded."""
    tensors = [torch.tensor([torch.nan if value is None else value for value in row]) for row in rows]
    padded_BN = nn.utils.rnn.pad_sequence(tensors, batch_first=True)
    return nn.functional.pad(padded_BN, (0, like_BN.shape[1] - padded_BN.shape[1])).to(like_BN.device)


def importance_ratio(
    old_BN: Tensor, sampled_BN: Tensor, mask_BN: Tensor, mode: str, bounds: tuple[float | None, float | None]
) -> Tensor:
    """TRL's correction for a sampler with other kernels: (B, N) for the token modes, (B, 1) for the sequence modes.

    Args:
        old_BN: log-probabilities by the policy.
        sampled_BN: by the sampler; NaN: unknown, the ratio is 1.
        mask_BN: non-zero on response tokens.
        mode: TRL's ``vllm_importance_sampling_mode``: ``_truncate`` clamps, ``_mask`` makes 0 of what lies outside.
        bounds: least and most.
    """
    difference = ((old_BN - sampled_BN) * mask_BN).nan_to_num(nan=0.0)
    ratio = torch.exp(difference.sum(dim=-1, keepdim=True) if mode.startswith("sequence") else difference)
    least, most = bounds
    if mode.endswith("truncate"):
        return torch.clamp(ratio, min=least, max=most)
    outside = (ratio < (-torch.inf if least is None else least)) | (ratio > (torch.inf if most is None else most))
    return ratio.masked_fill(outside, 0.0)


# -- rows <-> groups -------------------------------------------------------------------------------------------------


def by_group(batch: dict[str, Any], responses: int) -> dict[str, Any]:
    """Every (B, ...) tensor as (Q, G, ...); scalars and None as they are."""
    return {
        key: value.view(-1, responses, *value.shape[1:]) if isinstance(value, Tensor) and value.ndim else value
        for key, value in batch.items()
    }


def by_row(batch: dict[str, Any]) -> dict[str, Any]:
    """Undo :func:`by_group`."""
    return {
        key: value.flatten(0, 1) if isinstance(value, Tensor) and value.ndim else value for key, value in batch.items()
    }


def batch_weights(
    weights_Q: Sequence[PerceptionWeights | None], mask_BN: Tensor, gather: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, dict[str, tuple[float, float]]]:
    """The token weights of all groups as one float32 (B, N) tensor, 1 where a group has none, and their metrics.

    Each metric is a sum and what it is divided by (tokens, or groups with frames), for a mean over all processes.

    Args:
        weights_Q: one entry a group (its N may be shorter than the batch's); None: nothing applies to it.
        mask_BN: (B, N), non-zero on response tokens.
        gather: concatenates a (1, 2) tensor over processes. If it is given, weights are divided by their mean over the
            response tokens of all processes (not in the paper, method.md); the metrics are of the weights before that.
    """
    mask_QGN = mask_BN.bool().view(len(weights_Q), -1, mask_BN.shape[1])
    weights_QGN = torch.ones(mask_QGN.shape, device=mask_BN.device)
    chosen_QGN = torch.zeros_like(mask_QGN)
    crucial = [int(weights.crucial_F.sum()) for weights in weights_Q if weights is not None]
    for q, weights in enumerate(weights_Q):
        if weights is not None:
            weights_QGN[q, :, : weights.weights_GN.shape[1]] = weights.weights_GN
            chosen_QGN[q, :, : weights.chosen_GN.shape[1]] = weights.chosen_GN
    tokens = float(mask_QGN.sum())
    metrics = {
        "mean_weight": (float((weights_QGN * mask_QGN).sum()), tokens),
        "chosen_share": (float((chosen_QGN & mask_QGN).sum()), tokens),
        "crucial_frames": (float(sum(crucial)), float(len(crucial))),
        "groups_without_crucial_frames": (float(crucial.count(0)), float(len(crucial))),
    }
    if gather is not None:
        total, count = gather(torch.stack([(weights_QGN * mask_QGN).sum(), mask_QGN.sum()])[None]).sum(dim=0)
        weights_QGN = torch.where(mask_QGN & (total > 0), weights_QGN * (count / total), weights_QGN)
    return weights_QGN.flatten(0, 1), metrics
