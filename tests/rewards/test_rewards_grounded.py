"""Grounded questions: the strict format, the grammar of time spans, temporal IoU as a reward, format per dataset."""

from __future__ import annotations

import random
import re
from fractions import Fraction
from typing import Any

import pytest

from appo.rewards.functions import accuracy_reward, format_reward, temporal_iou_reward
from appo.rewards.templates import (
    GROUNDED_INSTRUCTION,
    ParsedResponse,
    parse_grounded_response,
    parse_response,
    parse_spans,
)

GOOD = "<think>a red ball</think><answer>B</answer><time>[3, 5.5]</time>"


def answered(answer: str) -> str:
    return f"<think>because</think><answer>{answer}</answer>"


def timed(time: str, answer: str = "B") -> str:
    return f"{answered(answer)}<time>{time}</time>"


def test_the_instruction_asks_for_what_the_parser_reads() -> None:
    tags = ("<think>", "</think>", "<answer>", "</answer>", "<time>", "</time>")
    positions = [GROUNDED_INSTRUCTION.index(tag) for tag in tags]
    assert positions == sorted(positions)
    examples = re.findall(r"\[start, end\](?:, \[start, end\])?", GROUNDED_INSTRUCTION)
    assert [parse_spans(text.replace("start", "1.5").replace("end", "2")) for text in examples] == [
        [(Fraction(3, 2), 2)],
        [(Fraction(3, 2), 2)] * 2,
    ]


@pytest.mark.parametrize(
    ("text", "expected", "remark"),
    [
        (GOOD, ("a red ball", "B", "[3, 5.5]"), "plain"),
        (f" \n{GOOD}\n ", ("a red ball", "B", "[3, 5.5]"), "white space around"),
        ("<think>a</think> <answer> B </answer>\n<time> 3 - 5 </time>", ("a", "B", "3 - 5"), "between and inside"),
        ("<think></think><answer>B</answer><time>[3, 5]</time>", ("", "B", "[3, 5]"), "empty thought is allowed"),
        (answered("B"), None, "no time"),
        ("<think>a</think><time>[3, 5]</time>", None, "no answer"),
        ("<answer>B</answer><time>[3, 5]</time>", None, "no thought"),
        (timed(""), None, "empty time"),
        (timed("early on"), None, "a time in words"),
        (timed("[5, 3]"), None, "a time that ends before it starts"),
        (timed("[3, 5]", answer=" "), None, "empty answer"),
        (f"{GOOD}<time>[3, 5]</time>", None, "two times"),
        (f"{GOOD} ok", None, "text after"),
        ("<think>a</think><time>[3, 5]</time><answer>B</answer>", None, "out of order"),
        ("<think>a</think><answer>B<time>[3, 5]</time></answer>", None, "nested"),
        ("<think>a</think><answer>B</answer>at<time>[3, 5]</time>", None, "text between"),
        ("<think>a <time></think><answer>B</answer><time>[3, 5]</time>", None, "a tag quoted in the thought"),
        ("<think>a</think><answer>B</answer><time>[3, 5]", None, "not closed"),
        ("", None, "empty"),
    ],
)
def test_grounded_parser(text: str, expected: tuple[str, str, str] | None, remark: str) -> None:
    assert parse_grounded_response(text) == (ParsedResponse(*expected) if expected else None), remark
    assert not (expected and parse_response(text)), "the two formats never both hold"


def test_grounded_parser_agrees_with_a_walk_over_the_tags() -> None:
    tags = ["<think>", "</think>", "<answer>", "</answer>", "<time>", "</time>"]
    random_ = random.Random(0)
    accepted = 0
    for _ in range(20_000):
        fill = [random_.choice(["", " ", "\n", "\0"][: random_.choice([3, 4])]) for _ in range(7)]
        fill[1], fill[3], fill[5] = random_.choice(["", "a"]), random_.choice(["B", " B ", ""]), "[1, 2]"
        whole = [piece for pair in zip(fill, [*tags, ""], strict=True) for piece in pair]
        if random_.random() < 0.3:
            del whole[random_.randrange(len(whole))]
        text = "".join(whole)
        pieces = re.split(r"(</?(?:think|answer|time)>)", text)
        parts = [piece.strip() for piece in pieces[0::2]]
        good = pieces[1::2] == tags and not any(parts[0::2]) and parts[3] != "" and parse_spans(parts[5]) is not None
        assert (parse_grounded_response(text) is not None) == good, repr(text)
        accepted += good
    assert 2_000 < accepted < 18_000, "both outcomes must be common"


@pytest.mark.parametrize(
    ("text", "spans", "remark"),
    [
        ("[3.2, 5.0]", [("3.2", "5")], "brackets"),
        ("(3.2, 5.0)", [("3.2", "5")], "round brackets"),
        ("3.2 - 5.0", [("3.2", "5")], "dash"),
        ("3.2–5.0", [("3.2", "5")], "long dash, no spaces"),
        ("3.2s to 5s", [("3.2", "5")], "units"),
        ("3 seconds to 5 sec", [(3, 5)], "units in words"),
        ("[ 3s - 5s ]", [(3, 5)], "dash in brackets"),
        ("[3, 5], [7, 9]", [(3, 5), (7, 9)], "two spans"),
        ("[[3, 5], [7, 9]]", [(3, 5), (7, 9)], "a list of spans"),
        ("[(3, 5)]", [(3, 5)], "a list of one"),
        ("3 - 5, 7 - 9", [(3, 5), (7, 9)], "dashes and a comma"),
        ("3 - 5; 7 - 9 and 11 - 13", [(3, 5), (7, 9), (11, 13)], "other dividers"),
        ("[7, 9], and\n[3, 5]", [(7, 9), (3, 5)], "any order"),
        ("3 - 5\n\n7 - 9", [(3, 5), (7, 9)], "lines"),
        ("[3, 5], [4, 9]", [(3, 5), (4, 9)], "overlapping"),
        ("[3, 3]", [(3, 3)], "an instant"),
        ("[0, 999999999]", [(0, 999999999)], "nine digits"),
        ("[3, 5", None, "not closed"),
        ("3, 5]", None, "not opened"),
        ("[3, 5)", None, "brackets of two sorts"),
        ("[[3, 5], [7, 9]", None, "list not closed"),
        ("3, 5", None, "a comma without brackets"),
        ("3 5", None, "no sign between"),
        ("[3, 5] [7, 9]", None, "no divider"),
        ("[3, 5, 7]", None, "three times"),
        ("3 - 5 - 7", None, "three times with dashes"),
        ("[3, 5],", None, "a divider at the end"),
        ("[5, 3]", None, "ends before it starts"),
        ("[3, 5], [9, 7]", None, "one of two ends before it starts"),
        ("[-3, 5]", None, "negative"),
        ("[nan, 5]", None, "nan"),
        ("[0, inf]", None, "infinity"),
        ("[0, 1e9]", None, "power of ten"),
        ("[0, 1000000000]", None, "ten digits"),
        ("[0, 1.0123456789]", None, "ten decimals"),
        ("0:03 - 0:05", None, "minutes and seconds"),
        ("[3m, 5m]", None, "another unit"),
        ("from 3 to 5", None, "a word before"),
        ("at [3, 5]", None, "words before"),
        ("[3, 5].", None, "a full stop"),
        ("[٣, ٥]", None, "digits of another script"),
        ("[]", None, "empty list"),
        ("", None, "empty"),
        ("3", None, "one time"),
    ],
)
def test_span_grammar(text: str, spans: list[tuple[Any, Any]] | None, remark: str) -> None:
    expected = None if spans is None else [(Fraction(start), Fraction(end)) for start, end in spans]
    assert parse_spans(text) == expected, remark


def test_no_text_makes_the_span_parser_fail() -> None:
    random_ = random.Random(0)
    pieces = ["[", "]", "3", "3", "5.5", "-", "–", "to", "s", ",", "and", " ", "\n", ".", "(", ")", "9" * 9, "\0", "é"]
    parsed = 0
    for _ in range(20_000):
        spans = parse_spans("".join(random_.choices(pieces, k=random_.randrange(12))))
        parsed += spans is not None
        assert spans is None or all(0 <= start <= end for start, end in spans)
    assert parsed > 10, "some are spans"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("piece", ["[3, 5], ", "[3", " ", "[", "3 - 5 and ", "3 to ", "9", "\n", "s", "[3, 5]\n"])
def test_the_span_parser_is_linear_on_hostile_input(piece: str) -> None:
    hostile = piece * (200_000 // len(piece))
    for text in (hostile, f"[3{hostile}", f"3 {hostile}- 5", f"[{hostile}]", f"3 - 5{hostile}x"):
        parse_spans(text)
        assert temporal_iou_reward([timed(text)], [[(0, 1)]], "grounded")[0] < 1


TRUE = [(0.0, 2.0), (6.0, 8.0)]


@pytest.mark.parametrize(
    ("text", "response_format", "reward", "remark"),
    [
        (answered("[0, 2], [6, 8]"), None, 1.0, "both spans, in the answer"),
        (answered("0s - 2s and 6s - 8s"), "answer", 1.0, "written otherwise"),
        (answered("[0, 1], [1, 2], [6, 8]"), "answer", 1.0, "cut into pieces"),
        (answered("[0, 2]"), None, 0.5, "one of two"),
        (answered("[0, 8]"), None, 0.5, "with the gap"),
        (answered("[3, 5]"), None, 0.0, "in the gap"),
        (answered("[1, 1]"), None, 0.0, "an instant"),
        (answered("[2, 0]"), None, 0.0, "the wrong way round"),
        (answered("[0, 2] I think"), None, 0.0, "more than spans"),
        ("[0, 2], [6, 8]", None, 0.0, "right, but without the tags"),
        ("", None, 0.0, "nothing"),
        (timed("[0, 2], [6, 8]"), "grounded", 1.0, "both spans, in the time"),
        (timed("[0, 2]", "[6, 8]"), "grounded", 0.5, "spans in the answer do not count there"),
        (timed("[0, 2], [6, 8]"), None, 0.0, "a time where none was asked for"),
        (answered("[0, 2], [6, 8]"), "grounded", 0.0, "no time where one was asked for"),
    ],
)
def test_temporal_iou_reward(text: str, response_format: str | None, reward: float, remark: str) -> None:
    assert temporal_iou_reward([text], [TRUE], response_format) == [reward], remark
    conversation = [{"role": "assistant", "content": text}]
    assert temporal_iou_reward(completions=[conversation], spans=[TRUE], response_format=[response_format]) == [reward]


def test_format_and_accuracy_follow_the_format_of_each_row() -> None:
    plain, grounded = answered("B"), timed("[3, 5]")
    completions, formats = [plain, grounded, plain, grounded, ""], ["answer", "grounded", "grounded", None, "grounded"]
    assert format_reward(completions, formats) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert format_reward([plain, grounded], "grounded") == [0.0, 1.0]
    assert accuracy_reward(completions, ["B"] * 5, "letter", response_format=formats) == [1.0, 1.0, 0.0, 0.0, 0.0]
    rewards = temporal_iou_reward(completions, [[(3, 5)]] * 5, formats, prompts=["p"] * 5, answer=["B"] * 5)
    assert rewards == [0.0, 1.0, 0.0, 0.0, 0.0]
    assert temporal_iou_reward([], []) == []


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({}, "add a column `spans`"),
        ({"spans": [[(0, 1)]]}, "`spans` has 1 entries for 2 completions"),
        ({"spans": "01"}, "`spans` is str: it must be a list"),
        ({"spans": [[(0, 1)], None]}, "temporal_iou_reward, row 1: `spans` is None: it must be a list"),
        ({"spans": [[(0, 1)], []]}, r"row 1: `spans` is \[\], which covers no time"),
        ({"spans": [[(0, 1)], [(4, 4)]]}, r"row 1: `spans` is \[\(4, 4\)\], which covers no time"),
        ({"spans": [[(0, 1)], [(4, 3)]]}, r"row 1: `spans`: \(4, 3\) ends before it starts"),
        ({"spans": [[(0, 1)], [(4, float("nan"))]]}, r"row 1: `spans`: \(4, nan\) is not a pair of finite"),
        ({"spans": [[(0, 1)], [4, 5]]}, "row 1: `spans`: 4 is not a pair of start and end"),
        ({"spans": [[(0, 1)], [(0, "x")]]}, "row 1: `spans`:"),
        ({"spans": [[(0, 1)]] * 2, "response_format": ["answer"]}, "`response_format` has 1 entries"),
        ({"spans": [[(0, 1)]] * 2, "response_format": ["answer", "json"]}, "row 1: `response_format` is 'json'"),
    ],
)
def test_a_wrong_dataset_is_refused_with_row_and_column(columns: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        temporal_iou_reward([answered("[0, 1]"), "not even parsed"], **columns)
