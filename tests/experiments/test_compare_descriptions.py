"""What a response says it sees, read from the teacher's own grammar, whose truth is known."""

from __future__ import annotations

import random

import pytest

from appo.experiments.compare.measurements import decisive_words, describe, described_rightly
from appo.world.dataset import samples
from appo.world.teacher import ASIDES, Style, respond
from appo.world.world import LEVELS, answer_of

TEXT = (
    "<think> alright , i go through the frames . i stop at the square at 7 . its colour is blue . yes , the square is "
    "blue and the clock says 7 . the yellow ring drifts around all the time . the star at 3 is not it . that settles "
    "it : blue . </think> <answer> blue </answer>"
)


def metadata_of(scene, question):
    events = [{"shape": e.shape, "colour": e.colour, "second": e.second} for e in scene.events]
    return {"events": events, "asked": question.target}


@pytest.mark.parametrize("level", LEVELS)
def test_the_honest_teacher_is_right_and_the_lazy_one_wrong(level: str) -> None:
    for number, (scene, question) in enumerate(samples(LEVELS[level], 200, level)):
        truth = metadata_of(scene, question)
        for focus in range(len(scene.events)):
            text = respond(scene, question, focus, random.Random(number))
            honest = focus == question.target
            assert described_rightly(truth, text) == (honest, honest), text


@pytest.mark.parametrize("level", LEVELS)
def test_the_decisive_words_are_few_and_distinguish_events(level: str) -> None:
    for number, (scene, question) in enumerate(samples(LEVELS[level], 200, level)):
        event = scene.events[question.target]
        words = respond(scene, question, question.target, random.Random(number)).split()
        decisive = [word for word, kept in zip(words, decisive_words(words), strict=True) if kept]
        assert decisive[-1] == question.answer == answer_of(event, question.task)
        assert str(event.second) in decisive[:2], "the commitment"
        assert set(decisive) <= {event.shape, event.colour, str(event.second)}
        assert 3 <= len(decisive) <= 5 < len(words) / 5


def test_without_a_commitment_the_first_claim_decides_whatever_precedes_it() -> None:
    """Wanderers have colours too, and other events are named in asides: neither decides anything."""
    for number, (scene, question) in enumerate(samples(LEVELS["L3"], 200, "blunt")):
        event = scene.events[question.target]
        words = respond(scene, question, question.target, random.Random(number), Style(False, 3)).split()
        kept = [i for i, keep in enumerate(decisive_words(words)) if keep]
        assert {words[i] for i in kept} <= {event.shape, event.colour, str(event.second)}
        assert words[kept[-1]] == question.answer
        assert len(kept) <= 7
        if question.task != "first":  # whose report names nothing
            assert words[kept[0]] == question.answer, "the report"
            assert "at" not in words[: kept[0] - 3], "nothing is committed to before"


def test_asides_are_as_many_as_requested() -> None:
    scene, question = next(samples(LEVELS["L1"], 1, 0))
    plain = respond(scene, question, 0, random.Random(1))
    talk = respond(scene, question, 0, random.Random(1), Style(True, 4))
    before = talk.split(" at ")[0]
    assert sum(before.count(aside) for aside in set(ASIDES)) == 5, "the opening and four more"
    assert len(talk.split()) >= len(plain.split()) + 4 * 5 - 12


def test_a_response_taken_apart_by_hand() -> None:
    said = describe(TEXT)
    assert (said.shapes, said.colours, said.seconds) == ({"square"}, {"blue"}, {"7"})
    words = TEXT.split()
    kept = [(i, word) for i, (word, keep) in enumerate(zip(words, decisive_words(words), strict=True)) if keep]
    assert [word for _, word in kept] == ["square", "7", "blue", "blue"]
    assert kept[-1][0] == words.index("<answer>") + 1


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (TEXT.replace("its colour is blue", "its colour is red"), (False, True)),
        (TEXT.replace("at the square at 7", "at the square at 6"), (True, False)),
        (TEXT.replace("the star at 3 is not it", "the star at 3 is it"), (False, False)),
        (TEXT.replace("<answer> blue", "<answer> red").replace(": blue .", ": red ."), (True, True)),
        ("blue", (False, False)),
        ("", (False, False)),
        ("<think> </think> <answer> blue </answer>", (False, False)),
    ],
)
def test_descriptions_are_judged_apart_from_the_answer(text: str, right: tuple[bool, bool]) -> None:
    truth = {"events": [{"shape": "square", "colour": "blue", "second": 7}], "asked": 0}
    assert described_rightly(truth, text) == right


def test_broken_responses_have_as_many_flags_as_words() -> None:
    for text in ("", "blue", "<answer> <answer> blue", "</think> . . 7", "<think> at 7 . . <answer> red"):
        assert len(decisive_words(text.split())) == len(text.split())
    assert decisive_words(["<answer>", "<answer>", "blue"])[2]
