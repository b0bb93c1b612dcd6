"""Rewards: the table of right and wrong, completions of every shape, datasets that must be refused, names."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from appo.rewards.functions import (
    KINDS,
    REWARDS,
    accuracy_reward,
    comparison,
    completion_text,
    format_reward,
    reward_functions,
    score_answer,
    temporal_iou_reward,
)

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
        (said("1,200.004"), "1200", "number", (), 1.0, "a number, equal at two decimals"),
        (said("1201"), "1200", "number", (), 0.0, "another number"),
        (said("about 1200"), "1200", "number", (), 0.0, "words before the number"),
        (said("no entry"), "no entry here now", "ocr", (), 0.5, "half the words"),
        (said("house red"), "red house", "text", (), 0.5, "ROUGE"),
        (said("9"), "10", "regression", (), 0.9, "a tenth off"),
        (said("9"), "10", "mra", (), 0.9, "nine of ten thresholds"),
        ("9", "10", "mra", (), 0.0, "graded too only with the tags"),
        ("<think>because</think><answer></answer>", "0", "regression", (), 0.0, "no answer is not 0"),
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


def test_a_dataset_can_be_checked_before_a_run() -> None:
    assert comparison("B", options=OPTIONS)("a blue ball") == 1.0
    assert comparison("10", "mra")("9") == 0.9
    for answer, kind in (("1/2", "number"), ("", "word"), ("B", "iou")):
        with pytest.raises(ValueError, match=r"`(answer|kind)` is"):
            comparison(answer, kind)


def test_shape_is_the_one_trl_calls() -> None:
    assert list(REWARDS) == ["accuracy", "format", "temporal_iou"]
    for reward in REWARDS.values():
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
        (object, None),
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
        assert accuracy_reward([text], ["B" if kind in ("letter", "word", "ocr", "text") else "3"], [kind]) == [0.0]
    assert temporal_iou_reward([text], [[(0, 1)]]) == [0.0]


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
        (
            {"answer": ["A", "B"], "kind": "numbers"},
            "row 0: `kind` is 'numbers': .* letter, word, number, ocr",
        ),
        ({"answer": ["1", "B"], "kind": "number"}, "row 1: `answer` is 'B', which is not a number"),
        ({"answer": ["1", "B"], "kind": ["regression", "mra"]}, "row 1: `answer` is 'B', which is not a number"),
        ({"answer": ["a", "赤"], "kind": "text"}, "row 1: `answer` is '赤': ROUGE"),
        ({"answer": ["A", "B"], "response_format": "xml"}, "row 0: `response_format` is 'xml': .* answer, grounded"),
        ({"answer": ["A", "B"], "response_format": ["answer"]}, "`response_format` has 1 entries"),
        ({"answer": ["A", "C"], "options": [OPTIONS] * 2}, "row 1: `answer` is 'C', .* among the 2 options"),
        ({"answer": ["A", "two"], "kind": "letter"}, "row 1: `answer` is 'two', which is not a letter"),
        ({"answer": ["nothing", "B"], "kind": "word", "options": [OPTIONS] * 2}, "row 0: .* not among the options"),
    ],
)
def test_a_wrong_dataset_is_refused_with_row_and_column(columns: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        accuracy_reward([said("A"), "not even parsed"], **columns)


# --- by name -----------------------------------------------------------------------------------------------------


class Nameless:
    """Callable, but without the name under which TRL would log it."""

    def __call__(self, completions: list[Any], **kwargs: Any) -> list[float]:
        return [0.0] * len(completions)


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A user's module of rewards."""
    module = ModuleType("mine")

    def length_reward(completions: list[Any], **kwargs: Any) -> list[float]:
        return [float(len(completion)) for completion in completions]

    module.length_reward, module.number, module.nameless = length_reward, 3, Nameless()
    monkeypatch.setitem(sys.modules, "mine", module)
    return module


def test_rewards_are_chosen_by_name_or_path_in_the_order_given(mine: ModuleType) -> None:
    assert reward_functions(["format", "accuracy"]) == [format_reward, accuracy_reward]
    assert reward_functions(("temporal_iou",)) == [temporal_iou_reward]
    assert reward_functions(["accuracy", "mine.length_reward"]) == [accuracy_reward, mine.length_reward]
    assert reward_functions(["appo.rewards.functions.format_reward"]) == [format_reward], "a dotted module"
    (length,) = reward_functions(["mine:length_reward"])
    assert length(["abc"]) == [3.0]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([], r"rewards is \[\]: it must be a list of names, such as \[accuracy, format, temporal_iou\]"),
        ("accuracy", "rewards is 'accuracy': it must be a list"),
        ([3], "rewards holds 3, which is neither"),
        (["acuracy"], "rewards holds 'acuracy', .* one of accuracy, format, temporal_iou .* write module.function"),
        ([""], "rewards holds '', which is neither"),
        (["mine:"], "rewards holds 'mine:', which is neither"),
        ([".f"], "rewards holds '.f', which is neither"),
        (["..f"], "importing '.' fails"),
        (["no_such_module.f"], "importing 'no_such_module' fails .ModuleNotFoundError: .* PYTHONPATH"),
        (["broken_rewards:f"], "importing 'broken_rewards' fails .ZeroDivisionError"),
        (["mine.nothing"], "'mine' has no 'nothing': name a function"),
        (["mine.number"], "'mine' has 'number', but it is no function: 3"),
        (["mine.nameless"], "'mine' has 'nameless', but it is no function"),
        (["accuracy", "accuracy"], "holds accuracy_reward more than once"),
        (["accuracy", "appo.rewards.functions.accuracy_reward"], "holds accuracy_reward more than once"),
    ],
)
def test_what_names_no_reward_is_refused(
    names: Any, says: str, mine: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_rewards.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=says):
        reward_functions(names)


def test_the_message_names_the_setting() -> None:
    with pytest.raises(ValueError, match=r"^reward_names holds 'x'"):
        reward_functions(["x"], setting="reward_names")
