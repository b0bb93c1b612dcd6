"""DAPO's dynamic sampling: groups whose rewards are all equal teach nothing, so fresh prompts take their place.

Shape suffixes: G responses of a group, R reward functions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from appo.types import Group

EQUAL = 1e-6  # rewards that differ by less are equal


@dataclass(frozen=True)
class TotalReward:
    """How TRL makes one number of a response's rewards, NaN where a function abstained."""

    weights_R: Tensor  # float (R,), ``reward_weights``
    aggregation: str = "sum_then_normalize"  # TRL's ``multi_objective_aggregation``

    def __call__(self, rewards_GR: Tensor) -> Tensor:
        """float (G,): the totals of a group that its advantages are made of; NaN where every function abstained."""
        summands_GR = _standardised(rewards_GR) if self.aggregation == "normalize_then_sum" else rewards_GR
        totals_G = (summands_GR * self.weights_R.to(rewards_GR.device)).nansum(dim=1)
        return totals_G.masked_fill(rewards_GR.isnan().all(dim=1), torch.nan)


def _standardised(rewards_GR: Tensor) -> Tensor:
    """Each function's rewards with mean 0 and, where they differ, standard deviation 1, over those it gave."""
    centred_GR = rewards_GR - rewards_GR.nanmean(dim=0)
    # Equal rewards differ from their own mean by rounding, which the small divisor below would make large.
    centred_GR = centred_GR.masked_fill(centred_GR.abs() < EQUAL, 0.0)
    given_R = (~rewards_GR.isnan()).sum(dim=0)
    variance_R = centred_GR.square().nansum(dim=0) / (given_R - 1).clamp(min=1)
    return centred_GR / (variance_R.sqrt() + 1e-4)  # TRL's constant


def is_flat(group: Group, total: TotalReward) -> bool:
    """Whether every advantage of a group is 0, for all its total rewards are equal. DAPO sec. 3.2.

    Responses that no function has rewarded count for nothing: TRL leaves them out of the mean, with advantage 0.
    """
    totals_G = total(group.rewards_GR)
    given = totals_G[~totals_G.isnan()]
    return len(given) < 2 or bool((given - given[0]).abs().max() < EQUAL)


def replace_flat(groups: Sequence[Group], fresh: Sequence[Group], total: TotalReward) -> tuple[list[Group], int]:
    """Put fresh groups that do teach something in the place of flat ones, in order.

    Returns:
        The groups, as many as before, and how many were replaced.
    """
    useful = [group for group in fresh if not is_flat(group, total)]
    replaced = 0
    result = []
    for group in groups:
        if replaced < len(useful) and is_flat(group, total):
            result.append(useful[replaced])
            replaced += 1
        else:
            result.append(group)
    return result, replaced


def resample(
    groups: Sequence[Group],
    total: TotalReward,
    rounds: int,
    fresh_groups: Callable[[int], list[Group]],
    agree: Callable[[int], int] = lambda needed: needed,
) -> tuple[list[Group], int]:
    """Replace flat groups by fresh ones for at most ``rounds`` rounds, then keep what there is. DAPO sec. 3.2.

    Args:
        groups: the rollout's groups.
        total: of a group's rewards.
        rounds: bound on rounds.
        fresh_groups: samples and rewards so many groups about fresh prompts.
        agree: turns this process's number of flat groups into the number all processes generate.

    Returns:
        The groups, as many as before, and how many were replaced.
    """
    result, replaced = list(groups), 0
    for _ in range(rounds):
        needed = agree(sum(is_flat(group, total) for group in result))
        if needed == 0:
            break
        result, count = replace_flat(result, fresh_groups(needed), total)
        replaced += count
    return result, replaced


class FreshRows:
    """An endless, shuffled stream of dataset rows for dynamic sampling, apart from the trainer's own sampler.

    Each process draws its own rows; the same seed draws the same rows, and so does the same `state`.
    """

    def __init__(
        self, dataset: Any, seed: int, prepare: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: row
    ) -> None:
        """``prepare``: makes of a row of the dataset what a rollout takes."""
        self._dataset, self._prepare = dataset, prepare
        self._generator = torch.Generator().manual_seed(seed)
        self.restore({"generator": self._generator.get_state(), "drawn": 0})

    def state(self) -> dict[str, Any]:
        """Where the stream stands: ``generator`` as it was before this pass over the rows, rows ``drawn`` since."""
        return {"generator": self._before, "drawn": self._drawn}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Load what `state` returned: the stream goes on from there."""
        self._generator.set_state(state["generator"])
        self._before, self._drawn = state["generator"], state["drawn"]
        self._stream = self._rows(skip=self._drawn)

    def _rows(self, skip: int) -> Iterator[dict[str, Any]]:
        while True:
            self._before, self._drawn = self._generator.get_state(), skip
            for row in self._one_pass(skip):
                self._drawn += 1
                yield self._prepare(row)
            skip = 0

    def _one_pass(self, skip: int) -> Iterator[dict[str, Any]]:
        if hasattr(self._dataset, "__len__"):
            order = torch.randperm(len(self._dataset), generator=self._generator).tolist()
            return (dict(self._dataset[index]) for index in order[skip:])
        seed = int(torch.randint(2**31, (), generator=self._generator))
        return map(dict, itertools.islice(self._dataset.shuffle(seed=seed), skip, None))

    def draw(self, count: int, keep: Callable[[dict[str, Any]], bool] = lambda row: True) -> list[dict[str, Any]]:
        """The next ``count`` rows that are to be kept; there must be some."""
        return list(itertools.islice(filter(keep, self._stream), count))
