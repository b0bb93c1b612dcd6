"""Gains of a grid: worked by hand, against a slow bootstrap, against the project's own intervals, and by symmetry."""

from __future__ import annotations

import random

import numpy as np
import pytest

from appo.evaluation.statistics import bootstrap_interval
from appo.experiments.study.summary import figures, gains


def grid_of(shares: list[list[float]], questions: int = 10) -> np.ndarray:
    """(Q, P, R) of zeros and ones with these means."""
    right_QPR = np.zeros((questions, len(shares), len(shares[0])))
    for p, row in enumerate(shares):
        for r, share in enumerate(row):
            right_QPR[: round(share * questions), p, r] = 1
    return right_QPR


def random_grid(seed: int, questions: int = 60, perceivers: int = 3, reasoners: int = 2) -> np.ndarray:
    rng = np.random.default_rng(seed)
    hard_Q11 = rng.random((questions, 1, 1))
    able = np.linspace(0.3, 0.9, perceivers)[:, None] * np.linspace(0.5, 1.0, reasoners)[None]
    return (0.5 * hard_Q11 + 0.5 * rng.random((questions, perceivers, reasoners)) < able).astype(float)


def test_a_grid_of_two_by_two_worked_by_hand() -> None:
    """A better perceiver adds 0.4 before the weak and 0.6 before the strong reasoner; a better reasoner 0.1 and 0.3."""
    found = gains(grid_of([[0.2, 0.3], [0.6, 0.9]], questions=1000))
    by_hand = {
        "perception": 0.5,
        "perception/step": 0.5,
        "perception/step/1": 0.5,
        "perception/carried": 0.5 / 0.6,
        "reasoning": 0.2,
        "reasoning/step": 0.2,
        "reasoning/step/1": 0.2,
        "reasoning/carried": 0.2 / 0.3,
        "difference": 0.3,
        "difference/step": 0.3,
        "difference/carried": 0.5 / 0.6 - 0.2 / 0.3,
    }
    assert {name: gain.value for name, gain in found.items()} == pytest.approx(by_hand)


def test_steps_of_a_longer_axis_worked_by_hand() -> None:
    found = figures(np.array([[0.1, 0.2], [0.4, 0.3], [0.5, 0.8]]))
    assert found["perception/step/1"] == pytest.approx((0.3 + 0.1) / 2)
    assert found["perception/step/2"] == pytest.approx((0.1 + 0.5) / 2)
    assert found["perception"] == pytest.approx((0.4 + 0.6) / 2)
    assert found["perception/step"] == pytest.approx(0.25)
    assert found["reasoning"] == pytest.approx((0.1 - 0.1 + 0.3) / 3)
    assert found["reasoning/step"] == found["reasoning"]


def test_the_intervals_are_those_of_a_slow_bootstrap() -> None:
    right_QPR = random_grid(0)
    found = gains(right_QPR, resamples=6000)
    rng, drawn = random.Random(0), []
    rows = right_QPR.tolist()
    for _ in range(6000):
        picked = rng.choices(rows, k=len(rows))
        cell = [[sum(row[p][r] for row in picked) / len(picked) for r in range(2)] for p in range(3)]
        perception = sum(cell[2][r] - cell[0][r] for r in range(2)) / 2
        reasoning = sum(cell[p][1] - cell[p][0] for p in range(3)) / 3
        drawn.append((perception, perception / 2 - reasoning, perception / (cell[2][1] - cell[0][1])))
    for place, name in enumerate(("perception", "difference/step", "perception/carried")):
        values = sorted(row[place] for row in drawn)
        low, high = values[150], values[-151]
        assert found[name].low == pytest.approx(low, abs=0.02), name
        assert found[name].high == pytest.approx(high, abs=0.02), name


def test_a_gain_is_a_mean_over_questions_and_has_its_interval() -> None:
    right_QPR = random_grid(1, questions=200)
    found = gains(right_QPR, resamples=8000)
    perception_Q = (right_QPR[:, -1] - right_QPR[:, 0]).mean(axis=1)
    reasoning_Q = (right_QPR[:, :, -1] - right_QPR[:, :, 0]).mean(axis=1)
    for name, values_Q in {"perception": perception_Q, "difference": perception_Q - reasoning_Q}.items():
        low, high = bootstrap_interval([values_Q.tolist()], resamples=8000)
        assert found[name].value == pytest.approx(values_Q.mean())
        assert (found[name].low, found[name].high) == pytest.approx((low, high), abs=0.01)


def test_perceivers_and_reasoners_are_treated_alike() -> None:
    right_QPR = random_grid(2, perceivers=3, reasoners=4)
    there, swapped = figures(right_QPR.mean(axis=0)), figures(right_QPR.mean(axis=0).T)
    for name, value in there.items():
        side, _, rest = name.partition("/")
        other = {"perception": "reasoning", "reasoning": "perception", "difference": "difference"}[side]
        mirrored = swapped[f"{other}/{rest}" if rest else other]
        assert mirrored == pytest.approx(-value if side == "difference" else value)


def test_intervals_hold_the_true_gain_about_as_often_as_they_say() -> None:
    true = figures(np.mean([random_grid(1000 + i).mean(axis=0) for i in range(400)], axis=0))
    found = [gains(random_grid(i), resamples=400)["difference"] for i in range(200)]
    held = sum(gain.low <= true["difference"] <= gain.high for gain in found)
    assert 180 <= held <= 200  # 95 % of 200 is 190; the percentile bootstrap is a little narrow


def test_one_perceiver_has_no_gain_of_perception() -> None:
    assert set(gains(random_grid(3, questions=1000, perceivers=1))) == {
        "reasoning",
        "reasoning/step",
        "reasoning/step/1",
        "reasoning/carried",
    }


def test_a_score_that_does_not_rise_carries_no_gain() -> None:
    assert "perception/carried" not in gains(grid_of([[0.2, 0.6], [0.5, 0.6]]))
    hardly = gains(grid_of([[0.2, 0.6], [0.5, 0.7]]))  # one question of ten, which many resamples miss
    assert "perception" in hardly
    assert not {"perception/carried", "difference/carried"} & set(hardly)


@pytest.mark.parametrize("shape", [(0, 2, 2), (5, 1, 1)])
def test_no_gain_without_questions_or_a_second_member(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="there is no gain"):
        gains(np.zeros(shape))
