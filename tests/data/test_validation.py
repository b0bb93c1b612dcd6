"""data check: each bad row and file gives one line of its category that names row and file, and loses nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from appo.data import read_each
from appo.data.row import LONGEST
from appo.data.validation import CATEGORIES, Report, check, tolerance
from appo.types import VideoQA
from tests.data.check_cases import CLEAN, FILES, ROWS, Case, good_rows, put_good, run_here
from tests.support.data_fixtures import (
    CASES,
    CHOICES,
    NEXT_ROW,
    nextgqa_list,
    perception_test,
    put_csv,
    put_json,
    put_lines,
)


def write(folder: Path, cases: list[Case]) -> Path:
    """Annotations in which a good row stands before, between and behind the cases: case i is on line 2 i + 2."""
    put_good(folder)
    good = good_rows()
    lines = [next(good)]
    for case in cases:
        lines += [case.write(folder), next(good)]
    path = folder / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines) + b"\n")  # with a byte order mark
    return path


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Report:
    folder = tmp_path_factory.mktemp("check")
    return check("jsonl", str(write(folder / "data", [*ROWS, *FILES])), workers=2)


def test_there_are_more_than_thirty_bad_cases():
    bad = [case for case in (*ROWS, *FILES) if case.category != CLEAN]
    assert len(bad) > 60
    assert {case.category for case in bad} == set(CATEGORIES) - {"answer out of range"}


@pytest.mark.parametrize(("number", "case"), enumerate([*ROWS, *FILES]), ids=[case.name for case in (*ROWS, *FILES)])
def test_each_case_gives_its_one_line(report: Report, number: int, case: Case):
    place = f"{report.annotations}, line {2 * number + 2}"
    about = [fault for fault in report.faults if place in fault.rows]
    if case.category == CLEAN:
        assert about == []
        return
    (fault,) = about
    assert fault.category == case.category
    assert fault.message.startswith(f"{place}: ")
    assert re.search(case.says, fault.message)
    assert "\n" not in fault.message
    assert len(fault.message) <= LONGEST
    assert "; " in fault.message, "what to do is said"


def test_nothing_else_is_lost(report: Report):
    cases = [*ROWS, *FILES]
    clean = sum(case.category == CLEAN for case in cases)
    assert report.rows == 2 * len(cases) + 1
    assert report.good == len(cases) + 1 + clean
    assert sum(report.counts.values()) == len(report.faults) == len(cases) - clean


# --- without processes -------------------------------------------------------------------------------------------


@pytest.fixture
def here(monkeypatch) -> list[Any]:
    return run_here(monkeypatch)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_healthy_dataset_has_no_faults(tmp_path, case, here):
    annotations, videos = case.write(tmp_path)
    found = check(case.name, str(annotations), str(videos), case.split)
    # The fixtures' annotations say that the videos last 12 s, as those of the datasets did.
    assert {fault.category for fault in found.faults} <= {"mismatched duration", "span outside"}
    assert found.rows == len(case.golds)


def test_a_file_is_decoded_once_however_many_ask_about_it(tmp_path, here):
    folder = tmp_path / "data"
    put_good(folder)
    good = good_rows()
    (folder / "rows.jsonl").write_bytes(b"\n".join(next(good) for _ in range(7)))
    assert check("jsonl", str(folder / "rows.jsonl")).good == 7
    assert len(here) == 1
    (folder / "good.mp4").write_bytes(b"no video")
    found = check("jsonl", str(folder / "rows.jsonl"))
    (fault,) = found.faults
    assert "line 1 (and 6 more): " in fault.message
    assert len(fault.rows) == 7
    assert found.good == 0


def test_quick_sees_what_is_cut_off_but_not_what_is_damaged_inside(tmp_path, here):
    named = {case.name: case for case in FILES}
    path = write(tmp_path / "data", [named["cut off"], named["damaged"]])
    assert [fault.path[-7:] for fault in check("jsonl", str(path), quick=True).faults] == ["cut.mp4"]
    assert len(check("jsonl", str(path)).faults) == 2


def test_answers_out_of_range(tmp_path, here):
    rows = [NEXT_ROW, NEXT_ROW | {"qid": 7, "answer": 5}, NEXT_ROW | {"qid": 8, "answer": -1}]
    found = check("nextqa", str(put_csv(tmp_path / "val.csv", rows)))
    assert found.counts["answer out of range"] == 2
    assert [fault.rows for fault in found.faults[:2]] == [(f"{tmp_path}/val.csv, line {n}",) for n in (3, 4)]


def test_durations_and_cuts_of_the_datasets_own_fields(tmp_path, here):
    annotations, videos = perception_test(tmp_path / "p", cut=75)
    found = check("perception-test", str(annotations), str(videos), "valid")
    (fault,) = found.faults
    assert "the video is said to last 12.0333 s" in fault.message
    assert len(fault.rows) == 2
    annotations, videos = nextgqa_list(tmp_path / "n")
    row = json.loads(annotations.read_text())[0] | {"duration": 3, "time_clues": [[2.5, 3.4], [5, 6]]}
    put_json(annotations, [row])
    (fault,) = check("nextgqa", str(annotations), str(videos)).faults
    assert "the span [5, 6] s is not within the 3.00 s" in fault.message


def test_the_tolerance_is_a_second_or_a_twentieth():
    assert [tolerance(seconds) for seconds in (3, 20, 100)] == [1.0, 1.0, 5.0]


# --- files that are broken as a whole, or in a row ---------------------------------------------------------------


def sorts(name: str, path: Path, split: str | None = None) -> list[bool]:
    """Of each row that is walked over: whether it is a question."""
    return [isinstance(question, VideoQA) for _, question in read_each(name, path, path.parent, split)]


def test_a_json_list_says_that_its_rest_cannot_be_read(tmp_path):
    row = json.dumps({"video": "x.mp4", "question": "Why?", "answer": "so"})
    path = tmp_path / "rows.json"
    path.write_text(f"[{row}, 3, {row}, {{broken}}, {row}]")
    assert sorts("jsonl", path) == [True, False, True, False]
    *_, (_, last) = read_each("jsonl", path)
    assert re.search(r"index 3: no JSON \(.*\); nothing behind it can be read; write one list", str(last))


def test_bytes_that_are_not_utf8_spoil_one_row_of_each_format(tmp_path):
    bad = "caf\xe9".encode("latin-1")
    row = b'{"video": "x.mp4", "question": "Why %s?", "answer": "so"}'
    listed = tmp_path / "rows.json"
    listed.write_bytes(b"[" + b", ".join([row % b"1", row % bad, row % "é".encode()]) + b"]")
    assert sorts("jsonl", listed) == [True, False, True]
    table = put_csv(tmp_path / "val.csv", [NEXT_ROW, NEXT_ROW | {"qid": 7, "a0": "MARK"}, NEXT_ROW | {"qid": 8}])
    table.write_bytes(table.read_bytes().replace(b"MARK", bad))
    assert sorts("nextqa", table) == [True, False, True]


def test_a_broken_line_of_a_csv_loses_that_line_only(tmp_path):
    path = put_csv(tmp_path / "val.csv", [NEXT_ROW | {"qid": number} for number in range(5)])
    lines = path.read_text().split("\n")
    lines[2] = lines[2].replace('"to sleep, quietly"', '"to sleep" quietly')
    lines[4] = lines[4].replace("to eat", "to, eat")
    path.write_text("\n".join(lines))
    assert sorts("nextqa", path) == [True, False, True, False, True]
    faults = [str(question) for _, question in read_each("nextqa", path) if not isinstance(question, VideoQA)]
    assert ["val.csv, line 3: no csv" in faults[0], "val.csv, line 5: the row has not as many" in faults[1]] == [
        True,
        True,
    ]


def test_a_quote_that_does_not_end_names_all_lines_it_takes(tmp_path):
    path = put_csv(tmp_path / "val.csv", [NEXT_ROW | {"qid": number, "a1": "x"} for number in range(4)])
    path.write_text(path.read_text().replace("to eat", '"to eat', 2).replace('"to eat', "to eat", 1))
    assert sorts("nextqa", path) == [True, False]
    *_, (_, last) = read_each("nextqa", path)
    assert "val.csv, lines 3 to 5: no csv" in str(last)


def test_a_task_of_mvbench_that_is_missing_leaves_the_others(tmp_path):
    from appo.data.mvbench import FOLDERS

    row = {"video": "x.mp4", "question": "What?", "candidates": ["no", "yes"], "answer": "yes"}
    for task in [*FOLDERS][1:]:
        put_json(tmp_path / f"{task}.json", [row])
    assert sum(isinstance(question, VideoQA) for _, question in read_each("mvbench", tmp_path)) == 19
    (_, first), *_ = read_each("mvbench", tmp_path)
    assert re.fullmatch(r".*action_sequence.json: there is no such file; check .*", str(first))


def test_a_broken_video_of_perception_test_leaves_the_others(tmp_path):
    annotations, _ = perception_test(tmp_path)
    path = annotations / "mc_question_valid.json"
    whole = json.loads(path.read_text())
    asked = whole["video_42"]["mc_question"]
    put_json(path, {"a": 1, "b": {"mc_question": "x"}, **whole, "d": {"mc_question": [3, asked[0]]}})
    assert sorts("perception-test", path, "valid") == [False, False, True, True, False, True]


@pytest.mark.parametrize("index", range(26, 28))
def test_more_options_than_letters_are_no_crash(tmp_path, index):
    candidates = [f"o{number}" for number in range(28)]
    row = {"video": "x.mp4", "question": "What?", "candidates": candidates, "answer": f"o{index}"}
    assert sorts("mvbench", put_json(tmp_path / "moving_count.json", [row])) == [False]
    own = {"qid": "6", "question": "why", "video_path": "x.mp4", "options": candidates, "answer": str(index),
           "qtype": "CW", "time_clues": [[0, 1]]}  # fmt: skip
    assert sorts("nextgqa", put_json(tmp_path / "list.json", [own | {"options": list(CHOICES.values())}, own])) == [
        False,
        False,
    ]


def test_numbers_in_pieces_of_a_json_list_are_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("appo.data.files.CHUNK", 1)
    path = tmp_path / "rows.json"
    path.write_text('[1234, "a text", {"a": 5}]')
    messages = [str(question) for _, question in read_each("jsonl", path)]
    assert "holds 1234, which" in messages[0]
    assert 'holds "a text", which' in messages[1]
    assert len(messages) == 3


def test_load_raises_the_first_fault(tmp_path):
    from appo.data import load

    put_good(tmp_path / "d")
    good = next(good_rows()).decode()
    path = put_lines(tmp_path / "d" / "rows.jsonl", [json.loads(good)])
    path.write_text(good + "\nnonsense\n[1]\n")
    with pytest.raises(ValueError, match="line 2: no JSON"):
        load("jsonl", path)
