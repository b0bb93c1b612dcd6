"""A group on its way through a rollout: TRL's parallel lists of rows, kept together as samples.

Shape suffixes: B rows = Q groups x G responses, R reward functions, F frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from appo.models.prompt import Prompt
from appo.types import GroupScores, PerceptionWeights


@dataclass
class Sample:
    """One response on its way through a rollout: what TRL's lists say about one row, kept together.

    Attributes:
        row: the dataset row (its ``prompt`` and the columns reward functions need).
        prompt_ids: token ids of the prompt.
        completion_ids: token ids of the response, EOS included.
        completion: the response as reward functions see it.
        logprobs: log-probabilities of the sampler, where it reports them (vLLM).
        inputs: the encoded prompt; the same object for all responses of a group. None: the rollout is TRL's.
        images: the prompt's pictures as TRL's ``_generate`` returns them; None: there are none, or ``inputs`` has them.
        rewards: (reward functions,) float32, NaN where a function abstained.
        extras: columns a reward function logged for this response.
    """

    row: dict[str, Any]
    prompt_ids: list[int]
    completion_ids: list[int]
    completion: Any
    logprobs: list[float] | None
    inputs: Prompt | None
    rewards: Tensor
    images: list[Any] | None = None
    extras: dict[str, Any] = field(default_factory=dict)


# G responses to one prompt.
Group = list[Sample]


@dataclass(frozen=True)
class ScoredGroup:
    """One group after scoring: what the weights were made from, for records and reports.

    ``timestamps_F`` are seconds; ``scores`` and ``weights`` are None for methods without weights and for prompts
    without frames.
    """

    samples: Group
    timestamps_F: tuple[float, ...]
    advantages_G: Tensor
    scores: GroupScores | None
    weights: PerceptionWeights | None


@dataclass
class Rollout:
    """State of one generation batch, between the methods TRL calls one after another.

    Attributes:
        rows: (B,) dataset rows, each G times, all their columns.
        sees: some prompt in some process has a video (or picture), so that all take our path; else all take TRL's.
        encoded: the prompts last tokenised, one a row; None on TRL's path.
        carried: of the same prompts, what travels to vLLM in the place of a row's images; empty without vLLM.
        groups: the responses, once all rounds of sampling are over.
        rewards: (B, R) of those responses.
        scores: of those groups, where one pass made them together with the old log-probabilities.
        wants_old_log_probs: TRL's next question about log-probabilities is the one about the old policy.
    """

    rows: list[dict[str, Any]]
    sees: bool
    encoded: list[Prompt | None] = field(default_factory=list)
    carried: list[Any] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    rewards: Tensor | None = None
    scores: list[GroupScores] = field(default_factory=list)
    wants_old_log_probs: bool = False

    def settle(self, groups: list[Group]) -> list[Sample]:
        """End sampling with these groups; returns their samples, one a row."""
        samples = [sample for group in groups for sample in group]
        self.groups = groups
        self.rewards = torch.stack([sample.rewards for sample in samples])
        return samples


def as_groups(
    rows: Sequence[dict[str, Any]],
    prompts: Sequence[Any],
    generated: tuple[Any, ...],
    encoded: Sequence[Prompt | None],
    rewards_BR: Tensor,
    extras: dict[str, list[Any]],
    responses: int,
) -> list[Group]:
    """What TRL's ``_generate`` returned for B rows, with their rewards (R functions), as groups of ``responses``."""
    prompt_ids, completion_ids, _, completions, logprobs, _, images, _ = generated
    samples = [
        Sample(
            row={**rows[i], "prompt": prompts[i]},
            prompt_ids=prompt_ids[i],
            completion_ids=completion_ids[i],
            completion=completions[i],
            logprobs=None if logprobs is None else logprobs[i],
            inputs=encoded[i],
            rewards=rewards_BR[i],
            images=None if images is None else images[i],
            extras={column: values[i] for column, values in extras.items()},
        )
        for i in range(len(rows))
    ]
    return [samples[start : start + responses] for start in range(0, len(samples), responses)]


def as_generated(samples: Sequence[Sample], generated: tuple[Any, ...]) -> tuple[Any, ...]:
    """The samples as TRL's ``_generate`` returns them; what has no rows is taken from ``generated``."""
    _, _, tool_mask, _, logprobs, extra_fields, _, tool_images = generated
    images = [sample.images for sample in samples]
    return (
        [sample.prompt_ids for sample in samples],
        [sample.completion_ids for sample in samples],
        tool_mask,
        [sample.completion for sample in samples],
        None if logprobs is None else [sample.logprobs for sample in samples],
        extra_fields,
        images if any(images) else None,
        tool_images,
    )
