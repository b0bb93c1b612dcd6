"""Method steps 1-9 in the update itself: its own forward pass gives the scores of its groups, and so their weights.

With one update per rollout, the update's log-probabilities are those of the policy that has sampled, so a pass that
scores groups before it would compute everything twice (see docs/performance.md). :func:`scores_first` says where that
pass stays.

Shape suffixes: B rows = Q groups x G responses, N response tokens (padded).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from appo.models.log_probs import log_normalizers
from appo.models.prompt import Prompt
from appo.training.config import APPOConfig
from appo.training.model_calls import Computed, GroupPass, PackedModel
from appo.training.trl_batch import batch_weights
from appo.types import Group, GroupScores


def scores_first(args: APPOConfig, model: Any) -> str:
    """Why groups must be scored before the update, or "": not in the paper, whose code always does.

    Args:
        args: the settings; one update follows each rollout.
        model: the policy.
    """
    if not args.shared_prefix:
        return "ordinary rows are not packed"
    if args.normalize_weights or args.frame_attention == "relative":
        return "a group's weights depend on all groups of the rollout"
    if args.mask_truncated_completions:
        return "the update does not run truncated responses, which the weights compare"
    of_attention = getattr(model.config.get_text_config(), "attention_dropout", None)
    if of_attention or any(isinstance(one, nn.Dropout) and one.p > 0 for one in model.modules()):
        return "dropout: the weights are those of the policy that has sampled"
    return ""


def group_scores(
    base: Any, one: GroupPass, ids_GN: Tensor, log_probs_GN: Tensor, temperature: float = 1.0
) -> GroupScores:
    """The scores of a group as `appo.models.log_probs.score_group` gives them, without gradients.

    Args:
        base: the model that has made the pass, for its LM head.
        one: the pass.
        ids_GN: int64, the responses' tokens; they may be padded to more than the pass was.
        log_probs_GN: their log-probabilities by the pass, of the same shape.
        temperature: the sampling temperature.
    """
    mask_GN, attention_GNF = one.mask_GN, one.attention_GNF
    N = mask_GN.shape[1]
    ids_GN, log_probs_GN = ids_GN[:, :N], log_probs_GN[:, :N]
    normalizer_GN = log_normalizers(base, one.hidden_GNH, ids_GN, log_probs_GN, temperature)
    if attention_GNF is not None:
        attention_GNF = attention_GNF.masked_fill(~mask_GN[..., None], 0.0)
    return GroupScores(log_probs_GN, mask_GN, one.hidden_GNH, normalizer_GN, attention_GNF)


def is_finite(scores: GroupScores) -> bool:
    """Whether the log-probabilities of all tokens are."""
    return bool(scores.log_probs_GN[scores.mask_GN].isfinite().all())


class UpdateScoring:
    """Scores and weighs the groups of one rollout after another, micro-batch by micro-batch.

    Args:
        trainer: an APPOTrainer.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._groups: list[Group] = []  # of the rollout that is being trained
        self._left = 0  # how many of them have not been weighed
        self._metrics: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))

    def open(self, groups: Sequence[Group]) -> None:
        """Take a rollout that is to be trained."""
        self._groups, self._left = list(groups), len(groups)
        self._metrics.clear()

    def __call__(
        self, model: Any, prompts: Sequence[Prompt], rows: Mapping[str, Any], numbers: Sequence[int]
    ) -> tuple[Computed, Tensor]:
        """The forward pass of one micro-batch, for TRL's loss to take as it is, and its weighted advantages (B, N).

        Args:
            model: the policy as the loss is given it.
            prompts: one a group.
            rows: TRL's batch, by rows; ``advantages`` is (B,).
            numbers: which groups of the rollout these are.
        """
        trainer = self._trainer
        ids_BN, mask_BN = rows["completion_ids"], rows["completion_mask"]
        G = len(ids_BN) // len(prompts)
        packed = PackedModel(
            model, prompts, G, trainer.base_model, trainer.args.rows_per_chunk, trainer.args.attention_layers
        )
        ids = torch.cat([rows["prompt_ids"], ids_BN], dim=1)
        mask = torch.cat([rows["prompt_mask"], mask_BN], dim=1)
        log_probs_BN, entropies_BN, _ = trainer._get_per_token_logps_and_entropies(
            packed, ids, mask, ids_BN.shape[1], compute_entropy=True
        )
        chunks = zip(numbers, packed.passes, ids_BN.split(G), log_probs_BN.detach().split(G), strict=True)
        scored = [self._scored(self._groups[number], *one) for number, *one in chunks]
        weighed = trainer.pipeline.weigh(scored)
        weights_BN, metrics = batch_weights([group.weights for group in weighed], mask_BN)
        for name, (total, count) in metrics.items():
            self._metrics[name] = (self._metrics[name][0] + total, self._metrics[name][1] + count)
        for number, group in zip(numbers, weighed, strict=True):
            self._groups[number] = _without_hidden_on_device(group)
        self._left -= len(weighed)
        # Method step 9: weights >= 0 commute with the clip, so they go into the advantages.
        return Computed(log_probs_BN, entropies_BN), rows["advantages"][:, None] * weights_BN

    def _scored(self, group: Group, one: GroupPass, ids_GN: Tensor, log_probs_GN: Tensor) -> Group:
        """The group with its scores; without where they are not finite, which is the loss's to report."""
        trainer = self._trainer
        with trainer.watch("weights"), trainer.accelerator.autocast():
            scores = trainer.pipeline.as_forward(
                group_scores, trainer.base_model, one, ids_GN, log_probs_GN, trainer.temperature
            )
        return replace(group, scores=scores if trainer.pipeline.has_frames(group) and is_finite(scores) else None)

    def close(self) -> list[Group]:
        """The rollout's groups with scores and weights once all have them, and none before; logs their metrics."""
        if self._left or not self._groups:
            return []
        self._trainer.log_means({f"appo/{name}": pair for name, pair in self._metrics.items()})
        groups, self._groups = self._groups, []
        return groups


def _without_hidden_on_device(group: Group) -> Group:
    """Hidden states are the most of what a group leaves; they wait in main memory for the rollout's last update."""
    scores = group.scores
    return group if scores is None else replace(group, scores=replace(scores, hidden_GNH=scores.hidden_GNH.cpu()))
