"""`appo compare` from end to end, as short as it can be: real cells, real processes, kills, folders that do not fit."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from appo.cli.main import main
from appo.evaluation.inference import predict
from appo.experiments.compare import cells
from appo.experiments.compare.compare import Comparison, compare, open_folder, run_one, start_process
from appo.experiments.compare.measurements import encoded, sampled
from appo.experiments.compare.methods import RELATIVE, variant_of
from appo.experiments.demo import prompts_a_step
from appo.reports.jsonl import RecordError
from appo.world import generate, load_policy
from appo.world.policy import MAX_NEW_TOKENS, SAMPLING

TIMES = ("seconds", "own_seconds", "training_seconds", "evaluation_seconds")


class Done:
    """A cell that ran here and now, in the place of its process."""

    def poll(self) -> int:
        return 0


def here(comparison: Comparison, cell: tuple[str, int]) -> Done:
    run_one(comparison, f"{cell[1]}-{cell[0]}")
    return Done()


def fake(comparison: Comparison, cell: tuple[str, int]) -> Done:
    """Writes a cell without any training."""
    method, seed = cell
    steps = [{"step": 1, "accuracy": 0.5 + seed / 10, "mean_weight": 1.2, "generated": 10}]
    bits = dict.fromkeys(("right", "formed", "what", "when"), "10")
    data = {"curve": steps, "levels": dict.fromkeys(("L1", "L2", "L3"), bits), "perception": {}, "method": method,
            "training_seconds": 1.0, "evaluation_seconds": 1.0}  # fmt: skip
    (comparison.output / "cells" / f"{seed}-{method}.json").write_text(json.dumps(data))
    return Done()


def numbers(cell: Any) -> Any:
    """A cell without its clocks."""
    if isinstance(cell, dict):
        return {name: numbers(value) for name, value in cell.items() if name not in TIMES}
    return [numbers(value) for value in cell] if isinstance(cell, list) else cell


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Comparison:
    """Two methods x two seeds x one step, all real."""
    patch = pytest.MonkeyPatch()
    patch.setattr(cells, "MEASURED_QUESTIONS", 2)
    comparison = Comparison(tmp_path_factory.mktemp("compare"), ("dapo", "appo-relative"), 2, 1, 4)
    compare(comparison, quiet(), here)
    patch.undo()
    return comparison


def read(comparison: Comparison, name: str) -> Any:
    return json.loads((comparison.output / "cells" / f"{name}.json").read_text())


def test_cells_hold_what_the_tables_are_made_of(finished) -> None:
    assert sorted(path.stem for path in (finished.output / "cells").iterdir()) == [
        "0-appo-relative", "0-dapo", "1-appo-relative", "1-dapo",
    ]  # fmt: skip
    ours, dapo = read(finished, "0-appo-relative"), read(finished, "0-dapo")
    assert ours["curve"][0]["accuracy"] == dapo["curve"][0]["accuracy"], "the same prompts, the same random numbers"
    assert ours["curve"][0]["accuracy"] != read(finished, "1-dapo")["curve"][0]["accuracy"], "another seed"
    assert 0.2 < ours["curve"][0]["mean_weight"] < 1.7
    assert ours["curve"][0]["generated"] >= 128 * 40
    assert {"recall", "crucial", "winners", "losers", "entropy", "grad_norm"} <= ours["curve"][0].keys()
    for cell in (ours, dapo):
        assert all(len(bits) == 4 for level in cell["levels"].values() for bits in level.values())
        assert 0 < cell["perception"]["winners"] < 1
    summary = json.loads((finished.output / "summary.json").read_text())
    assert summary["seeds"] == {"dapo": [0, 1], "appo-relative": [0, 1]}
    assert summary["unfinished"] == []
    each = summary["differences"]["dapo"]["appo-relative"]["L1"]["each"]
    shares = [
        [read(finished, f"{seed}-{m}")["levels"]["L1"]["right"].count("1") / 4 for m in finished.methods]
        for seed in (0, 1)
    ]
    assert each == pytest.approx([ours - dapo for dapo, ours in shares])
    assert (finished.output / "curves.svg").exists()
    assert "| dapo | 2 |" in (finished.output / "table.md").read_text()


@pytest.mark.slow
def test_a_killed_cell_is_redone_and_equals_the_undisturbed_one(finished, tmp_path, monkeypatch) -> None:
    """Its real process is killed while it trains; nothing half-written is taken for a cell."""
    monkeypatch.setattr(cells, "MEASURED_QUESTIONS", 2)
    again = Comparison(tmp_path, ("dapo",), 1, 1, 4)
    open_folder(again)
    process = start_process(again, ("dapo", 0))
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("clips/train-0-32")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, (tmp_path / "logs" / "0-dapo.log").read_text()
    assert list((tmp_path / "cells").iterdir()) == []
    compare(again, quiet(), here)
    assert numbers(read(again, "0-dapo")) == numbers(read(finished, "0-dapo"))


def test_held_out_questions_encoded_once_are_answered_as_from_their_files(tmp_path) -> None:
    """Features on disk against pixels through the ordinary path, word for word."""
    model, processor = load_policy()
    questions = generate(tmp_path, "L3", 12, 1)
    file = tmp_path / "L3.pt"
    made, read_back = (encoded(file, questions, model, processor) for _ in range(2))
    plain = predict(model, processor, questions, SAMPLING, max_new_tokens=MAX_NEW_TOKENS, instruction="")
    for asked in (made, read_back):
        texts = processor.batch_decode([ids for (ids,) in sampled(model, processor, asked.prompts)], True)
        assert texts == [answer.text for answer in plain]
    bits = cells.evaluated(model, processor, read_back)
    assert bits["right"] == "".join(str(int(answer.right)) for answer in plain)
    assert 0 < bits["right"].count("1") < 12
    assert not any(prompt.has_pixels for prompt in read_back.prompts)


def test_a_changed_setting_is_a_method_of_its_own(tmp_path) -> None:
    variant = variant_of("appo-relative+base_weight=0.5+learning_rate=1e-3+divergence=k3")
    assert variant.settings == {**RELATIVE, "base_weight": 0.5, "learning_rate": 1e-3, "divergence": "k3"}
    assert variant.meaning == "appo-relative, base_weight 0.5, learning_rate 0.001, divergence k3"
    config = cells.config_of("dapo+num_generations=4", 3, 5, tmp_path)
    assert (config.method, config.num_generations, config.seed, config.max_steps) == ("dapo", 4, 3, 5)
    assert prompts_a_step(config) == 32


def never(*args: Any) -> Done:
    raise AssertionError("everything is there")


def test_the_tables_are_of_all_cells_of_the_folder_whichever_command_made_them(finished, tmp_path) -> None:
    own = replace(finished, output=tmp_path / "copy", methods=("dapo",), seeds=1)
    shutil.copytree(finished.output, own.output)
    result = compare(own, quiet(), never)
    assert result["seeds"] == {"dapo": [0, 1], "appo-relative": [0, 1]}
    assert result == compare(replace(own, methods=finished.methods[::-1]), quiet(), never)
    (own.output / "cells" / "0-appo+frame_tokens=16.json").write_text((own.output / "cells/0-dapo.json").read_text())
    assert list(compare(own, quiet(), never)["means"]) == ["dapo", "appo+frame_tokens=16", "appo-relative"]
    (own.output / "cells" / "0-ppo.json").write_text("{}")
    with pytest.raises(RecordError, match=r"0-ppo.json: no finished cell \(unknown method 'ppo'"):
        compare(own, quiet(), never)


def test_what_is_finished_is_not_done_again_and_more_seeds_can_be_added(finished) -> None:
    before = {path: path.read_bytes() for path in (finished.output / "cells").iterdir()}
    compare(finished, quiet(), never)
    assert {path: path.read_bytes() for path in (finished.output / "cells").iterdir()} == before


def test_cells_go_seed_after_seed_and_wait_for_what_they_need(tmp_path) -> None:
    order: list[tuple[str, int]] = []

    def remembering(comparison: Comparison, cell: tuple[str, int]) -> Done:
        order.append(cell)
        return fake(comparison, cell)

    comparison = Comparison(tmp_path, ("start", "lr-control", "appo", "dapo"), 2, 1, 1, workers=2)
    console = quiet()
    compare(comparison, console, remembering)
    assert [seed for _, seed in order] == [0, 0, 0, 0, 1, 1, 1]
    assert order.index(("appo", 0)) < order.index(("lr-control", 0))
    assert "[7/7]" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "left" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_cell_that_fails_ends_the_others_and_names_its_log(tmp_path) -> None:
    ended = []

    class Endless:
        def poll(self) -> None:
            return None

        def kill(self) -> None:
            ended.append("killed")

        def wait(self) -> None:
            ended.append("waited for")

    comparison = Comparison(tmp_path, ("dapo", "grpo"), 1, 1, 1, workers=2)
    with pytest.raises(RecordError, match=r"cell 0-grpo failed, see .*0-grpo\.log; the same command goes on"):
        compare(comparison, quiet(), lambda _, cell: Endless() if cell[0] == "dapo" else Done())
    assert ended == ["killed", "waited for"]


def test_users_mistakes_are_one_line(tmp_path, capsys) -> None:
    compare(Comparison(tmp_path, ("dapo",), 1, 1, 1), quiet(), fake)
    base = ["compare", "--output", str(tmp_path)]
    for words, message in (
        (["--steps", "2", "--questions", "1"], "settings.json: the folder is of {'steps': 1, 'questions': 1, 'level'"),
        (["--level", "L2", "--steps", "1", "--questions", "1"], "settings.json: the folder is of"),
        (["--level", "L7"], "unknown level 'L7': choose from L1, L2, L3"),
        (["--policy", str(tmp_path / "none")], "none"),
        (["--methods", "dapo,ppo"], "unknown method 'ppo'"),
        (["--methods", "appo+frame_token=4"], "'frame_token=4' is no setting=value of APPOConfig"),
        (["--methods", "appo+frame_tokens=0"], "method appo+frame_tokens=0: frame_tokens must be at least 1, got 0"),
        (["--methods", "appo+frame_tokens=many"], "method appo+frame_tokens=many: "),
        (["--methods", "start+frame_tokens=4"], "start is not trained and has no settings"),
        (["--only", "0-ppo"], "there is no such cell"),
        (["--fast"], "unknown argument --fast"),
    ):
        assert main([*base, *words]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert Path(tmp_path / "cells" / "0-dapo.json").exists()
