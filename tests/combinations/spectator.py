"""Looks at a run from the model's own modules: which rows reach the language model, and with which features.

Shape suffixes: L input positions, P prompt tokens, n placeholders of a prompt, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from appo import APPOTrainer
from appo.models.families import family_of
from tests.combinations.world import GROUP, Shown, is_placeholder, number_of

FEATURES_CLOSE = 1e-5  # the same tower on the same pixels, alone or in a batch


@dataclass(frozen=True)
class Rewarded:
    """One response that was given a reward.

    Attributes:
        number: of its row.
        ids: its tokens.
        ended: whether it did.
        total: of its rewards; NaN if there is none.
    """

    number: int
    ids: tuple[int, ...]
    ended: bool
    total: float


@dataclass
class SeenRollout:
    """One rollout, by the numbers of rows.

    Attributes:
        asked: rows that the sampler gave.
        counted: rows whose rewards and prompts TRL has logged.
        ended: of those, rows with a response that ended.
        trained: rows about which the language model was asked while gradients were made.
        idle: share of all processes' groups whose advantages are all 0.
        flat: the same as dynamic sampling logs it, after it has replaced what it could; None without it.
    """

    asked: set[int]
    counted: set[int] = field(default_factory=set)
    ended: set[int] = field(default_factory=set)
    trained: set[int] = field(default_factory=set)
    idle: float = 0.0
    flat: float | None = None


class Spectator:
    """Looks at a run from the model's own modules, and at nothing that the trainer says of its batches."""

    def __init__(self, trainer: APPOTrainer, oracle: dict[int, Shown], given: list[Rewarded]) -> None:
        self.rollouts: list[SeenRollout] = []
        self.vision_rows = 0
        self.first_batch: Any = None
        self.problems: set[str] = set()
        self._config = trainer.base_model.config
        # What a trained tower makes of a picture is known before its first step only.
        self._trains_tower = family_of(trainer.base_model).trains_vision
        self._trainer, self._oracle, self._given = trainer, oracle, given
        self._ids: Tensor | None = None
        inner = trainer.base_model.base_model
        inner.register_forward_pre_hook(self._on_model, with_kwargs=True)
        inner.language_model.register_forward_pre_hook(self._on_language_model, with_kwargs=True)
        self._wrap("_generate_and_score_completions", self._watch_rollout)
        self._wrap("_compute_loss", self._watch_loss)

    def _wrap(self, name: str, around: Callable[..., Any]) -> None:
        original = getattr(self._trainer, name)
        setattr(self._trainer, name, lambda *args, **kwargs: around(original, *args, **kwargs))

    def _watch_rollout(self, original: Callable[..., Any], inputs: Any) -> Any:
        self._given.clear()
        rollout = SeenRollout({row["number"] for row in inputs})
        self.rollouts.append(rollout)
        output = original(inputs)
        responses = self._trainer.accelerator.num_processes * len(inputs)
        prompts, advantages = (list(self._trainer._logs[name])[-responses:] for name in ("prompt", "advantages"))
        start = self._trainer.accelerator.process_index * len(inputs)
        rollout.counted = set(map(number_of, prompts[start : start + len(inputs)]))
        idle = [not any(advantages[first : first + GROUP]) for first in range(0, responses, GROUP)]
        rollout.idle = sum(idle) / len(idle)
        if self._trainer.args.max_resampling_rounds:
            rollout.flat = self._trainer._metrics["train"]["resampling/flat_groups"][-1]
        # Of a row that was sampled twice only some responses are kept: it counts where all its groups had an end.
        groups = [self._given[first : first + GROUP] for first in range(0, len(self._given), GROUP)]
        open_ended = {group[0].number for group in groups if not any(response.ended for response in group)}
        rollout.ended = rollout.counted - open_ended
        return output

    def _watch_loss(self, original: Callable[..., Any], model: Any, inputs: Any) -> Any:
        if self.first_batch is None:
            self.first_batch = inputs
        if self._trainer.model.training:
            self.problems |= set(self._wrong_advantages(inputs))
        return original(model, inputs)

    def _wrong_advantages(self, inputs: dict[str, Any]) -> Iterator[str]:
        """Responses whose advantage has another sign than their own reward above their own group's mean."""
        names = ("prompt_ids", "completion_ids", "completion_mask", "advantages")
        rows = [inputs[name].flatten(0, 1) if "vision" in inputs else inputs[name] for name in names]
        lengths = None if self._trainer.mask_truncated_completions else rows[2].sum(dim=1)
        for row in range(len(rows[0])):
            number = next(
                n for n, shown in self._oracle.items() if torch.equal(_end(rows[0][row], shown.ids_P), shown.ids_P)
            )
            of_row = [response for response in self._given if response.number == number]
            if (
                lengths is None or len(of_row) != GROUP
            ):  # masked, or sampled twice: it cannot be told which group it is of
                continue
            own = [
                response.total for response in of_row if response.ids == tuple(rows[1][row, : lengths[row]].tolist())
            ]
            given = [response.total for response in of_row if not math.isnan(response.total)]
            if not own:
                yield f"row {number}: a response is trained on that no reward was asked for"
            expected = own[0] - sum(given) / len(given) if own and given else 0.0
            advantage = float(rows[3][row].flatten()[0])
            if abs(expected) > 1e-3 and advantage * expected <= 0:
                yield f"row {number}: reward above the mean {expected:.3g}, advantage {advantage:.3g}"

    def _on_model(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._ids = None
        if torch.is_grad_enabled() and self._trainer.model.training:
            ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
            self._ids, self._mask = ids.clone(), torch.ones_like(ids) if mask is None else mask.clone()

    def _on_language_model(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._ids is None:
            return
        for ids_L, mask_L, embeds_LH in zip(self._ids, self._mask, kwargs["inputs_embeds"], strict=True):
            # Not raised here: the other processes would wait for ever.
            problem = self._problem_of(*(x[int(mask_L.argmax()) :].detach().cpu() for x in (ids_L, embeds_LH)))
            self.problems |= {problem} - {""}

    def _problem_of(self, ids_L: Tensor, embeds_LH: Tensor) -> str:
        """What is wrong with one row of the language model's inputs, which begins with its prompt; or nothing."""
        found = [
            number for number, shown in self._oracle.items() if torch.equal(ids_L[: len(shown.ids_P)], shown.ids_P)
        ]
        if len(found) != 1:
            return f"the language model is asked about a prompt of {len(found)} rows: {ids_L.tolist()}"
        shown = self._oracle[found[0]]
        self.rollouts[-1].trained.add(found[0])
        placeholders_L = is_placeholder(ids_L, self._config)
        if placeholders_L[len(shown.ids_P) :].any():
            return f"row {found[0]}: a response holds a placeholder"
        if len(shown.features_nH) == 0 or (self._trains_tower and self._trainer.state.global_step):
            return ""
        self.vision_rows += 1
        worst = float((embeds_LH[placeholders_L] - shown.features_nH).abs().max())
        return "" if worst <= FEATURES_CLOSE else f"row {found[0]} is trained on features that differ by {worst:.3g}"


def _end(ids: Tensor, like: Tensor) -> Tensor:
    """The last tokens, as many as the other has: prompts are padded from the left."""
    return ids[-len(like) :].cpu()
