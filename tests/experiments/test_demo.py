"""`appo demo` end to end on the shipped policy, as short as it can be, and its first-step assertion."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from appo.evaluation.inference import Prediction, accuracy
from appo.experiments.demo import DemoSettings, RewardsMustVary, run_demo
from appo.reports.run_folder import RunFolder


@pytest.mark.slow
def test_the_demo_trains_records_and_prints(tmp_path):
    console = Console(file=io.StringIO(), width=140)
    output = tmp_path / "run"
    result = run_demo(DemoSettings(output, steps=1, questions=16), console)
    folder = RunFolder.open(output)
    assert folder.config["demo"]["steps"] == 1
    assert folder.config["training"]["method"] == "appo"
    described = folder.describe()
    assert described["versions"]["trl"].startswith("1.16")
    first = folder.read_metrics()[0]
    assert first["reward_std"] > 0
    assert 1 < first["appo/mean_weight"] < 1.7
    assert 0 < first["appo/crucial_frames"] <= 8
    assert {"time/decode", "time/generate", "time/score", "time/update"} <= first.keys()
    records = list(folder.read_rollouts())
    trained = [record for record in records if record.id.startswith("l1-0-")]
    filmed = [record for record in records if record not in trained]
    assert len(trained) == 2
    assert {record.step for record in filmed} == {0, 1}
    assert len({(record.id, record.step) for record in filmed}) == len(filmed), "once a step"
    asked = {(record.id, record.step) for record in filmed}
    assert {(record.id, record.step) for record in result.groups} <= asked
    assert all((folder.frames / record.film).is_file() for record in records)
    for record in records:
        for response in record.responses:
            assert len(response.weights) == len(response.tokens) == len(response.frame_attention)
            assert all(1.0 <= weight <= 1.7 + 1e-6 for weight in response.weights)
    written = json.loads((output / "evaluation.json").read_text())
    for when, summaries in (("before", result.before), ("after", result.after)):
        assert summaries.keys() == {"L1", "L2", "L3"}
        for level, summary in summaries.items():
            predictions = [Prediction(**prediction) for prediction in written[when][level].pop("predictions")]
            assert accuracy(predictions) == summary, "the table is made of these very predictions"
    screen = console.file.getvalue()
    assert "greedy accuracy on held-out questions" in screen
    assert "crucial: " in screen
    assert (output / "summary.svg").exists()
    assert str(output / "spotlight.html") in screen.replace("\n", "")
    page = json.loads((output / "spotlight.json").read_text())
    assert len(page["groups"]) == len(records)
    assert page["runs"][0]["notes"] == []
    assert (output / "policy" / "model.safetensors").exists()


def test_equal_rewards_in_the_first_step_end_the_run():
    callback = RewardsMustVary()
    callback.on_log(None, SimpleNamespace(global_step=1), None, {"reward_std": 0.1})
    callback.on_log(None, SimpleNamespace(global_step=2), None, {"reward_std": 0.0})
    with pytest.raises(ValueError, match="nothing can be learned"):
        callback.on_log(None, SimpleNamespace(global_step=1), None, {"reward_std": 0.0})
