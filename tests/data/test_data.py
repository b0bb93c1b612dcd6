"""data: every dataset's own schema becomes questions that train, score and reach the model as they should."""

from __future__ import annotations

import gc
import json
import os
import pickle
import string
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import concatenate_datasets
from hypothesis import given
from hypothesis import strategies as st
from recipes.tiny_policy.build import build_policy
from transformers import Qwen2_5_VLProcessor

from appo.data import DATASETS, load, read
from appo.data.loading import LISTED_AFTER, MediaFiles
from appo.data.row import Row
from appo.data.seed_bench_r1 import draw_options
from appo.data.table import ROWS_AT_ONCE, rows_of
from appo.rewards.functions import accuracy_reward, score_answer
from appo.rewards.templates import INSTRUCTIONS, lettered
from appo.rollout.generation import VideoCache, encode_prompt, video_sources
from appo.types import VideoQA, VideoSource
from appo.video.reader import FrameSampling
from appo.world import generate
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.data_fixtures import CASES, SEED_TRAIN, Case, perception_test, put_json, put_media

COLUMNS = [
    "prompt",
    "answer",
    "kind",
    "options",
    "response_format",
    "id",
    "question",
    "spans",
    "event_frames",
    "metadata",
]
WRONG = {"letter": "E", "word": "no such word", "number": "999", "ocr": "zzz", "text": "zzz", "regression": "9999",
         "mra": "99999"}  # fmt: skip


def respond(answer: str, response_format: str = "answer") -> str:
    time = "<time>[1, 2]</time>" if response_format == "grounded" else ""
    return f"<think>I saw it.</think><answer>{answer}</answer>{time}"


def path_in(videos: Path, name: str) -> str:
    return str(videos / name) if name else ""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_become_the_questions_they_are(tmp_path, case: Case):
    annotations, videos = case.write(tmp_path)
    questions = list(read(case.name, annotations, videos, case.split))
    assert [question.id for question in questions] == [gold.id for gold in case.golds]
    for question, gold in zip(questions, case.golds, strict=True):
        assert (question.answer, question.kind, question.spans) == (gold.answer, gold.kind, gold.spans)
        assert (question.video.path if question.video else "") == path_in(videos, gold.video)
        assert question.image == path_in(videos, gold.image)
        assert len(question.options) == gold.options
        assert question.metadata | gold.metadata == question.metadata
        assert question.question


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gold_answers_earn_full_reward_and_wrong_ones_none(tmp_path, case: Case):
    table = load(case.name, *case.write(tmp_path), case.split)
    assert table.column_names == COLUMNS
    columns = {name: table[name][:] for name in COLUMNS if name != "prompt"}
    (asked,) = set(columns["response_format"])
    assert accuracy_reward([respond(answer, asked) for answer in columns["answer"]], **columns) == [1.0] * len(table)
    assert accuracy_reward([respond(WRONG[kind], asked) for kind in columns["kind"]], **columns) == [
        float(answer == "E") for answer in columns["answer"]
    ]
    for row in table:
        wrong = [letter for letter in string.ascii_uppercase[: len(row["options"])] if letter != row["answer"]]
        assert [score_answer(respond(letter), row["answer"], row["kind"], row["options"]) for letter in wrong] == [
            0.0
        ] * len(wrong)
        assert score_answer(row["answer"], row["answer"], row["kind"], row["options"]) == 0.0, "no answer tag"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_options_are_lettered_once(tmp_path, case: Case):
    for row in load(case.name, *case.write(tmp_path), case.split):
        text = row["prompt"][0]["content"][-1]["text"]
        lines = text.split("\n")[-1 - len(row["options"]) : -1] if row["options"] else []
        assert [line[:3] for line in lines] == [f"{letter}. " for letter in string.ascii_uppercase[: len(lines)]]
        assert not any(line[3:5] in ("A.", "B.", "C.", "D.", "E.") for line in lines)
        assert text.endswith(INSTRUCTIONS[row["response_format"]])


@pytest.fixture(scope="module")
def processor() -> Any:
    """The tiny policy's processor with a tokenizer that loses nothing."""
    words = build_policy(0)[1]
    images, videos = words.image_processor, words.video_processor
    return Qwen2_5_VLProcessor(images, byte_tokenizer(), videos, chat_template=words.chat_template)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_prompt_reaches_the_model_as_it_was_written(tmp_path, case: Case, processor):
    """Through Arrow, the chat template and the processor, with the files decoded: text and pictures are all there."""
    annotations, videos = case.write(tmp_path)
    questions = list(read(case.name, annotations, videos, case.split))
    cache = VideoCache(processor.video_processor, FrameSampling(2.0, 16, 4))
    for question, row in zip(questions, load(case.name, annotations, videos, case.split), strict=True):
        videos = [cache.read(source) for source in video_sources(row["prompt"])]
        inputs = encode_prompt(processor, row["prompt"], videos)
        text = processor.tokenizer.decode(inputs.ids_1P[0], skip_special_tokens=True)
        asked = "\n".join([question.question, *lettered(question.options), INSTRUCTIONS[row["response_format"]]])
        assert text == f"user {asked}\nassistant\n"
        assert (inputs.has_video, inputs.pixel_values is not None) == (
            bool(question.video),
            bool(question.image),
        )


def test_every_dataset_has_a_case():
    assert {case.name for case in CASES} | {"spotlight"} == set(DATASETS)


def test_spotlight_reads_what_the_generator_wrote(tmp_path):
    written = generate(tmp_path, "L1", 4, 0)
    assert list(read("spotlight", tmp_path)) == written
    assert list(read("spotlight", tmp_path / "annotations.jsonl", tmp_path)) == written
    table = load("spotlight", tmp_path, instruction="")
    assert [row["event_frames"] for row in table] == [list(question.event_frames) for question in written]
    assert [json.loads(row["metadata"]) for row in table] == [question.metadata for question in written]
    assert accuracy_reward([respond(answer) for answer in table["answer"]], table["answer"][:], "word") == [1.0] * 4


def test_tables_of_all_datasets_can_be_trained_on_together(tmp_path):
    tables = [load(case.name, *case.write(tmp_path / str(case)), case.split) for case in CASES]
    assert len(concatenate_datasets(tables)) == sum(len(case.golds) for case in CASES)


# --- NExT-QA's video map, cuts, tasks -----------------------------------------------------------------------------


def test_a_cup_game_is_cut_where_the_mapping_says(tmp_path):
    annotations, videos = perception_test(tmp_path, cut=75)
    questions = list(read("perception-test", annotations, videos, "valid"))
    assert [(question.video.start, question.video.end) for question in questions] == [(0.0, 2.5), (0.0, 2.5)]
    part = load("perception-test", annotations, videos, "valid")[0]["prompt"][0]["content"][0]
    assert (part["video_start"], part["video_end"], part["raw_fps"]) == (0.0, 2.5, None)


def test_mvbench_reads_all_twenty_tasks_with_spans_and_frame_folders(tmp_path):
    from appo.data.mvbench import FOLDERS

    assert len(FOLDERS) == 20
    for task, folder in FOLDERS.items():
        row = {"video": "x.mp4", "question": "What?", "candidates": ["no", "yes"], "answer": "yes"}
        if task == "episodic_reasoning":
            row |= {"video": "show_s01", "start": 1, "end": 2.5}
        elif folder.startswith(("star", "sta/")):
            row |= {"start": 3.0, "end": 9.5}
        put_json(tmp_path / "json" / f"{task}.json", [row])
        put_media(tmp_path / "video", f"{folder}/" + ("show_s01/" if task == "episodic_reasoning" else "x.mp4"))
    questions = {question.id: question for question in read("mvbench", tmp_path / "json", tmp_path / "video")}
    assert list(questions) == [f"{task}/0" for task in FOLDERS]
    source = questions["action_sequence/0"].video
    assert (source.start, source.end, source.frames_fps) == (3.0, 9.5, None)
    assert questions["moving_count/0"].video.is_whole
    shown = questions["episodic_reasoning/0"]
    folder = str(tmp_path / "video" / FOLDERS["episodic_reasoning"] / "show_s01")
    assert (shown.video, shown.metadata) == (VideoSource(folder, 1.0, 2.5, 3.0), {"task": "episodic_reasoning"})
    assert len(load("mvbench", tmp_path / "json", tmp_path / "video", "state_change")) == 1
    part = load("mvbench", tmp_path / "json", tmp_path / "video", "episodic_reasoning")[0]["prompt"][0]["content"][0]
    assert (part["video_start"], part["video_end"], part["raw_fps"]) == (1.0, 2.5, 3.0)


# --- properties --------------------------------------------------------------------------------------------------

TEXTS = st.text(string.ascii_letters + " ,.", min_size=1).filter(str.strip)


@given(st.integers(0, 10**6), TEXTS, st.lists(TEXTS, unique=True, min_size=4, max_size=12))
def test_shuffling_never_loses_the_gold_answer(sample_id, right, wrong):
    row = Row("here", SEED_TRAIN | {"sample_id": sample_id, "answer": right, "negative_answers": wrong})
    options, letter = draw_options(row)
    assert options[string.ascii_uppercase.index(letter)] == right
    assert len(set(options)) == len(options) == 4
    assert set(options) <= {right, *wrong}
    assert draw_options(row) == (options, letter), "another start of the run shows other options"


def test_every_letter_is_right_equally_often():
    rows = [Row("here", SEED_TRAIN | {"sample_id": sample_id}) for sample_id in range(2000)]
    letters = [draw_options(row)[1] for row in rows]
    assert all(420 < letters.count(letter) < 580 for letter in "ABCD")


@pytest.mark.parametrize("count", [0, 1, ROWS_AT_ONCE, ROWS_AT_ONCE + 1])
def test_rows_of_keeps_all_rows_in_order(count):
    table = rows_of(VideoQA(str(number), VideoSource("x.mp4"), "What?", "yes") for number in range(count))
    assert table["id"][:] == [str(number) for number in range(count)]
    assert table.column_names == COLUMNS


def test_a_table_is_mapped_and_can_be_shuffled_pickled_and_told_apart():
    def questions(count: int) -> Any:
        return (VideoQA(str(number), VideoSource("x.mp4"), "Why? " * 20, "yes") for number in range(count))

    before = pa.total_allocated_bytes()
    table = rows_of(questions(5000))
    assert table.data.nbytes > 1_000_000
    assert pa.total_allocated_bytes() - before < 100_000, "the table is in memory"
    again = pickle.loads(pickle.dumps(table))
    assert again[4321] == table[4321]
    assert sorted(table.shuffle(seed=0)["id"]) == sorted(again["id"])
    assert rows_of(questions(5000))._fingerprint == table._fingerprint != rows_of(questions(4999))._fingerprint


def test_a_table_is_built_without_a_container_a_row():
    """Those would set off the garbage collector once for each 50 rows or so, over everything that is loaded."""
    runs: list[int] = []
    questions = (
        VideoQA(str(number), VideoSource("x.mp4"), "Why?", "B", "letter", ("a", "b")) for number in range(5000)
    )
    rows_of(VideoQA(str(number), VideoSource("x.mp4"), "What?", "yes") for number in range(2))  # imports
    gc.collect()
    gc.callbacks.append(lambda phase, info: runs.append(info["generation"]))
    try:
        assert len(rows_of(questions)) == 5000
    finally:
        gc.callbacks.pop()
    assert len(runs) < 40


def test_a_folder_is_listed_once_rather_than_asked_for_each_file(tmp_path, monkeypatch):
    folder = put_media(tmp_path, *(f"{number}.png" for number in range(50)))
    (folder / "link.png").symlink_to("0.png")
    (folder / "dangling.png").symlink_to("nothing.png")
    looks: list[str] = []
    is_file = os.path.isfile
    monkeypatch.setattr(os.path, "isfile", lambda path: looks.append(path) or is_file(path))
    files = MediaFiles()
    assert all(files.has(str(folder / f"{number}.png")) for number in [*range(50), *range(50)])
    assert len(looks) == LISTED_AFTER
    assert [files.has(str(folder / name)) for name in ("link.png", "dangling.png", "none.png")] == [True, False, False]
    assert files.has(str(folder), is_folder=True)
    assert (len(files.existing) + len(files.missing), len(files.missing)) == (54, 2)
