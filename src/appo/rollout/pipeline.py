"""One rollout: encode -> generate -> reward -> dynamic_sampling -> advantages -> score -> weigh.

A stage takes groups and returns groups with more in them (see `appo.types.Group`). Every process calls every stage, in
this order, whatever its rows hold: text, pictures, videos, or nothing that can be replaced. What the trainer's library
does in a rollout (sampling of text, reward functions, advantages) is behind `Engine`; the trainer turns the groups into
its batch.

Shape suffixes: G responses of a group, R reward functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch

from appo.data.table import question_of
from appo.models.log_probs import score_group
from appo.models.sharding import as_forward, is_sharded
from appo.rollout.collectives import gather_values, max_over_processes
from appo.rollout.dynamic_sampling import TotalReward, is_flat, resample
from appo.rollout.encoding import PromptEncoder
from appo.rollout.generation import evaluation_mode
from appo.rollout.timers import Stopwatch
from appo.rollout.token_weights import Weigher
from appo.types import Group, GroupScores

Row = dict[str, Any]


class Policy(Protocol):
    """The policy as a trainer has it."""

    model: Any  # wrapped by PEFT, if it is
    model_wrapped: Any  # as accelerate prepared it

    @property
    def base_model(self) -> Any:
        """The Hugging Face model below all wrappers."""


class Engine(Protocol):
    """What a trainer's library does in a rollout. Every method is called by every process."""

    def generate(self, groups: Sequence[Group], responses: int) -> list[Group]:
        """Sample G responses to each encoded prompt."""

    def generate_text(self, rows: Sequence[Row], responses: int) -> list[Group]:
        """The same for rows of text alone, encoded and sampled by the library itself."""

    def reward(self, groups: Sequence[Group]) -> list[Group]:
        """Call the reward functions."""

    def check(self, groups: Sequence[Group], pipeline: RolloutPipeline) -> None:
        """Assert, once, that the sampler reads prompts as the scoring pass of the pipeline does."""

    def advantages(self, groups: Sequence[Group]) -> list[Group]:
        """Compare the rewards."""


@dataclass(frozen=True)
class RolloutSettings:
    """What a rollout is to be like.

    Attributes:
        old_log_probs: a rollout serves several updates, or vLLM samples: score groups without frames as well, for
            the log-probabilities of the policy that has sampled.
        in_update: groups are scored by the update's own forward pass, and weighed between forward and backward.
    """

    weighted: bool  # make token weights (method ``appo``)
    old_log_probs: bool
    in_update: bool
    attention_layers: int  # last decoder layers whose frame attention is averaged
    temperature: float  # of the sampling
    shared_prefix: bool  # score a group packed behind one prompt
    rows_per_chunk: int  # responses of one scoring pass; 0: all
    max_resampling_rounds: int  # of dynamic sampling; 0: none
    reward: TotalReward  # how rewards become the one number that dynamic sampling compares


@dataclass
class RolloutPipeline:
    """Rows -> groups that are ready for the loss.

    Attributes:
        fresh_rows: ``(count, with_vision)`` draws rows for dynamic sampling; none once the run is to stop.
        log: logs totals divided by counts, of all processes; nothing if all counts are 0.
    """

    policy: Policy  # what is trained
    engine: Engine  # what the trainer's library does
    encoder: PromptEncoder  # conversations -> encoded prompts
    weigher: Weigher  # method steps 2-8
    settings: RolloutSettings  # of the rollout
    fresh_rows: Callable[[int, bool], list[Row]]
    log: Callable[[Mapping[str, tuple[float, float]]], None]
    autocast: Callable[[], AbstractContextManager[Any]]  # the precision the model runs in
    watch: Stopwatch  # measures the stages

    def __call__(self, rows: Sequence[Row], responses: int, *, vision: bool, train: bool) -> list[Group]:
        """One rollout.

        Args:
            rows: one a group.
            responses: G.
            vision: a row of some process has a video or a picture; else all rows are text, which the library encodes.
            train: make dynamic sampling, scores and weights; in an evaluation there are none.
        """
        groups = self.sample(rows, responses, vision)
        if not train:
            return self.engine.advantages(groups)
        self.engine.check(groups, self)
        if self.settings.max_resampling_rounds:
            groups = self.dynamic_sampling(groups, responses, vision)
        groups = self.engine.advantages(groups)
        scored_now = self.settings.weighted and vision and not self.settings.in_update
        return self.weigh(self.score(groups)) if scored_now else groups

    # -- encode -> generate -> reward ------------------------------------------------------------------------------

    def sample(self, rows: Sequence[Row], responses: int, vision: bool) -> list[Group]:
        """Groups with rewards. Dynamic sampling takes this way again for fresh rows."""
        if not vision:
            return self.reward(self.engine.generate_text(rows, responses))
        return self.reward(self.generate(self.encode(rows), responses))

    def encode(self, rows: Sequence[Row]) -> list[Group]:
        """Each file is decoded once, and a vision tower that is not trained runs once for each video and picture."""
        with self.watch("decode"):
            return [self._encoded(row) for row in rows]

    def _encoded(self, row: Row) -> Group:
        base = self.policy.base_model
        inputs = self.encoder.read(base, row["prompt"])
        prompt = self.as_forward(self.encoder.encode_vision, base, row["prompt"], inputs, self.agree)
        ids = prompt.ids_1P[0].tolist()
        times = self.encoder.videos.timestamps(row["prompt"])
        return Group(row, question_of(row), prompt, ids, timestamps_F=times)

    def generate(self, groups: Sequence[Group], responses: int) -> list[Group]:
        """G responses to each prompt."""
        with self.watch("generate"):
            return self.engine.generate(groups, responses)

    def reward(self, groups: Sequence[Group]) -> list[Group]:
        """The reward functions' numbers, one a response and function."""
        with self.watch("rewards"):
            return self.engine.reward(groups)

    # -- dynamic sampling ------------------------------------------------------------------------------------------

    def dynamic_sampling(self, groups: list[Group], responses: int, vision: bool) -> list[Group]:
        """Replace groups whose rewards are all equal by fresh ones, for a bounded number of rounds. DAPO sec. 3.2."""
        rewards = TotalReward(self.settings.reward.weights_R)(torch.cat([group.rewards_GR for group in groups]))
        first_round = float(rewards.nansum()), float((~rewards.isnan()).sum())

        def fresh_groups(count: int) -> list[Group]:
            rows = self.fresh_rows(count, vision)
            return self.sample(rows, responses, vision) if rows else []

        total, rounds = self.settings.reward, self.settings.max_resampling_rounds
        # Every process generates as many groups as the one that needs most: they meet in the same collectives.
        groups, replaced = resample(groups, total, rounds, fresh_groups, max_over_processes)
        flat = sum(is_flat(group, total) for group in groups)
        shares = {"replaced_groups": (replaced, len(groups)), "flat_groups": (flat, len(groups))}
        self.log({f"resampling/{name}": pair for name, pair in {"first_round_reward": first_round, **shares}.items()})
        return groups

    # -- score -> weigh --------------------------------------------------------------------------------------------

    def score(self, groups: Sequence[Group]) -> list[Group]:
        """Method step 1: one pass over each group that has frames."""
        wanted = [self.settings.old_log_probs or self.has_frames(group) for group in groups]
        # Where parameters are sharded, all processes score their q-th groups if one of them does.
        together = gather_values(wanted) if is_sharded(self.policy.model_wrapped) else [wanted]
        scored = []
        for q, group in enumerate(groups):
            scores = self.scores_of(group) if any(process[q] for process in together) else None
            scored.append(replace(group, scores=scores if wanted[q] else None))
        return scored

    def scores_of(self, group: Group) -> GroupScores:
        """One scoring pass: log-probabilities, hidden states and, where there are frames, attention to them."""
        # Without dropout: the weights are those of the policy that has sampled, and no random number is drawn.
        with torch.no_grad(), self.watch("score"), self.autocast(), evaluation_mode(self.policy.model):
            scores: GroupScores = self.as_forward(
                score_group,
                self.policy.base_model,
                group.prompt,
                [torch.tensor(sample.ids) for sample in group.samples],
                capture_layers=self.settings.attention_layers if self.has_frames(group) else 0,
                temperature=self.settings.temperature,
                shared_prefix=self.settings.shared_prefix,
                rows_per_chunk=self.settings.rows_per_chunk,
            )
        return scores

    def weigh(self, groups: Sequence[Group]) -> list[Group]:
        """Method steps 2-8: token weights of the groups with frames that have been scored."""
        with self.watch("weights"):
            self.weigher.remember(groups, gather_values)
            return [self.as_forward(self.weigher, self.policy.base_model, group) for group in groups]

    # -- the policy on its processes -------------------------------------------------------------------------------

    @staticmethod
    def has_frames(group: Group) -> bool:
        """Whether a group's prompt has a video."""
        return group.prompt is not None and bool(group.prompt.has_video)

    def as_forward(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Work that reads the policy's parameters, on however many processes their shards are."""
        return as_forward(self.policy.model_wrapped, partial(work, *args, **kwargs))

    def agree(self, passes: int) -> int:
        """How often all processes run the vision tower for a prompt, where they must run it together."""
        return max_over_processes(passes) if is_sharded(self.policy.model_wrapped) else passes
