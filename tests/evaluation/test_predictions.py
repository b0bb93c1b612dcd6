"""predictions: the folder of an evaluation survives a kill at any byte, and is never mistaken for another's."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appo.evaluation.predictions import (
    PREDICTIONS,
    QUESTIONS,
    TIMING,
    EvaluationFolder,
    Reply,
    batches,
    questions_digest,
)
from appo.reports.jsonl import RecordError
from appo.types import VideoQA, VideoSource

SIZE = 3
SETTINGS = {"model": "m", "dataset": "jsonl", "batch_size": SIZE, "instruction": "Say «A».\n"}
ALL_QUESTIONS = [
    VideoQA(
        f"q/{number}", VideoSource(f"videos/{number}.mp4"), "Which?", "B", "letter", ("red", "blue"),
        spans=((0.0, 1.5), (2.25, 3.0)), metadata={"level": "L1", "by": ["me", None]},
    )
    for number in range(8)
]  # fmt: skip
REPLIES = [Reply(q.id, (f"<answer>é \u2028 {n}\n</answer>", ""), (7 + n, 1)) for n, q in enumerate(ALL_QUESTIONS)]
REPLIES[4] = Reply("q/4", error="videos/4.mp4: is empty (0 bytes); copy it again")


def begin(path: Path) -> EvaluationFolder:
    return EvaluationFolder.start(path, SETTINGS, ALL_QUESTIONS)


def fill(folder: EvaluationFolder, kept: set[int]) -> None:
    """Answer every batch that is not kept, as an evaluation does."""
    for index, batch in batches(ALL_QUESTIONS, SIZE):
        if index not in kept:
            folder.append(index, REPLIES[index * SIZE : index * SIZE + len(batch)], 0.5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> EvaluationFolder:
    folder = begin(tmp_path_factory.mktemp("whole"))
    fill(folder, set())
    return folder


def test_what_was_written_is_read_back(whole):
    assert whole.questions() == ALL_QUESTIONS
    assert whole.replies(ALL_QUESTIONS) == REPLIES
    assert whole.resume(ALL_QUESTIONS, SIZE) == {0: REPLIES[:3], 1: REPLIES[3:6], 2: REPLIES[6:]}
    assert whole.seconds() == (1.5, 8)
    assert whole.settings == SETTINGS | {"questions": 8, "questions_digest": questions_digest(ALL_QUESTIONS)}
    assert EvaluationFolder.open(whole.path) == whole


@pytest.mark.parametrize("name", [PREDICTIONS, TIMING])
def test_a_kill_at_any_byte_loses_and_doubles_nothing(tmp_path, whole, name, monkeypatch):
    """The file ends anywhere; the other holds what was written before, or (timing) up to one batch less."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a kill is no power cut, and this is a thousand files
    complete = {file: (whole.path / file).read_bytes() for file in (PREDICTIONS, TIMING)}
    ends = [len("".join(reply.to_line() for reply in REPLIES[:count])) for count in (3, 6, 8)]
    folder = begin(tmp_path / "e")
    for size in range(len(complete[name]) + 1):
        for file, content in complete.items():
            (folder.path / file).write_bytes(content[:size] if file == name else content)
        kept = folder.resume(ALL_QUESTIONS, SIZE)
        if name == PREDICTIONS:
            assert len(kept) == sum(end <= size for end in ends)
        fill(folder, set(kept))
        assert (folder.path / PREDICTIONS).read_bytes() == complete[PREDICTIONS]
        assert folder.resume(ALL_QUESTIONS, SIZE).keys() == {0, 1, 2}
        if name == PREDICTIONS:
            assert (folder.path / TIMING).read_bytes() == complete[TIMING]


def test_a_torn_batch_counts_as_unanswered_until_it_is_repeated(tmp_path):
    folder = begin(tmp_path)
    (tmp_path / PREDICTIONS).write_text("".join(reply.to_line() for reply in REPLIES[:5]) + '{"id": "q/5", "te')
    assert folder.replies(ALL_QUESTIONS) == [*REPLIES[:5], None, None, None]
    assert folder.resume(ALL_QUESTIONS, SIZE) == {0: REPLIES[:3]}
    assert (tmp_path / PREDICTIONS).read_text() == "".join(reply.to_line() for reply in REPLIES[:3])


def test_a_retry_repeats_whole_batches_with_an_error_in_the_same_order(tmp_path):
    folder = begin(tmp_path)
    fill(folder, set())
    assert folder.resume(ALL_QUESTIONS, SIZE).keys() == {0, 1, 2}, "errors are not asked again unless told"
    kept = folder.resume(ALL_QUESTIONS, SIZE, retry=True)
    assert kept.keys() == {0, 2}
    assert folder.seconds() == (1.0, 5)
    folder.append(1, [replace(reply, texts=("now",), tokens=(1,), error="") for reply in REPLIES[3:6]], 0.25)
    folder.resume(ALL_QUESTIONS, SIZE)
    ids = [json.loads(line)["id"] for line in (tmp_path / PREDICTIONS).read_text().splitlines()]
    assert ids == [question.id for question in ALL_QUESTIONS]
    assert folder.resume(ALL_QUESTIONS, SIZE, retry=True).keys() == {0, 1, 2}


DAMAGE = [
    ("no json\n", "line 1: damaged .no JSON object"),
    ('["a list"]\n', "no JSON object"),
    ('{"id": "q/0"}\n', "no prediction"),
    ('{"id": "q/0", "texts": ["a"], "tokens": []}\n', "no prediction"),
    ('{"id": "q/0", "texts": ["a"], "tokens": [1], "more": 1}\n', "no prediction"),
    ('{"id": "q/0", "texts": null, "tokens": []}\n', "damaged"),
    (Reply("other", ("a",), (1,)).to_line(), "no question 'other'"),
    (REPLIES[0].to_line() * 2, "line 2: damaged .'q/0' was answered before"),
]


@pytest.mark.parametrize(("text", "message"), DAMAGE, ids=[row[1] for row in DAMAGE])
def test_damage_is_named_by_file_and_line(tmp_path, text, message):
    folder = begin(tmp_path)
    (tmp_path / PREDICTIONS).write_text(text + REPLIES[7].to_line())
    with pytest.raises(RecordError, match=f"{PREDICTIONS}, {message}|{PREDICTIONS}, line 1: .*{message}"):
        folder.resume(ALL_QUESTIONS, SIZE)


OTHERS = [
    ({"batch_size": 4}, ALL_QUESTIONS, "batch_size is 3 there, 4 here"),
    (
        {"model": "n", "instruction": ""},
        ALL_QUESTIONS,
        r'model is "m" there, "n" here; instruction is "Say .* there, "" here',
    ),
    ({"seed": 1}, ALL_QUESTIONS, "seed is null there, 1 here"),
    ({}, ALL_QUESTIONS[:7], "questions is 8 there, 7 here; questions_digest is "),
    ({}, [replace(ALL_QUESTIONS[0], answer="A"), *ALL_QUESTIONS[1:]], "questions_digest is "),
]


@pytest.mark.parametrize(("change", "asked", "message"), OTHERS, ids=[row[2] for row in OTHERS])
def test_an_evaluation_with_other_settings_is_refused_and_named(tmp_path, change, asked, message):
    begin(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(RecordError, match=message):
        EvaluationFolder.start(tmp_path, SETTINGS | change, asked)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_the_same_evaluation_goes_on_and_other_versions_may_not_answer_the_rest(tmp_path):
    folder = begin(tmp_path)
    fill(folder, {1})
    assert begin(tmp_path) == folder
    folder.check_versions()
    described = folder.describe()
    described["versions"]["torch"] = "1.0"
    folder.write("eval.json", json.dumps(described))
    with pytest.raises(RecordError, match=r"begun with torch 1\.0, here "):
        folder.check_versions()


def test_two_processes_do_not_answer_the_same_evaluation(tmp_path):
    folder = begin(tmp_path)
    with folder.locked(), pytest.raises(RecordError, match="another process is answering"), begin(tmp_path).locked():
        pass
    with pytest.raises(KeyError), folder.locked():
        raise KeyError
    with folder.locked():
        fill(folder, set())


def test_folders_of_others_and_damaged_ones_are_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(RecordError, match="is not empty and holds no evaluation"):
        begin(tmp_path)
    with pytest.raises(RecordError, match=r"no evaluation \(eval\.json: No such file"):
        EvaluationFolder.open(tmp_path)
    (tmp_path / "a-file").write_text("")
    with pytest.raises(RecordError, match="cannot be read"):
        begin(tmp_path / "a-file")
    folder = begin(tmp_path / "e")
    (folder.path / "eval.json").write_text('{"config": ')
    with pytest.raises(RecordError, match=r"eval\.json: damaged"):
        EvaluationFolder.open(folder.path)


def test_an_evaluation_killed_before_it_had_begun_begins_anew(tmp_path):
    for left in ("questions.jsonl", "eval.json.part", "clips/L1/a.mp4"):
        (tmp_path / left).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / left).write_text("half")
    assert begin(tmp_path).questions() == ALL_QUESTIONS


def test_changed_questions_are_noticed(tmp_path):
    folder = begin(tmp_path)
    file = tmp_path / QUESTIONS
    file.write_text(file.read_text().replace('"answer": "B"', '"answer": "A"', 1))
    with pytest.raises(RecordError, match=r"questions\.jsonl: was changed"):
        folder.questions()


def test_the_digest_is_of_the_questions_not_of_their_folders():
    moved = [
        replace(question, video=VideoSource(f"/elsewhere/{Path(question.video.path).name}"))
        for question in ALL_QUESTIONS
    ]
    assert questions_digest(moved) == questions_digest(ALL_QUESTIONS)
    renamed = [replace(ALL_QUESTIONS[0], video=VideoSource("videos/9.mp4")), *ALL_QUESTIONS[1:]]
    assert (
        len({questions_digest(asked) for asked in (ALL_QUESTIONS, renamed, ALL_QUESTIONS[::-1], ALL_QUESTIONS[1:])})
        == 4
    )


def test_a_folder_of_the_older_form_is_read_and_gone_on_with(tmp_path):
    """Then the path alone was the video, and what is shown of it stood in the metadata."""
    shown = {"task": "t", "clip": [1.0, 2.5], "event_frames": [1, 2], "frames_fps": 3.0, "by": "me"}
    common = {"question": "Which?", "answer": "B", "kind": "letter", "options": ["red", "blue"], "spans": [[0.0, 1.5]]}
    old = [
        {"id": "q/0", "video": "videos/frames", **common, "image": "", "metadata": shown},
        {"id": "q/1", "video": "", **common, "image": "pictures/x.png", "metadata": {}},
    ]
    questions = [
        VideoQA(
            "q/0", VideoSource("videos/frames", 1.0, 2.5, 3.0), "Which?", "B", "letter", ("red", "blue"),
            spans=((0.0, 1.5),), event_frames=(1, 2), metadata={"task": "t", "by": "me"},
        ),
        VideoQA("q/1", None, "Which?", "B", "letter", ("red", "blue"), "pictures/x.png", ((0.0, 1.5),)),
    ]  # fmt: skip
    names = [{**row, **{name: Path(row[name]).name for name in ("video", "image")}} for row in old]
    digest = hashlib.sha256("".join(json.dumps(row) + "\n" for row in names).encode()).hexdigest()[:16]
    folder = EvaluationFolder.start(tmp_path / "e", SETTINGS, questions)
    about = json.loads((folder.path / "eval.json").read_text())
    about["config"]["questions_digest"] = digest
    (folder.path / "eval.json").write_text(json.dumps(about))
    (folder.path / QUESTIONS).write_text("".join(json.dumps(row) + "\n" for row in old))
    assert EvaluationFolder.open(folder.path).questions() == questions
    assert EvaluationFolder.start(folder.path, SETTINGS, questions).settings["questions_digest"] == digest
    with pytest.raises(RecordError, match="questions_digest is "):
        EvaluationFolder.start(folder.path, SETTINGS, [replace(questions[0], event_frames=(1,)), questions[1]])


TEXT = st.text(st.characters(codec="utf-8") | st.sampled_from("\n\r\u2028\x00\x85"))


@settings(max_examples=200)
@given(TEXT, st.lists(st.tuples(TEXT, st.integers(0, 9999)), max_size=4), TEXT)
def test_a_reply_is_one_line_whatever_its_text(identity, said, error):
    texts, tokens = tuple(text for text, _ in said), tuple(length for _, length in said)
    reply = Reply(identity, error=error) if error else Reply(identity, texts, tokens)
    line = reply.to_line()
    assert line.count("\n") == 1
    assert line.isascii()
    assert Reply.from_json(json.loads(line)) == reply


@given(st.integers(0, 40), st.integers(1, 50))
def test_batches_hold_every_question_once_in_order(count, size):
    numbers = list(batches(ALL_QUESTIONS[:0] + [ALL_QUESTIONS[0]] * count, size))
    assert [index for index, _ in numbers] == list(range(-(-count // size)))
    assert sum(len(batch) for _, batch in numbers) == count
    assert all(len(batch) == size for _, batch in numbers[:-1])
