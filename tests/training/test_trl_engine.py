"""What is written again of TRL's rollout must be TRL's. Text with dynamic sampling takes our stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import set_seed

from appo.training.trl_batch import importance_ratio
from tests.support.runs import logged
from tests.training.side_by_side import WORDS, questions, same_trainer, stock_trainer

# Timings differ, and dynamic sampling and faults are logged by one of the two only.
OWN = ("time", "runtime", "per_second", "resampling/", "faults/", "appo/")
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled by the batch": {"scale_rewards": "batch"},
    "not scaled": {"scale_rewards": "none"},
    "each function scaled": {"multi_objective_aggregation": "normalize_then_sum"},
    "weighted": {"reward_weights": [0.25, 2.0]},
    "two iterations": {"num_iterations": 2, "gradient_accumulation_steps": 2},
    "generation over two steps": {"steps_per_generation": 4, "gradient_accumulation_steps": 2},
    "truncated are masked": {"mask_truncated_completions": True, "max_completion_length": 4},
    "padded to a multiple": {"pad_to_multiple_of": 8},
}


def unequal(completion_ids: list[list[int]], log_metric: Any, log_extra: Any, **kwargs: Any) -> list[float | None]:
    """Never the same for a whole group; some responses are not rewarded."""
    log_metric("length", float(len(completion_ids)))
    log_extra("first", [ids[0] for ids in completion_ids])
    return [None if i % 4 == 3 else i % 2 + 0.01 * (sum(ids) % 7) for i, ids in enumerate(completion_ids)]


def small(completion_ids: list[list[int]], **kwargs: Any) -> list[float | None]:
    """Differs a little, and abstains with the other one in one response of eight."""
    return [None if i % 8 == 7 else 0.1 * (len(ids) % 3 + i % 2) for i, ids in enumerate(completion_ids)]


def numbers(log: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in log.items() if not any(part in name for part in OWN)}


@pytest.mark.parametrize("kind", ["language", "vision-language"])
@pytest.mark.parametrize("case", CASES)
def test_metrics_batches_and_training_are_trls_bit_for_bit(tmp_path, kind, case):
    changes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": 2, **CASES[case]}
    changes |= {"eval_strategy": "steps", "eval_steps": 1, "log_completions": False}
    rewards, held_out = [unequal, small], questions(WORDS[:4])
    stock = stock_trainer(tmp_path, kind, rewards, settings=dict(changes), eval_dataset=held_out)
    changes |= {"max_resampling_rounds": 1, "accuracy_reward": "small"}
    ours = same_trainer(tmp_path, kind, rewards, settings=changes, eval_dataset=held_out)
    calls: list[int] = []
    sample = ours.pipeline.sample

    def counting(rows: Any, responses: int, vision: bool) -> Any:
        calls.append(len(rows))
        return sample(rows, responses, vision)

    ours.pipeline.sample = counting  # type: ignore[method-assign]
    for trainer in (stock, ours):
        set_seed(1)
        trainer.train()
    assert calls, "our stages were not used"
    assert max(logged(ours, "resampling/replaced_groups")) == 0, "all groups have unequal rewards"
    for one, other in zip(stock.state.log_history, ours.state.log_history, strict=True):
        assert numbers(one) == numbers(other)
    names = numbers(ours.state.log_history[0]).keys()
    assert {"length", "completions/mean_terminated_length", "rewards/small/std"} <= names
    for name in ("prompt", "completion", "advantages"):
        assert list(stock._logs[name]) == list(ours._logs[name]), name
    assert list(stock._logs["extra"]["first"]) == list(ours._logs["extra"]["first"])
    for one, other in zip(stock.model.parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(one, other)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(*[st.sampled_from([-9.0, -1.0, -0.5, 0.0, float("nan")])] * 3), min_size=1, max_size=3),
    st.sampled_from(["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]),
    st.sampled_from([(None, 3.0), (0.5, None), (0.1, 2.0)]),
)  # fmt: skip
def test_the_importance_ratio_is_the_one_written_token_by_token(rows, mode, bounds):
    sampled, old = torch.tensor(rows), torch.full((len(rows), 3), -0.75)
    mask = torch.tensor([[1, 1, i % 2] for i in range(len(rows))])
    least, most = (
        (float("-inf") if bounds[0] is None else bounds[0]),
        (float("inf") if bounds[1] is None else bounds[1]),
    )

    def bounded(ratio: float) -> float:
        if mode.endswith("truncate"):
            return min(max(ratio, least), most)
        return ratio if least <= ratio <= most else 0.0

    expected = []
    for row, real in zip(rows, mask.tolist(), strict=True):
        logs = [-0.75 - value if use and value == value else 0.0 for value, use in zip(row, real, strict=True)]
        logs = [sum(logs)] if mode.startswith("sequence") else logs
        expected.append([bounded(float(torch.tensor(log).exp())) for log in logs])
    torch.testing.assert_close(importance_ratio(old, sampled, mask, mode, bounds), torch.tensor(expected))
