"""DAPO's dynamic sampling: groups whose rewards are all equal teach nothing, so fresh prompts take their place.

Shape suffixes: G responses of a group.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from appo.groups import Group


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


def resample(
    groups: Sequence[Group],
    reward_weights: Tensor,
    rounds: int,
    fresh_groups: Callable[[int], list[Group]],
    agree: Callable[[int], int] = lambda needed: needed,
) -> tuple[list[Group], int]:
    """Replace flat groups by fresh ones for at most ``rounds`` rounds, then keep what there is. DAPO sec. 3.2.

    Args:
        groups: the rollout's groups.
        reward_weights: float (R,), of the total reward.
        rounds: bound on rounds.
        fresh_groups: samples and rewards so many groups about fresh prompts.
        agree: turns this process's number of flat groups into the number all processes generate.

    Returns:
        The groups, as many as before, and how many were replaced.
    """
    result, replaced = list(groups), 0
    for _ in range(rounds):
        needed = agree(sum(is_flat(group, reward_weights) for group in result))
        if needed == 0:
            break
        result, count = replace_flat(result, fresh_groups(needed), reward_weights)
        replaced += count
    return result, replaced


class FreshRows:
    """An endless, shuffled stream of dataset rows for dynamic sampling, apart from the trainer's own sampler.

    Each process draws its own rows; the same seed draws the same rows, and so does the same `state`.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self._dataset = dataset
        self._generator = torch.Generator().manual_seed(seed)
        self.restore({"generator": self._generator.get_state(), "drawn": 0})

    def state(self) -> dict[str, Any]:
        """Where the stream stands: ``generator`` as it was before this pass over the rows, rows ``drawn`` since."""
        return {"generator": self._before, "drawn": self._drawn}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Stand where `state` was taken."""
        self._generator.set_state(state["generator"])
        self._before, self._drawn = state["generator"], state["drawn"]
        self._stream = self._rows(skip=self._drawn)

    def _rows(self, skip: int) -> Iterator[dict[str, Any]]:
        while True:
            self._before, self._drawn = self._generator.get_state(), skip
            for row in self._one_pass(skip):
                self._drawn += 1
                yield row
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
