"""evaluate and inspection: what a model is worth and what a group of it looked at."""

from __future__ import annotations

import io
import threading
from dataclasses import replace

import pytest
import torch
from recipes.tiny_policy.build import build_policy
from rich.console import Console

from appo.evaluation import inference as evaluate
from appo.evaluation.inference import InferenceSettings, Prediction, accuracy, answer, predict
from appo.evaluation.inspection import inspect_question
from appo.evaluation.predictions import batches
from appo.experiments.demo import accuracy_table, write_picture
from appo.reports.console import print_group
from appo.reports.records import RolloutRecord
from appo.types import VideoSource
from appo.video.reader import FrameSampling
from tests.support.runs import clips

SAMPLING = FrameSampling(2.0, 16, 4)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def record(questions) -> RolloutRecord:
    model, processor = build_policy(0)
    torch.manual_seed(0)
    return inspect_question(
        model, processor, questions[0], SAMPLING, max_new_tokens=12, responses=3, instruction="", step=7, max_weight=1.5
    )


def test_accuracy_counts_unparsable_answers_as_wrong():
    result = accuracy([Prediction("a", "", 1.0, True), Prediction("b", "", 0.0, True), Prediction("c", "", 0.0, False)])
    assert (result.mean, result.parsed, result.questions) == (pytest.approx(1 / 3), pytest.approx(2 / 3), 3)
    with pytest.raises(ValueError, match="no predictions"):
        accuracy([])


def test_predictions_do_not_depend_on_the_batch_and_leave_the_mode_alone(questions):
    model, processor = build_policy(0)
    model.train()
    done: list[int] = []
    settings = {"max_new_tokens": 10, "instruction": ""}
    three = predict(model, processor, questions[:5], SAMPLING, batch_size=3, on_progress=done.append, **settings)
    assert done == [3, 5]
    assert model.training
    assert three == predict(model, processor, questions[:5], SAMPLING, batch_size=1, **settings)
    assert [p.id for p in three] == [q.id for q in questions[:5]]


def test_a_scripted_answer_scores(questions, monkeypatch):
    """The gold answer earns 1, another one 0: through generation and decoding, with the model's choice scripted."""
    model, processor = build_policy(0)
    texts = [f"<think> i look </think> <answer> {answer} </answer>" for answer in (questions[0].answer, "nothing")]
    ids = [torch.tensor(processor.tokenizer(text)["input_ids"]) for text in texts]
    monkeypatch.setattr("appo.evaluation.inference.generate", lambda *args, **kwargs: [[one] for one in ids])
    same = [questions[0], replace(questions[0], id="again")]
    right, wrong = predict(model, processor, same, SAMPLING, max_new_tokens=10, instruction="")
    assert (right.right, right.parsed) == (1.0, True)
    assert wrong.right == 0.0


SETTINGS = InferenceSettings(SAMPLING, max_new_tokens=10, instruction="", samples=3, temperature=1.0, seed=5)


def test_each_batch_has_its_own_random_numbers(questions):
    model, processor = build_policy(0)
    asked = list(batches(questions, 2))
    all_at_once = {one.index: one.replies for one in answer(model, processor, asked, SETTINGS)}
    assert list(all_at_once) == [0, 1, 2]
    state = torch.random.get_rng_state()
    for batch in reversed(asked):
        (alone,) = answer(model, processor, [batch], SETTINGS)
        assert alone.replies == all_at_once[batch[0]]
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's random numbers are left alone"
    (other,) = answer(model, processor, asked[:1], replace(SETTINGS, seed=6))
    assert other.replies != all_at_once[0]
    for replies in all_at_once.values():
        assert all(len(reply.texts) == len(reply.tokens) == 3 for reply in replies)
        assert all(1 <= length <= 10 for reply in replies for length in reply.tokens)
    assert len({text for replies in all_at_once.values() for reply in replies for text in reply.texts}) > 6


def test_the_next_batch_is_read_while_the_model_writes(questions, monkeypatch):
    """The model goes on writing until the next batch has been read: in turns, it would wait for ever."""
    model, processor = build_policy(0)
    read = [threading.Event() for _ in range(3)]
    encode, write = evaluate._encode, evaluate.generate
    writing = []

    def announced(processor, settings, cache, batch):
        encoded = encode(processor, settings, cache, batch)
        read[questions.index(batch[0]) // 2].set()
        return encoded

    def waiting(*args, **kwargs):
        writing.append(True)
        assert len(writing) == 3 or read[len(writing)].wait(60), "nothing is read while the model writes"
        assert len(writing) > 1 or not read[2].is_set(), "one batch is read ahead, not more"
        return write(*args, **kwargs)

    monkeypatch.setattr(evaluate, "_encode", announced)
    monkeypatch.setattr(evaluate, "generate", waiting)
    assert [one.index for one in answer(model, processor, batches(questions, 2), SETTINGS)] == [0, 1, 2]


def test_an_unreadable_video_is_a_reply_with_an_error_and_costs_no_other_question(questions, tmp_path):
    model, processor = build_policy(0)
    broken, picture = tmp_path / "broken.mp4", tmp_path / "broken.png"
    broken.write_bytes(b"no video" * 100)
    picture.write_bytes(b"no picture")
    bad = [
        replace(questions[0], id="video", video=VideoSource(str(broken))),
        replace(questions[0], id="gone", video=VideoSource(str(tmp_path / "gone.mp4"))),
        replace(questions[0], id="picture", image=str(picture)),
        replace(questions[0], id="placeholder", question="what does <|video_pad|> mean ?"),
    ]
    asked = [bad[0], questions[1], *bad[1:], questions[2]]
    found = [reply for one in answer(model, processor, batches(asked, 4), SETTINGS) for reply in one.replies]
    assert [bool(reply.error) for reply in found] == [True, False, True, True, True, False]
    assert [reply.id for reply in found] == [question.id for question in asked]
    assert "broken.mp4: cannot be decoded" in found[0].error
    assert "gone.mp4: cannot be opened" in found[2].error
    assert "broken.png: cannot be read as an image" in found[3].error
    assert "holds <|video_pad|> as text" in found[4].error
    assert not any(reply.texts or "\n" in reply.error for reply in found if reply.error)
    (only,) = answer(model, processor, [(0, [bad[0]])], SETTINGS)
    assert only.replies[0].error == found[0].error
    with pytest.raises(ValueError, match=r"broken\.mp4"):
        predict(model, processor, asked, SAMPLING, max_new_tokens=4, instruction="")


def test_too_large_a_batch_is_one_line_and_other_errors_are_not_swallowed(questions, monkeypatch):
    model, processor = build_policy(0)
    model.train()
    for error, expected in ((torch.OutOfMemoryError("CUDA out of memory"), ValueError), (KeyError("ours"), KeyError)):

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(evaluate, "generate", fail)
        with pytest.raises(expected, match=r"2 questions with 3 responses each|ours"):
            list(answer(model, processor, batches(questions, 2), SETTINGS))
        assert model.training


def test_inspection_records_a_whole_group(record, questions):
    assert (record.step, record.id, record.answer) == (7, questions[0].id, questions[0].answer)
    assert record.event_frames == list(questions[0].event_frames)
    assert len(record.responses) == 3
    assert len(record.timestamps) == 8
    for response in record.responses:
        assert len(response.tokens) == len(response.weights) == len(response.frame_attention) <= 12
        assert all(1.0 <= weight <= 1.5 for weight in response.weights)
        assert all(0 < value < 1 for row in response.frame_attention for value in row)
        assert all(sum(row) < 1 for row in response.frame_attention), "frames average over tokens, softmax over keys"
    assert RolloutRecord.from_json(record.to_json()).to_json() == record.to_json()


def test_without_a_gold_answer_none_wins_and_frames_of_any_response_are_crucial(questions):
    model, processor = build_policy(0)
    torch.manual_seed(0)
    asked = replace(questions[0], answer="")
    pictures: list[bytes] = []
    settings = {"max_new_tokens": 8, "responses": 3, "instruction": "", "top_frames": 2}
    record = inspect_question(
        model, processor, asked, SAMPLING, save_film=lambda film: pictures.append(film) or "film", **settings
    )
    assert [response.rewards for response in record.responses] == [{}] * 3
    assert [response.advantage for response in record.responses] == [0.0] * 3
    assert 2 <= len(record.crucial_frames) <= 6
    assert record.film == "film"
    assert pictures[0][8:12] == b"WEBP"


def rendered(draw) -> str:
    console = Console(file=io.StringIO(), width=160, force_terminal=False)
    draw(console)
    return console.file.getvalue()


def test_a_group_on_screen_names_crucial_frames_and_a_winner_and_a_loser(record):
    won = replace(record.responses[0], text="won", tokens=["green"], weights=[1.7], chosen=[True], frame_attention=[])
    won = replace(won, rewards={"accuracy_reward": 1.0})
    lost = replace(won, tokens=["pink"], rewards={"accuracy_reward": 0.0})
    group = replace(record, crucial_frames=[2], event_frames=[2], responses=[won, lost])
    text = rendered(lambda console: print_group(console, "won over", group))
    for expected in ("won over", record.question, "crucial: 2.2s", "[2.2s]", "1 of 2 right", "winner    green", "pink"):
        assert expected in text
    none = rendered(lambda console: print_group(console, "lost", replace(group, crucial_frames=[], responses=[lost])))
    assert "crucial: none" in none
    assert "winner" not in none


def test_the_table_shows_gain_and_interval(tmp_path, record):
    before = {"L1": accuracy([Prediction("a", "", float(i < 5), True) for i in range(10)])}
    after = {"L1": accuracy([Prediction("a", "", float(i < 8), i > 0) for i in range(10)])}
    text = rendered(lambda console: console.print(accuracy_table(before, after)))
    for expected in ("L1", "10", "50.0 % (24-76)", "80.0 % (49-94)", "+30.0", "100 %", "90 %"):
        assert expected in text
    write_picture(tmp_path / "a.svg", [("won over", record)], accuracy_table(before, after))
    svg = (tmp_path / "a.svg").read_text()
    assert "+30.0" in svg
    assert "@font-face" not in svg
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "").replace("https://www.textualize.io", "")
