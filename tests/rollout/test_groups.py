"""groups, resampling, batches, stopwatch: the bookkeeping between TRL's rows and the project's groups."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from appo.models.prompt import Prompt
from appo.rollout.dynamic_sampling import FreshRows, TotalReward, is_flat, replace_flat
from appo.rollout.timers import Stopwatch
from appo.training.trl_batch import batch_weights, by_group, by_row
from appo.training.update import RowsModel
from appo.types import Group, PerceptionWeights, Sample, VideoQA
from tests.support.tiny import IMAGE, VIDEO, tiny_model

QUESTION = VideoQA("", None, "", "")
ONE = TotalReward(torch.tensor([1.0]))


def group_of(*rewards: float, name: str = "") -> Group:
    return Group({"name": name}, QUESTION, samples=[Sample([2], "x", torch.tensor([reward])) for reward in rewards])


@pytest.mark.parametrize(
    ("rewards", "weights", "flat"),
    [
        ([[1.0, 0.0], [1.0, 0.0]], [0.9, 0.1], True),
        ([[1.0, 0.0], [0.0, 1.0]], [0.9, 0.1], False),
        ([[1.0, 0.0], [0.0, 1.0]], [0.5, 0.5], True),
        ([[1.0, float("nan")], [1.0, 0.0]], [0.9, 0.1], True),
    ],
)
def test_a_group_is_flat_when_all_total_rewards_are_equal(rewards, weights, flat):
    group = Group({}, QUESTION, samples=[Sample([2], "x", torch.tensor(row)) for row in rewards])
    assert is_flat(group, TotalReward(torch.tensor(weights))) is flat


NAN = float("nan")


@pytest.mark.parametrize(
    ("rewards", "aggregation", "flat"),
    [
        # A response that no function has rewarded is left out: TRL's mean is that of the others.
        ([[1.0, NAN], [1.0, NAN], [NAN, NAN]], "sum_then_normalize", True),
        ([[1.0, NAN], [0.0, NAN], [NAN, NAN]], "sum_then_normalize", False),
        ([[NAN, NAN], [NAN, NAN], [0.0, 1.0]], "sum_then_normalize", True),
        # Differences of one function cancel those of the other.
        ([[1.0, 0.0], [0.0, 1.0]], "normalize_then_sum", True),
        ([[10.0, 0.0], [0.0, 10.0], [5.0, 5.0], [6.0, 4.0]], "sum_then_normalize", True),
        # Equal sums, but a function with small differences counts as much as one with large ones, and the reverse.
        ([[1.0, 1.0], [0.0, 2.0], [0.5, 1.5], [0.0, 2.0]], "normalize_then_sum", True),
        ([[1.0, 0.2], [0.0, 0.0], [1.0, 0.0]], "normalize_then_sum", False),
        ([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]], "normalize_then_sum", False),
        ([[0.9, 0.3], [0.9, 0.3], [0.9, 0.3]], "normalize_then_sum", True),
    ],
)
def test_a_group_is_flat_when_trl_would_make_all_its_advantages_zero(rewards, aggregation, flat):
    group = Group({}, QUESTION, samples=[Sample([2], "x", torch.tensor(row)) for row in rewards])
    assert is_flat(group, TotalReward(torch.tensor([1.0, 1.0]), aggregation)) is flat


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, NAN]), min_size=2, max_size=2), min_size=2, max_size=5),
    st.sampled_from([(1.0, 1.0), (0.9, 0.1), (1.0, 0.0)]),
    st.sampled_from(["sum_then_normalize", "normalize_then_sum"]),
)
def test_flat_groups_are_those_without_advantages(rewards, weights, aggregation):
    """Against TRL's own arithmetic (grpo_trainer.py, `_generate_and_score_completions`), written out in numpy."""
    given_GR, weights_R = np.array(rewards), np.array(weights)
    scored_G = ~np.isnan(given_GR).all(axis=1)
    summands_GR = given_GR
    if aggregation == "normalize_then_sum":
        columns = []
        for column in given_GR.T:
            real = column[~np.isnan(column)]
            std = real.std(ddof=1) if len(real) > 1 else 0.0
            columns.append((column - (real.mean() if len(real) else 0.0)) / (std + 1e-4))
        summands_GR = np.stack(columns, axis=1)
    totals = np.nansum(summands_GR * weights_R, axis=1)[scored_G]
    advantages = totals - totals.mean() if len(totals) else totals
    group = Group({}, QUESTION, samples=[Sample([2], "x", torch.tensor(row)) for row in rewards])
    flat = is_flat(group, TotalReward(torch.tensor(weights), aggregation))
    assert flat == bool(np.all(np.abs(advantages) < 1e-5))


def test_useful_fresh_groups_replace_flat_ones_in_order():
    groups = [group_of(1, 1, name="a"), group_of(0, 1, name="b"), group_of(0, 0, name="c"), group_of(1, 1, name="d")]
    fresh = [group_of(0, 0, name="x"), group_of(0, 1, name="y"), group_of(1, 0, name="z")]
    result, replaced = replace_flat(groups, fresh, ONE)
    assert [group.row["name"] for group in result] == ["y", "b", "z", "d"]
    assert replaced == 2


@given(st.lists(st.booleans(), max_size=8), st.lists(st.booleans(), max_size=8))
def test_replacing_never_loses_a_useful_group(old, new):
    groups = [group_of(0, float(useful), name=f"old{i}") for i, useful in enumerate(old)]
    fresh = [group_of(0, float(useful), name=f"new{i}") for i, useful in enumerate(new)]
    result, replaced = replace_flat(groups, fresh, ONE)
    assert len(result) == len(groups)
    assert sum(not is_flat(group, ONE) for group in result) == min(len(old), sum(old) + sum(new))
    assert replaced == min(len(old) - sum(old), sum(new))
    assert all(result[i] is group for i, group in enumerate(groups) if not is_flat(group, ONE))


def test_fresh_rows_are_a_seeded_shuffle_that_visits_every_row():
    dataset = Dataset.from_list([{"n": i} for i in range(7)])
    first = [row["n"] for row in FreshRows(dataset, 3).draw(14)]
    assert first == [row["n"] for row in FreshRows(dataset, 3).draw(14)]
    assert sorted(first[:7]) == sorted(first[7:]) == list(range(7))
    assert first != [row["n"] for row in FreshRows(dataset, 4).draw(14)]
    assert [row["n"] for row in FreshRows(dataset, 3).draw(3, keep=lambda row: row["n"] > 4)] == [
        n for n in first if n > 4
    ][:3]
    stream = FreshRows(dataset.to_iterable_dataset(), 3).draw(14)
    assert sorted(row["n"] for row in stream) == sorted(2 * list(range(7)))


def test_batches_by_group_and_by_row_are_inverse():
    batch = {
        "ids": torch.arange(24).view(6, 4),
        "advantages": torch.arange(6.0),
        "count": torch.tensor(3),
        "none": None,
    }
    grouped = by_group(batch, 3)
    assert grouped["ids"].shape == (2, 3, 4)
    assert grouped["advantages"].tolist() == [[0, 1, 2], [3, 4, 5]]
    back = by_row(grouped)
    assert torch.equal(back["ids"], batch["ids"])
    assert torch.equal(back["advantages"], batch["advantages"])
    assert back["count"] is batch["count"]
    assert back["none"] is None


def test_weights_of_groups_of_different_lengths_in_one_batch():
    weights = PerceptionWeights(
        weights_GN=torch.tensor([[1.5, 1.0], [1.2, 1.7]]),
        crucial_F=torch.tensor([True, False, True]),
        scores_GF=torch.zeros(2, 3),
        chosen_GN=torch.tensor([[True, False], [True, True]]),
    )
    mask = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 0, 0]])
    result, metrics = batch_weights([weights, None], mask)
    assert result.tolist() == [[1.5, 1.0, 1.0], [pytest.approx(1.2), pytest.approx(1.7), 1.0], [1.0] * 3, [1.0] * 3]
    assert metrics == {
        "mean_weight": (pytest.approx(1.5 + 1.0 + 1.2 + 1.7 + 4), 8),
        "chosen_share": (3, 8),
        "crucial_frames": (2, 1),
        "groups_without_crucial_frames": (0, 1),
    }, "the second group has no frames that could be crucial"


def test_calls_about_rows_get_the_videos_of_their_groups():
    prompts = [
        Prompt(
            torch.tensor([[9]]),
            torch.tensor([[0]]),
            pixel_values_videos=torch.full((2, 3), float(i)),
            video_grid_thw=torch.tensor([[1, 2, i + 1]]),
        )
        for i in range(2)
    ]
    calls = []
    model = RowsModel(lambda **inputs: calls.append(inputs), prompts, 2, tiny_model())
    model(input_ids=torch.tensor([[VIDEO, 1, IMAGE]] * 4), attention_mask="kept")
    assert calls[0]["pixel_values_videos"][:, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert calls[0]["video_grid_thw"][:, 2].tolist() == [1, 1, 2, 2]
    assert calls[0]["mm_token_type_ids"].tolist() == [[2, 0, 1]] * 4
    assert calls[0]["attention_mask"] == "kept"
    with pytest.raises(AssertionError, match="all rows at once"):
        model(input_ids=torch.tensor([[VIDEO, 1, IMAGE]] * 3))


def test_parts_of_a_step_add_up_to_the_whole():
    watch = Stopwatch(["score", "update"], clock=iter([0.0, 1.0, 3.0, 10.0]).__next__)
    with watch("update"), watch("generate"):
        pass
    assert watch.read() == {"score": 0.0, "generate": 2.0, "update": 8.0}
    assert watch.read() == {"score": 0.0, "update": 0.0}
