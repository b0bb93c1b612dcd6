"""paired: two evaluations question by question, against numbers worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from appo.cli.main import main
from appo.evaluation.predictions import EvaluationFolder, Reply, batches
from appo.evaluation.tables import compare
from appo.reports.jsonl import RecordError
from appo.types import VideoQA, VideoSource
from tests.support.eval_runs import tagged

SETTINGS = {
    "model": "m", "dataset": "nextqa", "split": "val", "limit": None, "samples": 1, "temperature": 0.0, "seed": 0,
    "batch_size": 4, "prompt_version": 1,
}  # fmt: skip


def made_questions(count: int) -> list[VideoQA]:
    return [
        VideoQA(
            f"v_{n}",
            VideoSource(f"{n}.mp4"),
            "Why?",
            "A",
            "letter",
            ("x", "y"),
            metadata={"type": "CW" if n < 12 else "TN", "group": "g"},
        )
        for n in range(count)
    ]


def evaluation(path: Path, right: str, questions: list[VideoQA] | None = None, **change) -> Path:
    """A finished evaluation: ``+`` a right answer, ``-`` a wrong one, ``!`` a question without a reply."""
    questions = made_questions(len(right)) if questions is None else questions
    folder = EvaluationFolder.start(path, SETTINGS | change, questions)
    said = {"+": tagged("A"), "-": tagged("B")}
    replies = [
        Reply(question.id, error="x.mp4: is empty") if mark == "!" else Reply(question.id, (said[mark],), (5,))
        for question, mark in zip(questions, right, strict=False)
    ]
    for index, batch in batches(questions[: len(right)], 4):
        folder.append(index, replies[4 * index : 4 * index + len(batch)], 1.0)
    return path


def rows(sheet) -> dict[str, list[str]]:
    return {row[0]: list(row[1:]) for row in sheet.rows}


def test_the_difference_is_as_worked_out_by_hand(tmp_path):
    """Of 20 questions 8 are won and 2 lost: p = 2 * (1 + 10 + 45) / 2^10 = 0.109375."""
    first = evaluation(tmp_path / "a", "----------" + "++++++++++")
    second = evaluation(tmp_path / "b", "++++++++--" + "--++++++++", model="n")
    table = rows(compare(first, second))
    n, old, new, difference, interval, p = table["accuracy"]
    assert (n, old, new, difference, p) == ("20", "50.0", "80.0", "+30.0", "0.109")
    low, high = (float(end) for end in interval.split(" to "))
    assert low < 30 < high
    # Standard error of the mean of 8 times +1, 2 times -1, 10 times 0: sqrt((10 / 20 - 0.09) / 20) = 0.1432.
    assert low == pytest.approx(30 - 196 * 0.1432, abs=5)
    assert high == pytest.approx(30 + 196 * 0.1432, abs=5)
    assert table["CW"][:4] == ["12", "16.7", "66.7", "+50.0"]
    assert table["TN"][:4] == ["8", "100.0", "100.0", "+0.0"]
    assert table["TN"][5] == "1"
    assert any("8 questions won, 2 lost, 10 equal" in remark for remark in compare(first, second).remarks)
    back = rows(compare(second, first))["accuracy"]
    assert (back[3], back[5]) == ("-30.0", "0.109")


def test_a_question_without_a_reply_is_lost(tmp_path):
    sheet = compare(evaluation(tmp_path / "a", "++++"), evaluation(tmp_path / "b", "++!!"))
    assert rows(sheet)["accuracy"][:4] == ["4", "100.0", "50.0", "-50.0"]
    assert any("0 questions won, 2 lost, 2 equal" in remark for remark in sheet.remarks)


def test_questions_are_paired_by_id_wherever_videos_lie(tmp_path):
    questions = made_questions(4)
    moved = [replace(question, video=VideoSource(f"/else/{question.video.path}")) for question in reversed(questions)]
    sheet = compare(evaluation(tmp_path / "a", "+---"), evaluation(tmp_path / "b", "---+", moved))
    assert any("0 questions won, 0 lost, 4 equal" in remark for remark in sheet.remarks)


def test_what_cannot_be_compared_is_refused_and_named(tmp_path):
    first = evaluation(tmp_path / "a", "++++")
    other = [VideoQA(**{**vars(question), "answer": "B"}) for question in made_questions(4)]
    refused = {
        "2 questions are in .*a alone .'v_2', 'v_3'.": evaluation(tmp_path / "fewer", "++"),
        "1 questions are in .*more alone .'v_4'.": evaluation(tmp_path / "more", "+++++"),
        "question 'v_0' has another `answer`": evaluation(tmp_path / "gold", "++++", other),
        "is about nextqa, .* about jsonl": evaluation(tmp_path / "set", "++++", dataset="jsonl"),
        "2 of 4 questions are not answered yet": evaluation(tmp_path / "begun", "++", made_questions(4)),
        "no evaluation": tmp_path / "none",
    }
    for message, second in refused.items():
        with pytest.raises(RecordError, match=message):
            compare(first, second)


def test_the_command_prints_the_table_and_refuses_in_one_line(tmp_path, capsys):
    first, second = evaluation(tmp_path / "a", "+--"), evaluation(tmp_path / "b", "++-")
    assert main(["eval", "--compare", str(first), str(second)]) == 0
    screen = capsys.readouterr().out
    assert "| accuracy | 3 | 33.3 | 66.7 | +33.3 |" in screen
    assert f"first: m ({first})" in screen
    assert main(["eval", "--compare", str(first), str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (second / "predictions.jsonl").write_text(json.dumps({"id": "v_0"}) + "\n")
    assert main(["eval", "--compare", str(first), str(second)]) == 2
    assert "line 1: damaged" in capsys.readouterr().err
