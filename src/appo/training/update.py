"""The update: models for TRL's loss to call with whole groups, and the token weights that their forward pass gives.

The models add what the groups' prompts show. With one update per rollout, the update's log-probabilities are those of
the policy that has sampled, so a pass that scores groups before it would compute everything twice (see
docs/performance.md). :func:`scores_first` says where that pass stays; elsewhere :class:`UpdateScoring` makes the
weights between forward and backward.

Shape suffixes: B rows = Q groups x G responses, G responses of a group, N response tokens (padded), L = prompt and
response tokens (padded), T positions of a packed group, S of them shared, n = T - S, H hidden size, F frames.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from appo.models.families import family_of
from appo.models.log_probs import log_normalizers, packed_capture, stack_chunks
from appo.models.prefix_packing import IGNORED, pack_group
from appo.models.prompt import Prompt
from appo.training.config import APPOConfig
from appo.training.trl_batch import batch_weights
from appo.types import Group, GroupScores

# -- models for TRL to call ----------------------------------------------------------------------------------------


class RowsModel:
    """A model for TRL to call with the token ids of whole groups, which adds the vision inputs that belong to them."""

    def __init__(self, model: Any, prompts: Sequence[Prompt], responses: int, base: Any) -> None:
        self._model, self._prompts, self._responses, self._family = model, prompts, responses, family_of(base)

    def __call__(self, **inputs: Any) -> Any:
        ids: Tensor = inputs["input_ids"]
        assert len(ids) == len(self._prompts) * self._responses, "TRL calls the model with all rows at once"
        prompts = [prompt.to(ids.device) for prompt in self._prompts for _ in range(self._responses)]
        vision = self._family.vision_inputs(prompts)
        if any(prompt.types_1P is not None for prompt in prompts):
            vision["mm_token_type_ids"] = self._family.token_types(ids)
        return self._model(**inputs, **vision)


@dataclass(frozen=True)
class GroupPass:
    """What one group's forward pass leaves for its scores, without gradients.

    Attributes:
        attention_GNF: float32 (G, N, F); None for a prompt without frames.
    """

    hidden_GNH: Tensor  # final hidden state that emits each token
    mask_GN: Tensor  # bool, True on response tokens
    attention_GNF: Tensor | None


class PackedModel:
    """The same with each group packed behind one prompt: prompt and video are read once a group. Exact.

    What TRL reads of a call (log-probabilities and entropies of labelled tokens) is put back in its rows. With
    ``rows_per_chunk`` a group is packed in chunks of so many responses, and what a chunk would keep for the backward
    pass is recomputed there: memory for the prompt's forward pass once more a chunk, and once more in backward.

    Attributes:
        passes: one a group of the last call, if there are ``capture_layers``.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Prompt],
        responses: int,
        base: Any,
        rows_per_chunk: int = 0,
        capture_layers: int = 0,
    ) -> None:
        self._model, self._prompts, self._responses, self._base = model, prompts, responses, base
        self._chunk, self._layers = rows_per_chunk or responses, capture_layers
        self.passes: list[GroupPass] = []

    def __call__(self, input_ids: Tensor, labels: Tensor, **kwargs: Any) -> Any:
        del kwargs["attention_mask"]
        emitted_BL = labels[:, 1:] != IGNORED
        log_probs: list[Tensor] = []
        entropies: list[Any] = []
        assert len(input_ids) == len(self._prompts) * self._responses, "TRL calls the model with all rows at once"
        self.passes = []
        for q, start in enumerate(range(0, len(input_ids), self._responses)):
            prompt, passes = self._prompts[q].to(input_ids.device), []
            for first in range(start, start + self._responses, self._chunk):
                rows = slice(first, min(first + self._chunk, start + self._responses))
                responses = [row[kept] for row, kept in zip(labels[rows, 1:], emitted_BL[rows], strict=True)]
                chunk_log_probs, chunk_entropy, one = self._call(prompt, responses, kwargs)
                log_probs.append(chunk_log_probs)
                entropies.append(chunk_entropy)
                passes += [] if one is None else [one]
            self.passes += [_whole_group(passes)] if passes else []
        return SimpleNamespace(
            log_probs=_in_rows(log_probs, emitted_BL),
            entropy=None if entropies[0] is None else _in_rows(entropies, emitted_BL),
        )

    def _call(
        self, prompt: Prompt, responses: list[Tensor], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None, GroupPass | None]:
        """Log-probabilities and entropies (or None) of the responses' tokens, one after another.

        Where no token is left (all responses were truncated and masked) the prompt runs alone, with one position that
        emits nothing: processes that share gradients or parameters must all go through the layers, and back.
        """
        is_empty = not any(len(response) for response in responses)
        packed = pack_group(self._base, prompt, [prompt.ids_1P[0, -1:]] if is_empty else responses)
        S = packed.layout.prefix
        labels_1n = torch.full_like(packed.labels_1T, IGNORED)[:, S:] if is_empty else packed.labels_1T[:, S:]
        emitting_1n = labels_1n != IGNORED
        layers = self._layers if prompt.has_video else 0

        def run() -> tuple[Tensor, Tensor | None]:
            with _hidden_from(S, self._model, self._base):
                outputs = self._model(**packed.inputs, shift_labels=labels_1n, **captured, **kwargs)
            packed.layout.assert_kept()
            return outputs.log_probs[emitting_1n], None if outputs.entropy is None else outputs.entropy[emitting_1n]

        capturing: Any = packed_capture(self._base, prompt, packed, layers) if layers else nullcontext()
        with capturing as capture, _last_hidden(self._base if self._layers else None) as hidden:
            captured = {} if capture is None else {"frame_capture": capture}
            recomputed = self._chunk < self._responses and torch.is_grad_enabled()
            log_probs, entropy = checkpoint(run, use_reentrant=False) if recomputed else run()
        if not self._layers:
            return log_probs, entropy, None
        attention_GNF = None if capture is None else capture.attention_BNF
        return log_probs, entropy, GroupPass(hidden[0][0, packed.layout.index_GN], packed.layout.mask_GN, attention_GNF)


@contextmanager
def _hidden_from(start: int, model: Any, base: Any) -> Iterator[None]:
    """Meanwhile the final hidden states of the model that runs are those from this position on: what precedes emits
    nothing, but without Triton TRL's LM head would run over it. ``model`` may be wrapped, or a reference."""

    def cut(module: Any, inputs: Any, outputs: Any) -> None:
        outputs.last_hidden_state = outputs.last_hidden_state[:, start:]

    modules = model.modules() if isinstance(model, nn.Module) else [base]
    inner: Any = next(one for one in modules if isinstance(one, PreTrainedModel))
    hook = inner.base_model.register_forward_hook(cut)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _last_hidden(base: Any) -> Iterator[list[Tensor]]:
    """The final hidden states (1, T, H) of a model's forward passes meanwhile, without gradients; of no model, none."""
    found: list[Tensor] = []
    if base is None:
        yield found
        return
    hook = base.base_model.register_forward_hook(
        lambda module, inputs, outputs: found.append(outputs.last_hidden_state.detach())
    )
    try:
        yield found
    finally:
        hook.remove()


def _whole_group(chunks: Sequence[GroupPass]) -> GroupPass:
    parts = zip(*((one.hidden_GNH, one.mask_GN, one.attention_GNF) for one in chunks), strict=True)
    hidden_GNH, mask_GN, attention_GNF = map(stack_chunks, parts)
    assert hidden_GNH is not None
    assert mask_GN is not None
    return GroupPass(hidden_GNH, mask_GN, attention_GNF)


@dataclass(frozen=True)
class Computed:
    """A model that has been called already: it gives what the rows had then."""

    log_probs_BN: Tensor  # with gradients
    entropies_BN: Tensor | None

    def __call__(self, **inputs: Any) -> Any:
        return SimpleNamespace(log_probs=self.log_probs_BN, entropy=self.entropies_BN)


def _in_rows(parts: Sequence[Tensor], emitted_BL: Tensor) -> Tensor:
    """Values of emitted tokens, group after group, at their places in (B, L - 1); 0 elsewhere."""
    values = torch.cat(list(parts))
    return values.new_zeros(emitted_BL.shape).masked_scatter(emitted_BL, values)


# -- scores and weights between forward and backward -----------------------------------------------------------------


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
        self._sums: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))

    def open(self, groups: Sequence[Group]) -> None:
        """Take a rollout that is to be trained."""
        self._groups, self._left = list(groups), len(groups)
        self._sums.clear()

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
            self._sums[name] = (self._sums[name][0] + total, self._sums[name][1] + count)
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
        self._trainer.log_means({f"appo/{name}": pair for name, pair in self._sums.items()})
        groups, self._groups = self._groups, []
        return groups


def _without_hidden_on_device(group: Group) -> Group:
    """Hidden states are the most of what a group leaves; they wait in main memory for the rollout's last update."""
    scores = group.scores
    return group if scores is None else replace(group, scores=replace(scores, hidden_GNH=scores.hidden_GNH.cpu()))
