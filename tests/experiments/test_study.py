"""`appo study` through its command: scores, going on, failures, budgets, and whatever else may go wrong between."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from appo.cli.main import main
from appo.world import load_annotations
from tests.experiments.chat_server import Reply, Seen, chat_server, completion, failure
from tests.support.data_fixtures import put_lines, put_media
from tests.support.eval_runs import save_reader, script
from tests.support.svg import curves_of

KEY = "sk-never-to-be-written-down"
WORLD = ["--perceiver", "truth@0.4", "--perceiver", "truth", "--limit", "24"]
RULES = ["--reasoner", "weak=rules:colour,when", "--reasoner", "rules"]


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def study(output: Path, *words: str) -> int:
    return main(["study", "--output", str(output), *words])


def summary(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "summary.json").read_text()))


def contents(output: Path) -> dict[str, bytes]:
    """All that a study says; what it says about itself (times, command line) and its clips are left out."""
    files = [path for path in output.rglob("*") if path.is_file() and "clips" not in path.parts]
    return {str(f.relative_to(output)): f.read_bytes() for f in files if f.name not in ("eval.json", "questions.jsonl")}


def echo_question(prompt: str, before: int, request: dict[str, Any]) -> Reply:
    return completion(f"<answer>{len(prompt) % 7}</answer>", tokens=(len(prompt), 3))


def served(seen: Seen) -> list[str]:
    return ["--reasoner", f"mine=openai:my-model@{seen.url}", "--retries", "0"]


def test_scores_are_those_of_the_answers_on_disk(tmp_path: Path) -> None:
    assert study(tmp_path, *WORLD, *RULES) == 0
    gold = {question.id: question.answer for question in load_annotations(tmp_path / "clips" / "L1")}
    found = summary(tmp_path)
    score = {}
    for cell in found["cells"]:
        file = tmp_path / "answers" / f"{cell['perceiver']}__{cell['reasoner']}.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        right = [line["text"] == f"<answer>{gold[line['id']]}</answer>" for line in lines]
        assert cell["score"] == pytest.approx(sum(right) / 24, rel=1e-5)
        assert cell["answered"] == len({line["id"] for line in lines}) == 24
        score[cell["perceiver"], cell["reasoner"]] = cell["score"]
    assert score["truth", "rules"] == 1 > score["truth@0.4", "rules"] > 0.2
    gains = found["gains"]
    noise = (score["truth", "weak"] - score["truth@0.4", "weak"] + 1 - score["truth@0.4", "rules"]) / 2
    assert gains["perception"]["value"] == pytest.approx(noise, rel=1e-5)
    assert gains["difference"]["value"] == pytest.approx(noise - gains["reasoning"]["value"], abs=1e-5)
    assert found["missing"] == []
    assert found["costs"] == {}
    page = (tmp_path / "table.md").read_text()
    assert "| truth | " in page
    assert "100.0 (86.2, 100.0) |" in page
    assert len(curves_of((tmp_path / "grid.svg").read_text())) == 4


def test_a_finished_study_loads_no_model_and_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*WORLD, "--perceiver", "tiny=spotlight", *RULES]
    assert study(tmp_path, *words) == 0
    before = contents(tmp_path)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("this was asked before")

    monkeypatch.setattr("appo.experiments.study.describing.load_model", never)
    monkeypatch.setattr("appo.experiments.study.describing.scene_in_words", never)
    monkeypatch.setattr("appo.experiments.study.answering.rule_answer", never)
    assert study(tmp_path, *words) == 0
    assert contents(tmp_path) == before


def test_members_may_join_and_none_may_change(tmp_path: Path, capsys: Any) -> None:
    assert study(tmp_path, *WORLD, *RULES) == 0
    before = contents(tmp_path)
    assert study(tmp_path, *WORLD, *RULES, "--reasoner", "other=rules:first") == 0
    after = contents(tmp_path)
    same = [name for name in before if name.startswith(("answers", "descriptions"))]
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
    assert len(summary(tmp_path)["cells"]) == 6
    capsys.readouterr()
    assert study(tmp_path, *WORLD, "--reasoner", "rules=rules:first") == 2
    assert "reasoner rules was {'known': ['colour'" in capsys.readouterr().err
    assert study(tmp_path, *WORLD[:-1], "20", *RULES) == 2
    assert "limit is 24 there, 20 here" in capsys.readouterr().err


def test_the_tiny_policy_describes_and_its_answers_are_taken_off(tmp_path: Path) -> None:
    words = ["--perceiver", "sharp=spotlight", "--perceiver", "blind=spotlight@1", "--limit", "12", *RULES]
    assert study(tmp_path, *words) == 0
    lines = {
        name: [json.loads(line) for line in (tmp_path / "descriptions" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("sharp", "blind")
    }
    for sharp, blind in zip(lines["sharp"], lines["blind"], strict=True):
        assert sharp["response"] == blind["response"]
        thought = sharp["response"].partition("<think>")[2].partition("</think>")[0].split()
        said = sharp["text"].split()
        assert thought[: len(said)] == said, "the description is the beginning of the thought"
        assert thought[len(said) :].count(".") == 1, "and lacks its last sentence"
        assert blind["text"] != sharp["text"]
        assert len(blind["text"].split()) == len(said)


# --- any model, any dataset ----------------------------------------------------------------------------------------


def test_any_perceiver_any_dataset_and_a_video_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    options = ["an onion", "a carrot"]
    rows = [
        {"id": str(n), "video": f"{n}.mp4", "question": "What is cut?", "options": options, "answer": "B"}
        for n in range(3)
    ]
    put_media(tmp_path, "0.mp4", "1.mp4", "2.mp4")
    good = (tmp_path / "1.mp4").read_bytes()
    (tmp_path / "1.mp4").write_bytes(b"no video")
    asked: list[str] = []

    def messages(question: Any, **_: Any) -> Any:
        asked.append(question.question)
        assert question.options == ()
        return build(question, **_)

    import appo.evaluation.inference

    build = appo.evaluation.inference.build_messages
    monkeypatch.setattr("appo.evaluation.inference.build_messages", messages)
    script(monkeypatch, ["A knife cuts a carrot. The answer is B.", "An onion.", "Carrots at 3 s."])
    output = tmp_path / "study"
    words = ["--dataset", "jsonl", "--annotations", str(put_lines(tmp_path / "mine.jsonl", rows))]
    words += ["--perceiver", f"reader={save_reader(tmp_path / 'reader')}", "--batch-size", "1"]

    def reason(prompt: str, before: int, request: dict[str, Any]) -> Reply:
        assert "A. an onion\nB. a carrot" in prompt
        assert "answer is" not in prompt
        return completion("It is (B)." if "arrot" in prompt.partition("What is cut?")[0] else "<answer>A</answer>")

    with chat_server(reason) as seen:
        assert study(output, *words, *served(seen)) == 2
        error = capsys.readouterr().err
        assert "appo: 1 descriptions of reader are missing: " in error
        assert "1.mp4" in error
        assert all("What is cut?" in question and "do not answer" in question for question in asked)
        found = summary(output)
        assert found["cells"][0] | {"low": 0, "high": 0} == {
            "perceiver": "reader", "reasoner": "mine", "score": 0.5, "low": 0, "high": 0, "answered": 2,
        }  # fmt: skip
        assert found["complete"] == 2
        page = (output / "table.md").read_text()
        assert "of 2 |" in page
        assert "**Missing**: descriptions of reader: 1 of 3" in page
        (tmp_path / "1.mp4").write_bytes(good)
        assert study(output, *words, *served(seen)) == 0
    assert set(seen.prompts.values()) == {1}
    assert len(seen.prompts) == 3
    assert summary(output)["cells"][0]["score"] == pytest.approx(2 / 3, rel=1e-5)
    assert [json.loads(line)["id"] for line in (output / "descriptions/reader.jsonl").open()] == ["0", "1", "2"]


# --- endpoints -----------------------------------------------------------------------------------------------------


def test_equal_descriptions_of_two_perceivers_are_answered_and_paid_once(tmp_path: Path) -> None:
    with chat_server(echo_question) as seen:
        words = [*WORLD, "--perceiver", "again=truth", *served(seen), "--price", "mine=1,2"]
        assert study(tmp_path, *words) == 0
        assert set(seen.prompts.values()) == {1}
    cost = summary(tmp_path)["costs"]["mine"]
    read = sum(map(len, seen.prompts))
    assert cost == {"answers": len(seen.prompts), "read": read, "written": 3 * len(seen.prompts), "unknown": 0,
                    "dollars": pytest.approx((read + 6 * len(seen.prompts)) / 1e6, rel=1e-5)}  # fmt: skip
    again, truth = ((tmp_path / "answers" / f"{name}__mine.jsonl").read_bytes() for name in ("again", "truth"))
    assert again == truth
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_a_budget_stops_the_study_and_a_larger_one_goes_on(tmp_path: Path, capsys: Any) -> None:
    with chat_server(echo_question) as seen:
        words = [*WORLD, *RULES, *served(seen), "--price", "mine=1,2", "--max-answer", "64"]
        assert study(tmp_path, *words, "--budget", "0.005") == 2
        error = capsys.readouterr().err.splitlines()
        assert error[-1].startswith(
            "appo: stopped at the budget of $0.005 (mine: the next answer may cost up to $0.000"
        )
        stopped, answered = summary(tmp_path), len(seen.times)
        assert 4 < answered < 48
        assert stopped["costs"]["mine"]["dollars"] <= 0.005
        assert stopped["costs"]["mine"]["answers"] == answered
        there = sum(lines_in(file) for file in (tmp_path / "answers").glob("*mine*"))
        assert sum(gap["count"] for gap in stopped["missing"]) == 48 - there
        assert "not asked yet" in (tmp_path / "table.md").read_text()
        assert study(tmp_path, *words, "--budget", "0.005") == 2
        assert len(seen.times) == answered, "what was spent counts in the next run"
        assert study(tmp_path, *words, "--budget", "1") == 0
        assert set(seen.prompts.values()) == {1}
    assert summary(tmp_path)["missing"] == []


def test_failures_are_counted_named_and_repeated(tmp_path: Path, capsys: Any) -> None:
    down = True

    def behave(prompt: str, before: int, request: dict[str, Any]) -> Reply:
        return failure(500, "out of order") if down and len(prompt) % 2 else echo_question(prompt, before, request)

    with chat_server(behave) as seen:
        words = [*WORLD, *served(seen), "--at-once", "1"]
        assert study(tmp_path, *words) == 2
        failed = sum(len(prompt) % 2 for prompt in seen.prompts)
        error = capsys.readouterr().err
        assert "out of order" in error
        assert "the same command asks for what is missing again" in error
        missing = summary(tmp_path)["missing"]
        assert sum(gap["count"] for gap in missing) == failed > 3
        assert all("failed, such as InternalServerError" in gap["why"] for gap in missing)
        down = False
        assert study(tmp_path, *words) == 0
        assert all(count == 1 + len(prompt) % 2 for prompt, count in seen.prompts.items())
    assert summary(tmp_path)["missing"] == []
    assert not (tmp_path / "table.md").read_text().count("Missing")


# --- interruptions -------------------------------------------------------------------------------------------------


def start(output: Path, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "appo", "study", "--output", str(output), *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


def when(process: subprocess.Popen[str], true: Callable[[], bool]) -> None:
    """Wait for something to happen in a process that goes on."""
    deadline = time.monotonic() + 240
    while not true():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def lines_in(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def slow(prompt: str, before: int, request: dict[str, Any]) -> Reply:
    reply = echo_question(prompt, before, request)
    return Reply(body=reply.body, after=0.03)


def test_a_study_that_is_killed_again_and_again_ends_as_one_that_was_not(tmp_path: Path) -> None:
    with chat_server(slow) as seen:
        words = ["--perceiver", "tiny=spotlight@0.3", "--perceiver", "truth", "--limit", "32", "--batch-size", "4"]
        words += [*RULES, *served(seen), "--at-once", "3"]
        whole, killed = tmp_path / "whole", tmp_path / "killed"
        assert study(whole, *words) == 0
        asked = len(seen.times)
        described, answered = killed / "descriptions/tiny.jsonl", killed / "answers/tiny__mine.jsonl"
        for file, count in ((described, 5), (answered, 3), (answered, 12)):
            process = start(killed, *words)
            when(process, lambda file=file, count=count: lines_in(file) >= count)
            process.kill()
            process.communicate()
            with file.open("ab") as torn:
                torn.write(b'{"id":"l1-10000-0002')
        assert lines_in(answered) < 32
        with pytest.warns(UserWarning, match="torn"):
            assert study(killed, *words) == 0
    assert contents(killed) == contents(whole)
    on_their_way = 2 * 3  # of each kill, what had been sent and not come back
    assert len(seen.times) - asked <= asked + on_their_way


def test_ctrl_c_ends_with_one_line_and_the_study_goes_on(tmp_path: Path) -> None:
    with chat_server(slow) as seen:
        words = [*WORLD, *served(seen), "--at-once", "1"]
        process = start(tmp_path, *words)
        when(process, lambda: lines_in(tmp_path / "answers/truth@0.4__mine.jsonl") >= 3)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 130
        assert error.strip().splitlines()[-1] == "appo: interrupted"
        assert "Traceback" not in error
        assert study(tmp_path, *words) == 0
        assert sorted(seen.prompts.values())[:-1] == [1] * (len(seen.prompts) - 1)


def test_two_processes_do_not_write_into_one_study(tmp_path: Path, capsys: Any) -> None:
    with chat_server(slow) as seen:
        words = [*WORLD, *served(seen), "--at-once", "1"]
        process = start(tmp_path, *words)
        when(process, lambda: lines_in(tmp_path / "answers/truth@0.4__mine.jsonl") >= 1)
        assert study(tmp_path, *words) == 2
        process.kill()
        process.communicate()
    assert "another process is answering" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["[]", '{"id": 3}', '{"id": "l1-10000-00000"}', "nonsense"])
def test_a_damaged_line_is_named(line: str, tmp_path: Path, capsys: Any) -> None:
    assert study(tmp_path, *WORLD, *RULES) == 0
    file = tmp_path / "answers" / "truth__rules.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:5], line, *lines[5:]]) + "\n")
    assert study(tmp_path, *WORLD, *RULES) == 2
    assert "truth__rules.jsonl, line 6: damaged" in capsys.readouterr().err


def test_without_a_description_answers_are_guesses(tmp_path: Path) -> None:
    """At 8, 8, 2 and 12 answers to colour, shape, first and when: 5/24 are right by chance."""
    assert (
        study(tmp_path, "--perceiver", "nothing", "--perceiver", "truth", "--limit", "600", "--reasoner", "rules") == 0
    )
    assert [cell["score"] for cell in summary(tmp_path)["cells"]] == [pytest.approx(5 / 24, abs=0.07), 1.0]


def test_levels_differ_in_their_questions(tmp_path: Path) -> None:
    for level in ("L1", "L3"):
        assert study(tmp_path / level, "--level", level, *WORLD, *RULES) == 0
    texts = [(tmp_path / level / "descriptions/truth.jsonl").read_text().splitlines() for level in ("L1", "L3")]
    events = [[json.loads(line)["text"].count("there is") for line in lines] for lines in texts]
    assert all(2 <= count <= 3 for count in events[0])
    assert all(3 <= count <= 4 for count in events[1])
    assert len(set(itertools.chain(*texts))) == 48
