"""data: annotation files of every format; what is wrong with one is named by file, line, field and fix."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from appo.data import files, load, read
from appo.data.files import rows_of_file
from appo.types import VideoQA, VideoSource
from tests.support.data_fixtures import (
    CASES,
    MV_ROW,
    NEXT_ROW,
    SEED_TRAIN,
    SEED_VAL,
    Case,
    gqa_row,
    jsonl,
    mvbench,
    nextgqa,
    nextqa,
    perception_question,
    perception_test,
    put_csv,
    put_json,
    put_lines,
    put_media,
    r1_row,
    seed_train,
)

# --- formats -----------------------------------------------------------------------------------------------------

VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3))
OBJECTS = st.lists(st.dictionaries(st.text(), VALUES, max_size=3), max_size=6)


@given(OBJECTS, st.sampled_from([None, 1]), st.integers(1, 40), st.booleans())
def test_json_lists_are_read_in_pieces_of_any_size(tmp_path_factory, rows, indent, chunk, ascii_only):
    """Oracle: json.loads of the whole file."""
    path = tmp_path_factory.getbasetemp() / "list.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only) + "\n", encoding="utf-8", errors="replace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "CHUNK", chunk)
        found = list(rows_of_file(str(path)))
    assert [row.fields for row in found] == json.loads(path.read_text(encoding="utf-8"))
    assert [row.place for row in found] == [f"{path}, index {index}" for index in range(len(rows))]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_a_byte_order_mark_and_empty_lines_are_no_rows(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    path.write_text('\ufeff\n[{"a": 1}]\n\n' if suffix == "json" else '\ufeff{"a": 1}\n\n', encoding="utf-8")
    assert [row.fields for row in rows_of_file(str(path))] == [{"a": 1}]


@pytest.mark.parametrize("case", [case for case in CASES if not case.label], ids=str)
def test_annotations_are_read_through_fsspec(tmp_path, case: Case):
    """``hf://datasets/...`` is one of the file systems of fsspec; here one in memory, for tests have no network."""
    annotations, videos = case.write(tmp_path)
    memory, root = fsspec.filesystem("memory"), f"/{tmp_path.name}"
    for path in tmp_path.rglob("*.*"):
        if path.suffix in (".json", ".jsonl", ".csv"):
            memory.pipe(f"{root}/{path.relative_to(tmp_path).as_posix()}", path.read_bytes())
    url = f"memory:/{root}/{annotations.relative_to(tmp_path).as_posix()}".removesuffix("/.")
    assert list(read(case.name, url, videos, case.split)) == list(read(case.name, annotations, videos, case.split))
    memory.rm(root, recursive=True)


def test_the_hub_is_a_file_system_that_is_known():
    assert "hf" in fsspec.available_protocols()
    assert fsspec.get_filesystem_class("hf").protocol == "hf"


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
def test_reading_takes_the_memory_of_a_few_rows(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 1 << 14)
    rows = [NEXT_ROW | {"qid": number, "question": "why " * 50} for number in range(5000)]
    path = tmp_path / f"val.{suffix}"
    {"jsonl": put_lines, "json": put_json, "csv": put_csv}[suffix](path, rows)
    assert path.stat().st_size > 1_000_000
    del rows
    tracemalloc.start()
    assert sum(1 for _ in read("nextqa", path, tmp_path)) == 5000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 400_000


def test_a_key_that_stands_twice_costs_its_row_only(tmp_path, monkeypatch):
    """Wherever a piece of the file ends: half a row has its keys twice as well."""
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1}, {"a": {"b": 1, "b": 2}, "c": "' + "x" * 20 + '"}, {"a": 3, "a": 3}, {"a": 4}]\n')
    for chunk in range(1, 60):
        monkeypatch.setattr(files, "CHUNK", chunk)
        rows = list(rows_of_file(str(path)))
        assert [row.fields for row in rows] == [{"a": 1}, {}, {}, {"a": 4}]
        faults = [f"{path}, index {index}: the key `{key}` stands twice" for index, key in ((1, "b"), (2, "a"))]
        assert [str(row.fault).split(";")[0] for row in rows[1:3]] == faults


def test_columns_without_a_name_are_no_column_twice(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,,\n1,,\n")
    assert [row.fields["a"] for row in rows_of_file(str(path))] == ["1"]


# --- what is wrong -----------------------------------------------------------------------------------------------


def lines(*rows: Any) -> Any:
    return lambda folder: (put_lines(folder / "rows.jsonl", rows), folder)


def listed(*rows: Any) -> Any:
    return lambda folder: (put_json(folder / "rows.json", rows), folder)


def text(name: str, content: str) -> Any:
    def write(folder: Path) -> tuple[Path, Path]:
        (folder / name).write_text(content, encoding="utf-8")
        return folder / name, folder

    return write


def without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in names}


def no_cuts(folder: Path) -> tuple[Path, Path]:
    annotations, videos = perception_test(folder)
    (annotations / "cut_frame_mapping_valid.json").unlink()
    return annotations, videos


def gqa_without_spans(folder: Path) -> tuple[Path, Path]:
    nextgqa(folder)
    return put_csv(folder / "test.csv", [gqa_row(), gqa_row(qid=99)]), folder


def gqa_without_clues(folder: Path) -> tuple[Path, Path]:
    annotations, videos = nextgqa(folder)
    put_json(folder / "gsub_test.json", {"4010069381": {"location": []}})
    return annotations, videos


def gqa_with_a_video_twice(folder: Path) -> tuple[Path, Path]:
    annotations, videos = nextgqa(folder)
    (folder / "gsub_test.json").write_text('{"v": 1, "v": 2, "w": 3}')
    return annotations, videos


def unmapped(folder: Path) -> tuple[Path, Path]:
    nextqa(folder)
    return put_csv(folder / "val.csv", [NEXT_ROW | {"video": "1"}]), folder


def bad_perception(folder: Path) -> tuple[Path, Path]:
    perception_test(folder)
    asked = [perception_question(0, 3)]
    put_json(folder / "mc_question_valid.json", {"video_42": {"metadata": {}, "mc_question": asked}})
    return folder, folder


OWN = {"video": "x.mp4", "question": "Which?", "options": ["red", "blue"], "answer": "blue"}
MC = {"options": ["A. one", "B. two"]}
WRONG = [
    ("jsonl", lines(OWN, {"a": 1}), None, r"rows.jsonl, line 2: unknown column `a`; put it into `metadata`"),
    ("jsonl", lines(without(OWN, "answer")), None, r"line 1: there is no field `answer`; add it \(the row has video"),
    ("jsonl", lines(OWN | {"question": ""}), None, r"line 1: `question` is empty"),
    ("jsonl", lines(without(OWN, "video")), None, r"line 1: there is neither `video` nor `image`"),
    ("jsonl", lines(OWN | {"answer": "green"}), None, r"line 1: `answer` is 'green', which names no"),
    ("jsonl", lines(OWN | {"options": "red"}), None, r"line 1: `options` is 'red'; write it as a list"),
    ("jsonl", lines(OWN | {"spans": [[3, 1]]}), None, r"line 1: `spans` has a span from 3.0 to 1.0"),
    ("jsonl", lines(OWN | {"spans": [3, 1]}), None, r"line 1: `spans` is \[3, 1\]; write it as a list of \[start, end"),
    ("jsonl", lines(OWN | {"kind": "lettre"}), None, r"line 1: `kind` is 'lettre': it must be one of"),
    ("jsonl", lines(OWN | {"id": "a"}, OWN | {"id": "a"}), None, r"line 2: id 'a' was there before \(.*line 1\)"),
    ("jsonl", lines(OWN, OWN), None, r"line 1: there is no .*x.mp4 \(1 of 1 video and image files are missing\)"),
    ("jsonl", lines(OWN | {"options": [f"o{n}" for n in range(27)], "answer": "o3"}), None, r"line 1: 27 options"),
    ("jsonl", lines(OWN | {"video": "."}), None, r"line 1: there is no "),
    ("jsonl", lines(OWN | {"question": "\ud800?"}), None, r"line 1: `question` holds half a character"),
    ("jsonl", lines(OWN | {"metadata": {"event_frames": "x"}}), None, r"line 1: `event_frames` in `metadata` is 'x'"),
    ("jsonl", lines(OWN | {"metadata": {"clip": "first"}}), None, r"line 1: `clip` is \['first'\]; write it as"),
    ("jsonl", lambda folder: ("foo://x/rows.jsonl", folder), None, r"foo://x/rows.jsonl: cannot be opened"),
    ("jsonl", lines([1]), None, r"line 1: holds \[1\], which is no object"),
    ("jsonl", lines(), None, r"rows.jsonl: holds no question"),
    ("jsonl", text("rows.jsonl", '{"video": \n'), None, r"line 1: no JSON"),
    ("jsonl", text("rows.json", '{"video": 1}'), None, r"index 0: the file does not start with `\[`"),
    ("jsonl", text("rows.json", '[{"video": 1, "que'), None, r"index 0: no JSON"),
    ("jsonl", text("rows.json", "[{}"), None, r"index 0|list does not end"),
    ("jsonl", text("rows.json", "[3]"), None, r"index 0: holds 3, which is no object"),
    ("jsonl", text("rows.json", json.dumps([]) + "x"), None, r"there is 'x' behind the list"),
    ("jsonl", text("rows.txt", ""), None, r"rows.txt: name annotation files .json, .jsonl or .csv"),
    ("jsonl", text("rows.jsonl", '{"answer": "a", "answer": "b"}'), None, r"line 1: the key `answer` stands twice"),
    ("jsonl", text("rows.jsonl", '{"metadata": {"clip": 1, "clip": 2}}'), None, r"line 1: the key `clip` stands twice"),
    ("jsonl", text("rows.json", '[{"answer": "a", "answer": "b"}]'), None, r"index 0: the key `answer` stands twice"),
    ("nextqa", text("val.csv", "video,qid,qid\n1,2,3\n"), None, r"val.csv, line 1: the column `qid` stands twice; l"),
    ("nextgqa", gqa_with_a_video_twice, None, r'gsub_test.json: the key `v` stands twice in \{"v": 2, "w": 3\}; leave'),
    ("seed-bench-r1", lines(SEED_TRAIN | {"negative_answers": ["a", "a", "b"]}), None, r"has 2 different wrong"),
    ("seed-bench-r1", lines(SEED_VAL | {"golden_choice_idx": "E"}), None, r"`golden_choice_idx` is 'E'; write A, B"),
    ("seed-bench-r1", lines(SEED_VAL), "train", r"line 1: this is a validation row, but split is 'train'"),
    ("seed-bench-r1", lines(SEED_TRAIN), "L1", r"line 1: this is a training row, but split is 'L1'"),
    ("seed-bench-r1", lines(without(SEED_TRAIN, "task_progress_metadata")), None, r"`task_progress_metadata` is None"),
    ("video-r1", listed(r1_row(1, "essay", "x")), None, r"index 0: `problem_type` is 'essay'; write one of multiple"),
    ("video-r1", listed(r1_row(1, "OCR", "x") | {"solution": "x"}), None, r"index 0: `solution` is 'x'; write"),
    ("video-r1", listed(r1_row(1, "OCR", "x", data_type="audio")), None, r"`data_type` is 'audio'"),
    ("video-r1", listed(r1_row(1, "multiple choice", "C", **MC)), None, r"index 0: `answer` is 'C', which is not"),
    ("video-r1", listed(r1_row(1, "numerical", "many")), None, r"index 0: `answer` is 'many'"),
    ("nextqa", text("val.csv", "video,qid,answer\n1,2\n"), None, r"val.csv, line 2: the row has not as many columns"),
    ("nextqa", unmapped, "val", r"video '1' is not in .*map_vid_vidorID.json"),
    ("nextqa", lambda folder: (put_csv(folder / "t.csv", [NEXT_ROW | {"answer": 5}]), folder), None, r"`answer` is '5"),
    ("nextqa", lambda folder: (folder, folder), None, r"is a folder: name the split \(train, val, test\)"),
    ("nextqa", lambda folder: (folder, folder), "val", r"val.csv: there is no such file"),
    ("nextqa", lambda folder: (folder, folder), "L1", r"unknown split 'L1'; nextqa has the splits train, val, test"),
    ("nextgqa", gqa_without_spans, None, r"test.csv, line 3: video 4010069381, qid 99 is not in .*gsub_test.json"),
    ("nextgqa", gqa_without_clues, None, r"test.csv, line 2: video 4010069381, qid 6 is not in .*gsub_test.json"),
    ("perception-test", no_cuts, "valid", r"cut_frame_mapping_valid.json: there is no such file"),
    ("perception-test", bad_perception, "valid", r"video video_42, mc_question 0: `answer_id` is 3; give the index"),
    ("vsi-bench", lines({"id": 1, "ground_truth": "far", "dataset": "s"}), None, r"`ground_truth` holds 'far'"),
    ("mvbench", lambda folder: mvbench(folder, answer="a dog"), None, r"index 1: `answer` is 'a dog', none of the opt"),
    ("mvbench", lambda folder: mvbench(folder, start=1), None, r"index 1: there is no field `end`"),
    ("mvbench", listed(MV_ROW), None, r"'rows' is no task of MVBench"),
    ("spotlight", lines({"id": "x"}), None, r"line 1: there is no field `metadata`"),
    ("spotlight", lambda folder: (folder, folder), "L1", r"unknown split 'L1'; spotlight has no splits"),
    ("youcook", lines(), None, r"unknown dataset 'youcook'; there are seed-bench-r1, video-r1"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "write", "split", "message"), WRONG, ids=[f"{row[0]}: {row[3][:40]}" for row in WRONG]
)
def test_what_is_wrong_is_named_with_its_place_and_fix(tmp_path, name, write, split, message):
    annotations, videos = write(tmp_path)
    with pytest.raises((ValueError, OSError), match=message) as error:
        load(name, annotations, videos, split)
    assert "\n" not in str(error.value)


def test_videos_behind_a_url_are_refused_at_once(tmp_path):
    annotations, _ = jsonl(tmp_path)
    with pytest.raises(ValueError, match="no local folder: download them"):
        read("jsonl", annotations, "hf://datasets/me/videos")
    with pytest.raises(ValueError, match="no local folder"):
        read("jsonl", "hf://datasets/me/mine/rows.jsonl")


def test_all_missing_files_are_counted(tmp_path):
    annotations, videos = jsonl(tmp_path)
    (tmp_path / "a/x.mp4").unlink()
    (tmp_path / "y.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"line 1: there is no .*x.mp4 \(2 of 2 video and image files"):
        load("jsonl", annotations, videos)
    assert len(list(read("jsonl", annotations, videos))) == 3, "read does not look for files"


def test_load_never_opens_a_video(tmp_path):
    annotations, videos = seed_train(tmp_path)
    video = put_media(videos, "videos/EpicKitchens/P01_13_17.mp4") / "videos/EpicKitchens/P01_13_17.mp4"
    video.write_bytes(b"")
    assert len(load("seed-bench-r1", annotations, videos)) == 1


def test_absolute_paths_of_ones_own_questions_are_kept(tmp_path):
    (question,) = read("jsonl", put_lines(tmp_path / "x.jsonl", [OWN | {"video": "/data/x.mp4"}]), tmp_path)
    assert question == VideoQA("0", VideoSource("/data/x.mp4"), "Which?", "B", "letter", ("red", "blue"))
