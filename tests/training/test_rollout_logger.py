"""Rollouts in the run folder: what is written comes back equal, what is no record is named by file and line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from appo.reports.jsonl import RecordError
from appo.reports.records import ResponseRecord, RolloutRecord
from appo.reports.run_folder import RunFolder
from tests.reports.record_cases import RECORD, RESPONSE


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", {"seed": 1})


def test_rollouts_come_back_equal(run: RunFolder) -> None:
    records = [RECORD, replace(RECORD, event_frames=None, responses=[], timestamps=[], crucial_frames=[])]
    for record in records:
        run.append_rollout(record)
    assert list(run.read_rollouts()) == records
    assert len((run.path / "rollouts.jsonl").read_bytes().splitlines()) == 2


def test_arrays_are_rounded_and_tensors_taken(run: RunFolder) -> None:
    attention_NF = torch.rand(5, 7, generator=torch.manual_seed(0), dtype=torch.float64)
    response = replace(
        RESPONSE,
        weights=np.full(5, 1.23456789, np.float32),
        chosen=torch.tensor([True] * 5),
        frame_attention=attention_NF,
        advantage=torch.tensor(1 / 3),
    )
    run.append_rollout(replace(RECORD, responses=[response], crucial_frames=torch.tensor([0, 6])))
    (back,) = run.read_rollouts()
    torch.testing.assert_close(
        torch.tensor(back.responses[0].frame_attention).double(), attention_NF, rtol=1e-5, atol=0
    )
    assert back.responses[0].weights == [1.23457] * 5
    assert back.responses[0].chosen == [True] * 5
    assert back.responses[0].advantage == 0.333333
    assert back.crucial_frames == [0, 6]
    longest = max(len(repr(x)) for row in back.responses[0].frame_attention for x in row)
    assert longest <= len("0.0123456"), "6 significant digits"


def test_what_is_not_finite_comes_back_as_nan(run: RunFolder) -> None:
    bad = replace(RESPONSE, rewards={"iou": math.nan}, advantage=math.inf, weights=[math.nan] * 5)
    run.append_rollout(replace(RECORD, responses=[bad]))
    (back,) = run.read_rollouts()
    numbers = [back.responses[0].rewards["iou"], back.responses[0].advantage, *back.responses[0].weights]
    assert all(math.isnan(number) for number in numbers)


NUMBER = st.floats(-1e6, 1e6).map(lambda x: float(f"{x:.6g}"))


@st.composite
def responses(draw: st.DrawFn) -> ResponseRecord:
    tokens, frames = draw(st.integers(0, 4)), draw(st.integers(0, 3))
    per_token = {"min_size": tokens, "max_size": tokens}
    row = st.lists(NUMBER, min_size=frames, max_size=frames)
    return ResponseRecord(
        text=draw(st.text()),
        tokens=draw(st.lists(st.text(), **per_token)),
        weights=draw(st.lists(NUMBER, **per_token)),
        chosen=draw(st.lists(st.booleans(), **per_token)),
        frame_attention=draw(st.one_of(st.just([]), st.lists(row, **per_token))),
        rewards=draw(st.dictionaries(st.text(), NUMBER, max_size=3)),
        advantage=draw(NUMBER),
    )


@settings(max_examples=100, deadline=None)
@given(st.builds(RolloutRecord, step=st.integers(), timestamps=st.lists(NUMBER), responses=st.lists(responses())))
def test_any_record_survives_json(record: RolloutRecord) -> None:
    assert RolloutRecord.from_json(json.loads(json.dumps(record.to_json(), allow_nan=False))) == record


def damaged(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    data = RECORD.to_json()
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.pop("step"), "missing .*'step'"),
        (lambda d: d.pop("responses"), "missing .*'responses'"),
        (lambda d: d["responses"][0].pop("advantage"), "missing .*'advantage'"),
        (lambda d: d.update(step="3"), "`step` is no int"),
        (lambda d: d.update(step=True), "`step` is no int"),
        (lambda d: d.update(answer=None), "`answer` is no str"),
        (lambda d: d.update(timestamps=3), "`timestamps` is no list"),
        (lambda d: d.update(timestamps=["1"]), "'1' is no number"),
        (lambda d: d.update(timestamps=[{}]), "wrong type"),
        (lambda d: d.update(crucial_frames=[0.5]), "`crucial_frames` is no list of int"),
        (lambda d: d.update(responses=[3]), "`responses` is no list of dict"),
        (lambda d: d["responses"][0].update(frame_attention=[1.0]), "`frame_attention` is no list of list"),
        (lambda d: d["responses"][0].update(rewards=[]), "`rewards` is no dict"),
        (lambda d: d["responses"][0]["tokens"].pop(), "differ in length"),
        (lambda d: d["responses"][0]["frame_attention"].pop(), "differ in length"),
    ],
)
def test_a_record_that_is_none_is_named_by_file_and_line(
    run: RunFolder, change: Callable[[dict[str, Any]], Any], says: str
) -> None:
    data = damaged(change)
    with pytest.raises(ValueError, match=says):
        RolloutRecord.from_json(data)
    run.append_rollout(RECORD)
    with (run.path / "rollouts.jsonl").open("a") as handle:
        handle.write(json.dumps(data) + "\n")
    with pytest.raises(RecordError, match=rf"rollouts\.jsonl, line 2: damaged \(.*{says}"):
        list(run.read_rollouts())


def test_fields_of_a_later_version_are_ignored() -> None:
    assert RolloutRecord.from_json(RECORD.to_json() | {"later": 1}) == RECORD
