"""Rewards: the table of right and wrong, completions of every shape, and datasets that must be refused."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from appo.rewards import KINDS, accuracy_reward, completion_text, format_reward, score_answer

OPTIONS = ["a red cup", "a blue ball"]


def said(answer: str) -> str:
    return f"<think>because</think><answer>{answer}</answer>"


@pytest.mark.parametrize(
    ("text", "gold", "kind", "options", "score", "remark"),
    [
        (said("B"), "B", "letter", OPTIONS, 1.0, "letter"),
        (said("(b)"), "B", "letter", OPTIONS, 1.0, "letter written otherwise"),
        (said("A"), "B", "letter", OPTIONS, 0.0, "wrong letter"),
        (said("a blue ball."), "B", "letter", OPTIONS, 1.0, "the option's text"),
        (said("B"), "a blue ball", "letter", OPTIONS, 1.0, "gold is the option's text"),
        (said("B"), "B. a blue ball", "letter", OPTIONS, 1.0, "gold is letter and text"),
        (said("A and B"), "B", "letter", OPTIONS, 0.0, "both at once"),
        (said("B"), "B", "letter", (), 1.0, "options unknown"),
        (said("Blue ball"), "blue  ball", "word", (), 1.0, "words but for case and white space"),
        (said("blue ball!"), "Blue ball.", "word", (), 1.0, "closing punctuation"),
        (said("ball"), "blue ball", "word", (), 0.0, "part of the words"),
        (said("3"), "3", "word", (), 1.0, "a number"),
        (said("3.0"), "3", "word", (), 0.0, "words are not counted as numbers"),
        (said("?"), "!", "word", (), 0.0, "punctuation alone is not nothing"),
        (said("A blue ball"), "a blue ball", "word", OPTIONS, 1.0, "words with options"),
        (said("B"), "a blue ball", "word", OPTIONS, 0.0, "words asked for, letter given"),
        (said("a blue ball"), "a blue ball", "word", ["A. a red cup", "B. a blue ball"], 1.0, "lettered options"),
        (said("B"), "B", None, OPTIONS, 1.0, "no kind, options: letter"),
        (said("left"), "Left", None, (), 1.0, "no kind, no options: word"),
        ("B", "B", "letter", OPTIONS, 0.0, "right but without the tags"),
        ("<answer>B</answer>", "B", "letter", OPTIONS, 0.0, "right but without a thought"),
        (f"{said('B')}{said('B')}", "B", "letter", OPTIONS, 0.0, "right, but twice"),
        ("<think>B</think>", "B", "letter", OPTIONS, 0.0, "no answer tag"),
        ("", "B", "letter", OPTIONS, 0.0, "nothing"),
    ],
)
def test_score_answer(text: str, gold: str, kind: str | None, options: list[str], score: float, remark: str) -> None:
    assert score_answer(text, gold, kind, options) == score, remark
    column = None if kind is None else [kind]
    assert accuracy_reward([text], [gold], kind=column, options=[options]) == [score], "the reward is the score"


def test_each_row_is_scored_by_its_own_columns() -> None:
    completions = [said("A"), said("A"), said("left"), said("left")]
    rewards = accuracy_reward(
        prompts=["p"] * 4,
        completions=completions,
        completion_ids=[[1]] * 4,
        answer=["A", "B", "left", "right"],
        kind=["letter", None, "word", None],
        options=[OPTIONS, OPTIONS, [], None],
        trainer_state=object(),
    )
    assert rewards == [1.0, 0.0, 1.0, 0.0]
    assert accuracy_reward(completions[:2], ["A", "A"], kind="letter") == [1.0, 1.0]
    assert accuracy_reward([], []) == []
    assert format_reward(completions=[]) == []


def test_shape_is_the_one_trl_calls() -> None:
    for reward in (accuracy_reward, format_reward):
        parameters = inspect.signature(reward).parameters
        assert "completions" in parameters
        assert any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        assert reward.__name__.endswith("_reward"), "TRL logs a function under its name"


GOOD = said("B")


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        (GOOD, GOOD),
        ([{"role": "assistant", "content": GOOD}], GOOD),
        ([{"role": "assistant", "content": [{"type": "text", "text": GOOD}]}], GOOD),
        (
            [
                {
                    "role": "assistant",
                    "content": [{"type": "text", "text": GOOD[:9]}, {"type": "text", "text": GOOD[9:]}],
                }
            ],
            GOOD,
        ),
        ([{"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": GOOD}]}], GOOD),
        ([{"role": "tool", "content": "x"}, {"role": "assistant", "content": GOOD}], GOOD),
        (({"role": "assistant", "content": GOOD},), GOOD),
        ([{"role": "user", "content": GOOD}], None),
        ([{"content": GOOD}], None),
        ([{"role": "assistant"}], None),
        ([{"role": "assistant", "content": None}], None),
        ([{"role": "assistant", "content": []}], None),
        ([{"role": "assistant", "content": [GOOD]}], None),
        ([{"role": "assistant", "content": [{"type": "text", "text": 3}]}], ""),
        ([{"role": "assistant", "content": 7}], None),
        ([{"role": "assistant", "content": b"x"}], None),
        ([GOOD], None),
        ([], None),
        ({}, None),
        ({"role": "assistant", "content": GOOD}, None),
        (None, None),
        (3.5, None),
        (b"bytes", None),
        (object(), None),
    ],
    ids=str,
)
def test_completions_of_every_shape(completion: Any, text: str | None) -> None:
    assert completion_text(completion) == text
    expected = [1.0 if text == GOOD else 0.0]
    assert accuracy_reward([completion], ["B"], ["letter"], [OPTIONS]) == expected
    assert format_reward([completion]) == expected


@pytest.mark.parametrize("text", ["\0" * 50, "\ud800", "<think>" * 1000, "é" * 10, said("\ud800"), said("\0")])
def test_no_text_makes_a_reward_fail(text: str) -> None:
    for kind in KINDS:
        assert accuracy_reward([text], ["B"], [kind]) == [0.0]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({}, "add a column `answer`"),
        ({"answer": ["A"]}, "`answer` has 1 entries for 2 completions"),
        ({"answer": "AB"}, "`answer` is str: it must be a list"),
        ({"answer": ["A", "B"], "kind": ["letter"]}, "`kind` has 1 entries"),
        ({"answer": ["A", "B"], "options": [OPTIONS]}, "`options` has 1 entries"),
        ({"answer": ["A", "B"], "options": OPTIONS}, "row 0: `options` is 'a red cup': it must be a list"),
        ({"answer": ["A", "B"], "options": [OPTIONS, [1, 2]]}, r"row 1: `options` is \[1, 2\]"),
        ({"answer": ["A", None]}, "row 1: `answer` is None"),
        ({"answer": ["A", 3]}, "row 1: `answer` is 3: it must be a text"),
        ({"answer": ["A", " "]}, "row 1: `answer` is ' ': .* not empty"),
        ({"answer": ["A", "B"], "kind": ["letter", "iou"]}, "row 1: `kind` is 'iou': .* letter, word"),
        ({"answer": ["A", "B"], "kind": ["letter", ["x"]]}, "row 1: `kind` is "),
        ({"answer": ["A", "B"], "kind": "number"}, "row 0: `kind` is 'number'"),
        ({"answer": ["A", "C"], "options": [OPTIONS] * 2}, "row 1: `answer` is 'C', .* among the 2 options"),
        ({"answer": ["A", "two"], "kind": "letter"}, "row 1: `answer` is 'two', which is not a letter"),
        ({"answer": ["nothing", "B"], "kind": "word", "options": [OPTIONS] * 2}, "row 0: .* not among the options"),
    ],
)
def test_a_wrong_dataset_is_refused_with_row_and_column(columns: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        accuracy_reward([said("A"), "not even parsed"], **columns)
