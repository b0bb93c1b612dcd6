"""`appo eval` through the command line: official tables, exact scores, kills, resumes, refusals."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

from appo.evaluation import tables
from appo.evaluation.predictions import EvaluationFolder
from tests.support.data_fixtures import CASES, Case, clip, nextgqa
from tests.support.eval_runs import evaluate, lettered_questions, save_reader, scores, script, tagged

FILES = {"eval.json", "questions.jsonl", "predictions.jsonl", "timing.jsonl", "scores.json", "scores.md"}


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> str:
    return save_reader(tmp_path_factory.mktemp("reader"))


# --- every dataset -----------------------------------------------------------------------------------------------

HEADLINES = {"video-r1": "score", "vsi-bench": "score", "jsonl": "score", "nextgqa": "mIoU"}
PARTS = {
    "seed-bench-r1": {"L2", "train"}, "video-r1": {"OCR", "regression", "numerical"}, "nextqa": {"C", "T", "D", "CW"},
    "nextgqa": {"IoP@0.5", "Acc@GQA"}, "perception-test": {"area/memory", "reasoning/descriptive"},
    "vsi-bench": {"object_size_estimation", "object_rel_direction"}, "mvbench": {"moving_count"},
    "jsonl": {"kind/letter", "kind/number"},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_dataset_gets_its_official_table(tmp_path, case: Case, reader, capsys):
    annotations, videos = case.write(tmp_path / "data")
    where = ["--dataset", case.name, "--annotations", str(annotations), "--videos", str(videos)]
    where += ["--split", case.split] if case.split else []
    output = tmp_path / "e"
    code = evaluate(output, "--model", reader, *where, "--max-completion-length", "6", "--batch-size", "2")
    screen, errors = capsys.readouterr()
    assert (code, errors) == (0, "")
    assert {file.name for file in output.iterdir()} == FILES
    card = scores(output)
    headline = next(iter(card["strict"].values()))
    assert headline["name"] == HEADLINES.get(case.name, "accuracy")
    assert (headline["value"], headline["questions"]) == (0.0, len(case.golds)), "an untrained model keeps no format"
    assert (card["unparsable"], card["missing"], card["tokens"]) == (1.0, 0, pytest.approx(6, abs=5.5))
    assert card["strict"].keys() == card["lenient"].keys()
    shown = {row.split("|")[1].strip(): row for row in screen.splitlines() if row.startswith("|")}
    assert shown.keys() - {"figure", "---"} == card["strict"].keys()
    assert PARTS[case.name] & shown.keys()
    assert re.search(r"100\.0 % of responses unparsable, [\d.]+ tokens a response, [\d.]+ s a question", screen)
    assert re.search(r"prompt version \d+, parser version \d+", screen)
    assert (output / "scores.md").read_text() in screen, "the table can be pasted as it is"


def test_without_annotations_clips_of_every_level_are_generated(tmp_path, capsys):
    arguments = ["--model", "spotlight", "--limit", "6", "--max-completion-length", "90"]
    assert evaluate(tmp_path / "e", *arguments) == 0
    assert list(scores(tmp_path / "e")["strict"]) == ["accuracy", "L1", "L2", "L3"]
    settings = EvaluationFolder.open(tmp_path / "e").settings
    assert (settings["instruction"], settings["max_frames"], settings["temperature"]) == ("", 24, 0.0)
    (tmp_path / "e" / "clips" / "L1" / "annotations.jsonl").unlink()  # as a kill leaves it while clips are made
    before = (tmp_path / "e" / "predictions.jsonl").read_bytes()
    assert evaluate(tmp_path / "e", *arguments) == 0
    assert (tmp_path / "e" / "predictions.jsonl").read_bytes() == before


# --- scores known exactly ----------------------------------------------------------------------------------------


def test_a_scripted_model_gets_exactly_its_score(tmp_path, reader, monkeypatch, capsys):
    """3 of 8 right in the format, one more right without it, one in the format and wrong, the rest nothing."""
    said = [
        tagged("B"),
        tagged("(b)"),
        tagged("blue"),
        "The answer is B.",
        tagged("A"),
        "",
        "no idea",
        tagged("A or B"),
    ]
    script(monkeypatch, said)
    output = tmp_path / "e"
    assert evaluate(output, "--model", reader, *lettered_questions(tmp_path / "d", 8), "--batch-size", "3") == 0
    card = scores(output)
    assert card["strict"]["score"] == {
        "name": "score", "questions": 8, "value": 0.375, "interval": "wilson", "answered_only": None,
        "low": pytest.approx(0.1368, abs=1e-4), "high": pytest.approx(0.6943, abs=1e-4),
    }  # fmt: skip
    assert card["lenient"]["score"]["value"] == 0.5
    assert (card["unparsable"], card["tokens"]) == (3 / 8, sum(map(len, said)) / 8)
    assert "| score | 8 | 37.5 | 13.7-69.4 | 50.0 |" in capsys.readouterr().out
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert lines == [{"id": str(n), "texts": [text], "tokens": [len(text)]} for n, text in enumerate(said)]


def test_grounding_is_scored_as_worked_out_by_hand(tmp_path, reader, monkeypatch):
    """True spans of the first: [0, 2.4] and [5, 7.5]; of the second: [1, 2]."""
    annotations, videos = nextgqa(tmp_path / "d")
    script(monkeypatch, [f"{tagged('B')}<time>[5, 7.5]</time>", f"{tagged('E')}<time>[1, 5]</time>"])
    where = ["--dataset", "nextgqa", "--annotations", str(annotations), "--videos", str(videos)]
    assert evaluate(tmp_path / "e", "--model", reader, *where) == 0
    found = {name: score["value"] for name, score in scores(tmp_path / "e")["strict"].items()}
    assert found == {
        "mIoU": 0.625, "mIoP": 0.625, "IoU@0.3": 0.5, "IoU@0.5": 0.5, "IoP@0.3": 0.5, "IoP@0.5": 0.5, "Acc@QA": 1.0,
        "Acc@GQA": 0.5,
    }  # fmt: skip


def test_samples_are_averaged_and_passed(tmp_path, reader, monkeypatch):
    B, A = tagged("B"), tagged("A")
    script(monkeypatch, [[B, B, B, B], [A, A, A, B], [A, A, A, A], [B, B, A, A]])
    where = lettered_questions(tmp_path / "d", 4)
    assert evaluate(tmp_path / "e", "--model", reader, *where, "--num-generations", "4", "--temperature", "0.7") == 0
    found = {name: score["value"] for name, score in scores(tmp_path / "e")["strict"].items()}
    assert found["score"] == found["pass@1"] == (4 + 1 + 0 + 2) / 16
    assert found["pass@2"] == pytest.approx((1 + 1 / 2 + 0 + 5 / 6) / 4)
    assert found["pass@4"] == 0.75
    assert found["majority"] == 0.5, "two of a kind: the first seen"


def test_a_limit_takes_questions_from_all_over(tmp_path, reader, monkeypatch):
    script(monkeypatch, [tagged("B")] * 3)
    assert evaluate(tmp_path / "e", "--model", reader, *lettered_questions(tmp_path / "d", 10), "--limit", "3") == 0
    assert [question.id for question in EvaluationFolder.open(tmp_path / "e").questions()] == ["0", "3", "6"]


# --- what is missing ---------------------------------------------------------------------------------------------


def test_a_corrupt_video_counts_as_wrong_is_named_and_can_be_retried(tmp_path, reader, monkeypatch, capsys):
    arguments = ["--model", reader, *lettered_questions(tmp_path / "d", 5), "--batch-size", "2"]
    broken = tmp_path / "d" / "2.mp4"
    whole = broken.read_bytes()
    broken.write_bytes(b"no video" * 99)
    script(monkeypatch, [tagged("B")] * 4)
    assert evaluate(tmp_path / "e", *arguments) == 0
    screen, errors = capsys.readouterr()
    assert "| score | 5 | 80.0 | 37.6-96.4 | 80.0 | 100.0 |" in screen
    assert "1 of 5 questions have no prediction and count as wrong" in screen
    assert re.search(r"question '2' was not asked: .*2\.mp4: cannot be decoded", errors)
    assert "run the same command with --retry" in errors
    assert scores(tmp_path / "e")["missing"] == 1
    broken.write_bytes(whole)
    script(monkeypatch, [])
    assert evaluate(tmp_path / "e", *arguments) == 0
    assert scores(tmp_path / "e")["missing"] == 1, "it is not asked again unless told"
    script(monkeypatch, [tagged("A"), tagged("B")])
    assert evaluate(tmp_path / "e", *arguments, "--retry") == 0
    card = scores(tmp_path / "e")
    assert (card["missing"], card["strict"]["score"]["value"]) == (0, 0.8)
    texts = [json.loads(line)["texts"] for line in (tmp_path / "e" / "predictions.jsonl").read_text().splitlines()]
    assert [text == [tagged("B")] for text in texts] == [True, True, False, True, True]


def test_without_any_video_no_question_is_answered(tmp_path, reader, capsys):
    arguments = lettered_questions(tmp_path / "d", 3)
    assert evaluate(tmp_path / "e", "--model", reader, *arguments, "--videos", str(tmp_path / "elsewhere")) == 2
    assert re.search(
        r"none of the videos is there, such as .*elsewhere/0\.mp4; check --videos", capsys.readouterr().err
    )
    assert not (tmp_path / "e").exists()


def test_cached_frames_are_not_decoded_again_and_change_nothing(tmp_path, reader, monkeypatch):
    arguments = ["--model", reader, *lettered_questions(tmp_path / "d", 3), "--max-completion-length", "5"]
    cached = [*arguments, "--frame-cache", str(tmp_path / "frames")]
    assert evaluate(tmp_path / "plain", *arguments) == evaluate(tmp_path / "first", *cached) == 0
    monkeypatch.setattr("appo.video.frame_cache.read_video", None)
    assert evaluate(tmp_path / "second", *cached) == 0
    written = {name: (tmp_path / name / "predictions.jsonl").read_bytes() for name in ("plain", "first", "second")}
    assert len(set(written.values())) == 1


# --- going on ----------------------------------------------------------------------------------------------------


def test_a_finished_evaluation_is_scored_again_without_a_model(tmp_path, reader, monkeypatch, capsys):
    arguments = ["--model", reader, *lettered_questions(tmp_path / "d", 2)]
    script(monkeypatch, [tagged("B"), "The answer is B."])
    assert evaluate(tmp_path / "e", *arguments) == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "e").iterdir()}
    monkeypatch.setattr(importlib.import_module("appo.evaluation.run"), "load_model", None)
    assert evaluate(tmp_path / "e", *arguments) == 0
    assert {file.name: file.read_bytes() for file in (tmp_path / "e").iterdir()} == before
    monkeypatch.setattr(tables, "PARSER_VERSION", 99)
    monkeypatch.setattr(tables, "official_scores", lambda *args, **kw: [])
    assert evaluate(tmp_path / "e", *arguments) == 0
    card = scores(tmp_path / "e")
    assert (card["parser_version"], card["strict"]) == (99, {})
    capsys.readouterr()
    assert evaluate(tmp_path / "e", *arguments, "--batch-size", "1") == 2
    assert "batch_size is 16 there, 1 here" in capsys.readouterr().err
    (Path(reader) / "extra.json").write_text("{}")
    assert evaluate(tmp_path / "e", *arguments) == 2
    assert 'model_is is "files ' in capsys.readouterr().err
    (Path(reader) / "extra.json").unlink()


# --- refusals ----------------------------------------------------------------------------------------------------

ENDS = [
    ([], "give a model: appo eval --model spotlight"),
    (["--model", "spotlight", "--colour"], "unknown argument --colour"),
    (["--model", "/no/such/model"], "/no/such/model"),
    (["--model", "spotlight", "--dataset", "nextqq"], "unknown dataset 'nextqq'; there are seed-bench-r1, "),
    (["--model", "spotlight", "--dataset", "nextqa"], "dataset nextqa is read from files: give --annotations"),
    (["--model", "spotlight", "--split", "L1"], "--videos and --split are about a dataset's files"),
    (["--model", "spotlight", "--annotations", "/no/such.jsonl"], "/no/such.jsonl"),
    (["--model", "spotlight", "--temperature", "1"], "--temperature is of samples"),
    (
        ["--model", "spotlight", "--num-generations", "2", "--temperature", "0"],
        "--temperature is 0.0: it must be above 0",
    ),
    (["--model", "spotlight", "--video-fps", "0"], "fps must be a positive number"),
    (["--compare", "a", "b", "--limit", "3"], "leave out --output"),
]


@pytest.mark.parametrize(("arguments", "message"), ENDS, ids=[row[1] for row in ENDS])
def test_users_mistakes_end_with_code_2_and_one_line(tmp_path, arguments, message, capsys):
    assert evaluate(tmp_path / "e", *arguments) == 2
    screen, errors = capsys.readouterr()
    assert screen == ""
    assert errors.startswith("appo: ")
    assert errors.count("\n") == 1
    assert message in errors
    assert not (tmp_path / "e").exists()


def test_twice_the_same_id_and_an_answer_that_cannot_be_scored_are_named(tmp_path, capsys):
    rows = [{"video": str(clip()), "question": "Which?", "answer": "1", "kind": "number", "id": "x"}]
    file = tmp_path / "mine.jsonl"
    for more, message in (
        ({}, "line 2: id 'x' was there before"),
        ({"id": "y", "answer": "many"}, "'many', which is not a number"),
    ):
        file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0] | more]))
        assert evaluate(tmp_path / "e", "--model", "spotlight", "--dataset", "jsonl", "--annotations", str(file)) == 2
        assert message in capsys.readouterr().err
