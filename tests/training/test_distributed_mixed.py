"""Two processes whose rows differ in kind: they make the same calls, and are the run that one process makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import clips
from tests.training.test_distributed import assert_same_run, measured, run_all

# All that is gathered over processes: usual shares, the mean weight, metrics.
GATHERED = {"frame_attention": "relative", "base_weight": 0.2, "normalize_weights": True, "shuffle_dataset": False}
# Adam divides by the size of a gradient: without epsilon, one that is nothing but rounding makes a whole step.
FEW = {"max_steps": 2, "score_tokens": 2, "top_frames": 1, "frame_tokens": 2, "adam_epsilon": 1e-2}
CLOSE = 2e-5
TWO_GROUPS = {1: {"per_device_train_batch_size": 16}, 2: {"per_device_train_batch_size": 8}}
# Nothing is gathered: the update's own forward pass scores, and processes weigh as often as each other.
IN_UPDATE = {"frame_attention": "raw", "normalize_weights": False}
# Kinds of rows: of each global batch process 0 has the first half.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("video, text", {}),
    ("video, text", IN_UPDATE),
    ("text, picture", {}),
    ("same video twice", {}),
    ("picture and video, text", {"freeze_vision_tower": False}),
    ("picture and video, text", {"freeze_vision_tower": False, **IN_UPDATE}),
]


def tasks(processes: int) -> list[dict[str, Any]]:
    return [
        {"name": f"-{number}", "rows": rows, **FEW, **GATHERED, **settings}
        | (TWO_GROUPS[processes] if rows == "same video twice" else {})
        for number, (rows, settings) in enumerate(CASES)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    clips(folder / "clips", 8)
    return folder


@pytest.fixture(scope="module")
def alone(folder) -> list[dict[str, Any]]:
    return run_all(folder, 1, "ddp", tasks(1))


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_processes_with_rows_of_other_kinds_do_what_one_does(folder, alone, sharding):
    """They waited for each other for ever: in gathers that one of them left out, or in layers of the vision tower."""
    results = run_all(folder, 2, sharding, tasks(2))
    for (rows, _), result, one in zip(CASES, results, alone, strict=True):
        assert (result["sharded"] > 0) == (sharding == "fsdp2")
        assert ("video" in rows) == bool(measured(one, "appo/crucial_frames")), rows
        assert_same_run(result, one, CLOSE)
