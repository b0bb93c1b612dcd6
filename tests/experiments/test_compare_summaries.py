"""The numbers of a comparison, worked again by hand from raw cells; the page and the curves made of them."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from appo.experiments.compare.compare import Comparison, compare
from appo.experiments.compare.methods import VARIANTS, variant_of, variants_of
from appo.experiments.compare.report import (
    DRAWN,
    PANELS,
    WINDOW,
    ablation_curves,
    ablations,
    learning_curves,
    markdown,
    mean_curve,
    points_over_dapo,
)
from appo.experiments.compare.summaries import MEASURES, difference, paired_seeds, summary
from tests.support.svg import curves_of, size_of, words_of

SETTINGS = {"steps": 4, "questions": 8, "level": "L1"}


def cell(accuracies: list[float], right: dict[str, str], weight: float | None = None) -> dict[str, Any]:
    """A cell with these accuracies of its steps and these answers; half of its descriptions are right throughout."""
    same = {"entropy": 1.0, "grad_norm": 0.5}
    steps = [
        {"step": i, "accuracy": a, "generated": 100.0 * i, "own_seconds": 2.0 * i, **same}
        for i, a in enumerate(accuracies, 1)
    ]
    for step in steps if weight is not None else ():
        step |= {"mean_weight": weight, "recall": 0.5, "crucial": 0.25}
    levels = {
        name: {"right": bits, "formed": "1" * len(bits), "what": "10" * (len(bits) // 2), "when": "1" * len(bits)}
        for name, bits in right.items()
    }
    return {"curve": steps, "levels": levels, "perception": {"winners": 0.3, "recall_raw": 0.9, "crucial_raw": 0.5}}


def answers(ones: int) -> dict[str, str]:
    return dict.fromkeys(("L1", "L2", "L3"), "1" * ones + "0" * (8 - ones))


CELLS = {
    ("start", 0): cell([], answers(2)),
    ("dapo", 0): cell([0.1, 0.2, 0.3, 0.5, 0.6, 0.7], answers(4)),
    ("dapo", 1): cell([0.1, 0.2, 0.3, 0.5, 0.5, 0.5], answers(3)),
    ("dapo", 2): cell([0.9] * 6, answers(8)),
    ("appo", 0): cell([0.1, 0.2, 0.3, 0.5, 0.7, 0.8], answers(5), 1.1),
    ("appo", 1): cell([0.1, 0.2, 0.3, 0.5, 0.6, 0.8], answers(5), 1.3),
    ("oracle-tokens", 0): cell([0.1, 0.2, 0.3, 0.5, 0.9, 1.0], answers(8), 0.1),
    ("oracle-tokens", 1): cell([0.1, 0.2, 0.3, 0.5, 0.9, 0.9], answers(7), 0.1),
}
METHODS = ["start", "dapo", "appo", "oracle-tokens"]


def test_only_seeds_that_all_methods_have_finished_are_compared() -> None:
    assert paired_seeds(CELLS, METHODS) == [0, 1]
    assert paired_seeds(CELLS, ["start", "dapo"]) == [0, 1, 2]
    assert paired_seeds(CELLS, ["dapo", "grpo"]) == []


def test_means_and_paired_differences_by_hand() -> None:
    found = summary(CELLS, METHODS)
    assert found["seeds"] == {"dapo": [0, 1, 2], "appo": [0, 1], "oracle-tokens": [0, 1]}
    means = found["means"]
    assert means["dapo"]["reward"] == pytest.approx((0.65 + 0.5 + 0.9) / 3), "the last two of six steps"
    assert means["appo"]["reward"] == pytest.approx((0.75 + 0.7) / 2)
    assert means["appo"]["learning"] == pytest.approx((0.1 + 0.2 + 0.3 + 0.5 + (0.7 + 0.6) / 2 + 0.8) / 6), "all six"
    assert means["dapo"]["L2"] == pytest.approx(5 / 8)
    assert means["start"]["L1"] == pytest.approx(2 / 8)
    assert means["start"]["reward"] is None
    assert (means["appo"]["what"], means["appo"]["when"]) == (0.5, 1.0)
    assert means["appo"]["tokens"] == 600
    assert means["appo"]["mean_weight"] == pytest.approx(1.2)
    assert means["dapo"]["mean_weight"] is None
    to_dapo = found["differences"]["dapo"]["appo"]
    assert to_dapo["reward"]["each"] == pytest.approx([0.1, 0.2])
    assert to_dapo["reward"]["mean"] == pytest.approx(0.15)
    assert to_dapo["reward"]["p"] == 0.5, "two of four assignments of signs"
    assert (to_dapo["reward"]["low"], to_dapo["reward"]["high"]) == pytest.approx((0.1, 0.2))
    assert to_dapo["L3"]["each"] == pytest.approx([1 / 8, 2 / 8])
    assert "grpo" not in found["differences"]
    assert found["recovered"]["oracle-tokens"]["appo"]["reward"] == pytest.approx(0.15 / 0.35)
    assert found["recovered"]["oracle-tokens"]["appo"]["L1"] == pytest.approx(1.5 / 4)


def test_an_oracle_without_a_sure_gain_recovers_nothing_and_one_seed_has_no_interval() -> None:
    worse = {**CELLS, ("oracle-tokens", 1): cell([0.1] * 6, answers(1), 0.1)}
    assert summary(worse, METHODS)["recovered"]["oracle-tokens"] == {}
    one = difference(CELLS, "appo", "dapo", "L1", [0])
    assert (one["mean"], one["low"], one["high"], one["p"]) == (pytest.approx(1 / 8), None, None, None)
    unscored = {**CELLS, ("sft", 0): cell([], answers(4)), ("sft", 1): cell([], answers(4))}
    assert summary(unscored, METHODS)["differences"]["dapo"].keys() == {"appo", "oracle-tokens"}
    found = difference(unscored, "sft", "dapo", "reward", [0, 1])
    assert (found["low"], found["high"], found["p"]) == (None, None, None), "it samples nothing while it trains"
    page = markdown(summary(unscored, ["dapo", "sft"]), SETTINGS, [])
    assert "| sft | 2 | - | - |" in page
    assert "| sft | - | - | - |" in page
    assert summary({}, METHODS) == {"seeds": {}, "means": {}, "differences": {}, "recovered": {}}


def test_intervals_cover_the_true_difference_about_as_often_as_they_say() -> None:
    rng, hits = random.Random(0), 0
    for _ in range(200):
        cells = {}
        for seed in range(8):
            shared = rng.gauss(0.5, 0.2)  # how hard the seed is, which pairing takes out
            for name, gain in (("dapo", 0.0), ("appo", 0.05)):
                cells[name, seed] = cell([shared + gain + rng.gauss(0, 0.02)] * 3, answers(4))
        found = difference(cells, "appo", "dapo", "reward", range(8))
        hits += found["low"] <= 0.05 <= found["high"]
    assert 165 <= hits <= 198, "a bootstrap of eight is too narrow: about 88 %"


def test_the_page_has_the_numbers_of_the_cells() -> None:
    page = markdown(summary(CELLS, METHODS), SETTINGS, ["2-appo", "2-oracle-tokens"])
    assert page.startswith("4 steps at the demo's settings on clips of level L1, 8 held-out questions a level.")
    assert "Not finished: 2-appo, 2-oracle-tokens." in page
    rows = [
        [part.strip() for part in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")
    ]
    by_name = [row for row in rows if row[0] == "appo"]
    assert by_name[0][1:13] == [
        "2", "42.5", "72.5", "62.5", "62.5", "62.5", "50.0", "100.0", "1", "1.20", "1.00", "0.50",
    ]  # fmt: skip
    assert by_name[1][1:5] == [
        "2",
        "+5.0 (+3.3, +6.7) p 0.5",
        "+15.0 (+10.0, +20.0) p 0.5",
        "+18.8 (+12.5, +25.0) p 0.5",
    ]
    assert by_name[2][1:] == ["+3.3", "+6.7", "-"], "each seed that DAPO has finished"
    assert by_name[3][1:3] == ["43", "43"]
    assert by_name[4][1:] == ["50.0 (25.0)", "90.0 (50.0)", "-", "30.0", "-"]
    assert "|" not in markdown(summary({}, METHODS), SETTINGS, [])


def test_curves_are_moving_means_over_seeds() -> None:
    first, second = ([{"step": i, "y": float(v)} for i, v in enumerate(values)] for values in ([1, 3, 5], [3, 5, 7, 9]))
    assert mean_curve([first, second], "step", "y") == [(0, 2.0), (1, 3.0), (2, 4.0)]
    long = [{"step": i, "y": float(i)} for i in range(10)]
    assert mean_curve([long], "step", "y")[-1] == (9, np.mean(range(10 - WINDOW, 10)))
    assert mean_curve([[{"step": 1.0}]], "step", "y") == []


def test_the_picture_is_well_formed_and_has_a_line_for_every_method_in_every_panel() -> None:
    svg = learning_curves(CELLS, METHODS)
    lines, (width, height) = curves_of(svg).values(), size_of(svg)
    assert len(lines) == len(PANELS) * 3
    for points in lines:
        assert len(points) == 6
        assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
    assert {"dapo", "appo", "oracle-tokens", "means over 2 to 3 seeds, moving mean of 5 steps"} <= set(words_of(svg))
    assert learning_curves(CELLS, METHODS) == svg, "the same numbers give the same file"
    flat = {key: cell([0.5], answers(4)) for key in CELLS}
    assert len(curves_of(learning_curves(flat, METHODS))) == len(lines)


def test_without_matplotlib_a_comparison_fails_before_it_starts(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"figures need a package: pip install 'appo\[plots\]'"):
        compare(Comparison(tmp_path / "new"), Console(quiet=True), None)
    assert not (tmp_path / "new").exists()


def usual(method: str, setting: str) -> Any:
    return variant_of(method).settings.get(setting, {"frame_tokens": 8, "strategy": "soft"}.get(setting))


def test_ablations_are_methods_that_differ_in_one_setting() -> None:
    names = [
        "dapo", "appo+frame_tokens=16", "appo", "appo-hard", "appo+frame_tokens=4", "appo-shuffled", "raw-base",
        "appo-relative", "appo-relative+frame_tokens=4+strategy=hard", "appo+frame_tokens=4+strategy=hard",
    ]  # fmt: skip
    found = {(one.base, one.setting): one.points for one in ablations(names, usual)}
    assert found["appo", "frame_tokens"] == ((4, "appo+frame_tokens=4"), (8, "appo"), (16, "appo+frame_tokens=16"))
    assert found["appo", "strategy"] == (("hard", "appo-hard"), ("soft", "appo"))
    assert found["raw-base", "frame_attention"] == (("raw", "raw-base"), ("relative", "appo-relative"))
    assert {"dapo", "appo-shuffled"}.isdisjoint(base for base, _ in found)
    assert ablations(["dapo", "appo", "appo-relative"], usual) == []


def test_curves_of_an_ablation_stand_where_its_numbers_are() -> None:
    cells = {**CELLS, **{("appo+frame_tokens=4", seed): CELLS["oracle-tokens", seed] for seed in (0, 1)}}
    names = [*METHODS, "appo+frame_tokens=4"]
    to_dapo = summary(cells, names)["differences"]["dapo"]
    svg = ablation_curves(ablations(names, usual), points_over_dapo(to_dapo), "points over dapo")
    lines = list(curves_of(svg).values())
    assert len(lines) == len(DRAWN)
    assert all(len(line) == 2 for line in lines)
    # Heights are linear in the differences: 50 and 18.75 points at L1.
    (reward_4, reward_8), (right_4, right_8) = ([y for _, y in line] for line in lines[:2])
    one_point = (right_8 - right_4) / (50 - 18.75)
    assert one_point > 0
    assert (reward_8 - reward_4) / one_point == pytest.approx(100 * 0.4 / 6, abs=0.1)
    assert {"4", "8", "appo: frame_tokens, points over dapo"} <= set(words_of(svg))


def test_methods_are_checked_by_name() -> None:
    assert variants_of(list(VARIANTS)) == list(VARIANTS)
    assert set(MEASURES) == {"learning", "reward", "L1", "L2", "L3", "what", "when"}
    for names, message in (
        (["ppo"], "unknown method 'ppo': choose from start, grpo"),
        (["dapo", "dapo"], "dapo is given twice"),
        (["dapo", "lr-control"], "lr-control needs the mean weight of appo"),
    ):
        with pytest.raises(ValueError, match=message):
            variants_of(names)
