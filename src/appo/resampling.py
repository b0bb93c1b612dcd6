"""DAPO's dynamic sampling: groups whose rewards are all equal teach nothing, so fresh prompts take their place.

Shape suffixes: B rows, Q groups (questions), G responses of a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from appo.rollout import PromptInputs


@dataclass
class Sample:
    """One response on its way through a rollout: what TRL's lists say about one row, kept together.

    Attributes:
        row: the dataset row (its ``prompt`` and the columns reward functions need).
        prompt_ids: token ids of the prompt.
        completion_ids: token ids of the response, EOS included.
        completion: the response as reward functions see it.
        logprobs: log-probabilities of the sampler, where it reports them (vLLM).
        inputs: model inputs of the prompt; the same object for all responses of a group. None: no vision.
        rewards: (reward functions,) float32, NaN where a function abstained.
        extras: columns a reward function logged for this response.
    """

    row: dict[str, Any]
    prompt_ids: list[int]
    completion_ids: list[int]
    completion: Any
    logprobs: list[float] | None
    inputs: PromptInputs | None
    rewards: Tensor
    extras: dict[str, Any] = field(default_factory=dict)


# G responses to one prompt.
Group = list[Sample]


def as_groups(
    rows: Sequence[dict[str, Any]],
    prompts: Sequence[Any],
    generated: tuple[Any, ...],
    encoded: Sequence[PromptInputs | None],
    rewards_BR: Tensor,
    extras: dict[str, list[Any]],
    responses: int,
) -> list[Group]:
    """What TRL's ``_generate`` returned for B rows, with their rewards (R functions), as groups of ``responses``."""
    prompt_ids, completion_ids, _, completions, logprobs, _, _, _ = generated
    samples = [
        Sample(
            row={**rows[i], "prompt": prompts[i]},
            prompt_ids=prompt_ids[i],
            completion_ids=completion_ids[i],
            completion=completions[i],
            logprobs=None if logprobs is None else logprobs[i],
            inputs=encoded[i],
            rewards=rewards_BR[i],
            extras={column: values[i] for column, values in extras.items()},
        )
        for i in range(len(rows))
    ]
    return [samples[start : start + responses] for start in range(0, len(samples), responses)]


def as_generated(samples: Sequence[Sample], generated: tuple[Any, ...]) -> tuple[Any, ...]:
    """The samples as TRL's ``_generate`` returns them; what has no rows is taken from ``generated``."""
    _, _, tool_mask, _, logprobs, extra_fields, images, tool_images = generated
    return (
        [sample.prompt_ids for sample in samples],
        [sample.completion_ids for sample in samples],
        tool_mask,
        [sample.completion for sample in samples],
        None if logprobs is None else [sample.logprobs for sample in samples],
        extra_fields,
        images,
        tool_images,
    )


def is_flat(group: Group, reward_weights: Tensor) -> bool:
    """Whether all responses of a group have the same total reward (so that every advantage is 0). DAPO sec. 3.2."""
    totals_G = torch.stack([(sample.rewards * reward_weights).nansum() for sample in group])
    return bool((totals_G - totals_G[0]).abs().max() < 1e-6)


def replace_flat(groups: Sequence[Group], fresh: Sequence[Group], reward_weights: Tensor) -> tuple[list[Group], int]:
    """Put fresh groups that do teach something in the place of flat ones, in order.

    Returns:
        The groups, as many as before, and how many were replaced.
    """
    useful = [group for group in fresh if not is_flat(group, reward_weights)]
    replaced = 0
    result = []
    for group in groups:
        if replaced < len(useful) and is_flat(group, reward_weights):
            result.append(useful[replaced])
            replaced += 1
        else:
            result.append(group)
    return result, replaced


class FreshRows:
    """An endless, shuffled stream of dataset rows for dynamic sampling, apart from the trainer's own sampler.

    Each process draws its own rows; the same seed draws the same rows.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self._dataset = dataset
        self._generator = torch.Generator().manual_seed(seed)
        self._stream = self._rows()

    def _rows(self) -> Iterator[dict[str, Any]]:
        while True:
            if hasattr(self._dataset, "__len__"):
                for index in torch.randperm(len(self._dataset), generator=self._generator).tolist():
                    yield dict(self._dataset[index])
            else:
                seed = int(torch.randint(2**31, (), generator=self._generator))
                yield from map(dict, self._dataset.shuffle(seed=seed))

    def draw(self, count: int) -> list[dict[str, Any]]:
        """The next ``count`` rows."""
        return [next(self._stream) for _ in range(count)]
