"""Reading of answers: a table a forgiving reader would sign, what must hold for any text, and versions."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appo.rewards.answer_parsing import lenient_answer, strict_answer
from appo.rewards.functions import score_answer
from appo.rewards.scorers import KINDS
from appo.rewards.templates import FORMATS, parse_spans
from appo.types import VideoQA, VideoSource

VIDEO = VideoSource("x.mp4")

CHOICE = VideoQA("1", VIDEO, "What falls?", "B", "letter", ("a red cup", "a blue ball", "the cup", "nothing"))
NUMBER = VideoQA("2", VIDEO, "How many?", "12", "number")
METERS = VideoQA("3", VIDEO, "How far?", "3.5", "mra")
WORD = VideoQA("4", VIDEO, "Where to?", "left")
SIDE = VideoQA("5", VIDEO, "Where to?", "left", "word", ("left", "right"))
SIGN = VideoQA("6", VIDEO, "What does it say?", "No entry.", "ocr")
STORY = VideoQA("7", VIDEO, "What happens?", "He opens the door. Then he leaves.", "text")
TIMED = replace(CHOICE, id="8", spans=((1.0, 4.0),))
QUESTIONS = (CHOICE, NUMBER, METERS, WORD, SIDE, SIGN, STORY, TIMED)

# question, response, the answer that a forgiving reader takes, remark
TABLE = [
    (CHOICE, "<think>a</think><answer>B</answer>", "B", "as asked for"),
    (CHOICE, "<answer>B</answer>", "B", "no thought"),
    (CHOICE, "<think>a<answer>B</answer>", "B", "thought not closed"),
    (CHOICE, "<think>a</think><answer>B", "B", "answer not closed"),
    (CHOICE, "<think>a</think><answer>B<answer>", "B", "closed by an opening tag"),
    (CHOICE, "<ANSWER>B</ANSWER>", "B", "tags in upper case"),
    (CHOICE, "<think>I write <answer>A</answer></think><answer>B</answer> Done.", "B", "the last one"),
    (CHOICE, "<answer>B</answer><answer> </answer>", "B", "the last one with anything in it"),
    (CHOICE, "<think>A, C?</think>B", "B", "behind the thought"),
    (CHOICE, "<think>It is B", "B", "cut off while thinking, with one letter"),
    (CHOICE, "B", "B", "a letter alone"),
    (CHOICE, "b.", "b.", "read as it is"),
    (CHOICE, "**B**", "B", "bold"),
    (CHOICE, "B. a blue ball", "B. a blue ball", "read as it is"),
    (CHOICE, "The answer is B.", "B.", "in a sentence"),
    (CHOICE, "A or C? No: the answer is (B), because it falls.", "(B), because it falls.", "what it points at"),
    (CHOICE, "Not A.\n\n**Answer:** B. The rest stands.", "B. The rest stands.", "Answer:"),
    (CHOICE, "The answer is A. No, the answer is B.", "B.", "the last sentence"),
    (CHOICE, r"Thus $\boxed{B}$", "B", "boxed"),
    (CHOICE, r"<answer>\boxed{\text{B}}</answer>", "B", "boxed text in the tag"),
    (CHOICE, "I see the blue cup and a blue ball fall", "B", "the only option's text"),
    (CHOICE, "It is a red cup.", "A", "an option within another counts once"),
    (CHOICE, "It is a red cup, not the cup.", None, "two options"),
    (CHOICE, "A or B", None, "two letters"),
    (CHOICE, "B, a red cup", None, "letter and text that differ"),
    (CHOICE, "It is B: a blue ball", "B", "letter and text that agree"),
    (CHOICE, "A man drops something", None, "an article"),
    (CHOICE, "A man drops a blue ball", "B", "an article and an option's text"),
    (CHOICE, "It must be A", "A", "an A at the end is no article"),
    (CHOICE, "E", None, "a letter beyond the options"),
    (CHOICE, "T-shirt, vitamin-B, B's", None, "letters within words"),
    (CHOICE, "", None, "nothing"),
    (NUMBER, "There are 12 chairs.", "12", "the only number"),
    (NUMBER, "<answer>about 1,200</answer>", "1,200", "words before it"),
    (NUMBER, "12, that is 12 chairs", "12", "twice the same"),
    (NUMBER, "3 or 4", None, "two numbers"),
    (NUMBER, "I count 3 and 9. The answer is: 12 chairs", "12 chairs", "read as it is behind the sentence"),
    (NUMBER, "<answer>12. I see 5 and 7</answer>", "12", "the first sentence"),
    (NUMBER, "-3, I guess", "-3", "a sign"),
    (NUMBER, "3-4", None, "a range"),
    (NUMBER, "twelve", None, "a number word"),
    (METERS, "roughly 3.5 meters", "3.5", "without its unit"),
    (METERS, "<think>4 m wide</think><answer>3.5 m</answer>", "3.5 m", "read as it is"),
    (WORD, "The answer is **left**.", "left", "one word"),
    (WORD, "left. It turns there.", "left", "the first sentence"),
    (WORD, "it goes left", "it goes left", "without options nobody knows which word"),
    (SIDE, "it goes to the left side", "left", "the only option"),
    (SIDE, "leftover", "leftover", "no whole word"),
    (SIDE, "not left, right", "not left, right", "two options"),
    (SIGN, "<answer>No entry. Really", "No entry. Really", "texts are left whole"),
    (STORY, "<think>a</think><answer>The answer is: no</answer>", "The answer is: no", "in the format nothing is cut"),
    (STORY, "He opens the door. Then he leaves.", "He opens the door. Then he leaves.", "texts are left whole"),
]  # fmt: skip


@pytest.mark.parametrize(("question", "text", "answer", "remark"), TABLE)
def test_what_a_forgiving_reader_takes(question: VideoQA, text: str, answer: str | None, remark: str) -> None:
    found = lenient_answer(text, question)
    if answer is None:
        assert KINDS[question.kind](question.answer, question.options)(found.answer) == 0.0, remark
        for letter in "ABCD" if question.options else ():
            assert KINDS["letter"](letter, question.options)(found.answer) == 0.0, remark
    else:
        assert found.answer == answer, remark
    assert (found.think, found.time) == ("", "")


def test_an_option_within_the_words_of_a_longer_one_is_not_mentioned_there() -> None:
    nested = replace(CHOICE, options=("ball", "red ball", "small red ball"))
    assert [lenient_answer(text, nested).answer for text in ("It is a red ball", "a ball?")] == ["B", "A"]
    assert lenient_answer("a red ball and a ball", nested).answer == "a red ball and a ball"


@pytest.mark.parametrize(
    ("text", "time", "remark"),
    [
        ("<think>a</think><answer>B</answer><time>[1, 4]</time>", "[1, 4]", "as asked for"),
        ("<answer>B</answer><time>from 1 to 4 seconds</time>", "1 to 4 seconds", "words before it"),
        ("<time>[1, 4], then [6.5, 8]</time>", "[1, 4], [6.5, 8]", "words between"),
        ("<answer>B</answer><time>1s - 4s", "1s - 4s", "not closed"),
        ("<think>at [0, 9]?</think><answer>B</answer> seen at (1, 4)", "(1, 4)", "behind the thought, without a tag"),
        ("B, between 1 and 4 s", "", "not written as a span"),
        ("[4, 1]", "", "the wrong way round"),
        ("0:01 - 0:04", "", "minutes"),
        ("", "", "nothing"),
    ],
)
def test_what_a_forgiving_reader_takes_for_the_time(text: str, time: str, remark: str) -> None:
    assert lenient_answer(text, TIMED).time == time, remark
    assert not time or parse_spans(time)
    assert lenient_answer(text, CHOICE).time == "", "no time where none is asked for"


def test_the_strict_reading_is_the_format() -> None:
    for name, parse in FORMATS.items():
        for text in ("<think></think><answer>B</answer>", "<think></think><answer>B</answer><time>1-2</time>", "B"):
            assert strict_answer(text, name) == parse(text)
    with pytest.raises(ValueError, match="must be one of answer, grounded"):
        strict_answer("B", "json")


PIECES = [
    "<think>", "</think>", "<answer>", "</answer>", "<time>", "</time>", "<Answer>", "\\boxed{", "\\text{", "}",
    "The answer is ", "Answer:", "B", "A", "(C)", " and ", "a blue ball", "the cup", "12", "3.5", "-1", ",", ".", "\n",
    "[1, 4]", "2 to 3 s", "left", "right", "é", "\0", "٣", "**", " ",
]  # fmt: skip
junk = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=14).map("".join)
formatted = st.builds(
    "<think>{}</think><answer>{}</answer>{}".format, junk, junk, st.sampled_from(["", "<time>1-2</time>"])
)


@settings(deadline=None)  # ROUGE takes a second to load
@given(st.one_of(junk, formatted), st.sampled_from(QUESTIONS))
def test_any_text_is_read_and_never_below_the_strict_reading(text: str, question: VideoQA) -> None:
    found = lenient_answer(text, question)
    compare = KINDS[question.kind](question.answer, question.options)
    assert found.time == "" or parse_spans(found.time)
    for name in FORMATS:
        assert compare(found.answer) >= score_answer(text, question.answer, question.kind, question.options, name)
        strict = strict_answer(text, name)
        if strict and strict.time and question.spans:
            assert found.time == strict.time


@given(st.one_of(junk, formatted), st.sampled_from(QUESTIONS))
def test_the_reader_does_not_know_the_gold_answer(text: str, question: VideoQA) -> None:
    found = lenient_answer(text, question)
    for other in ("A", "C", "3.5", "right", "a blue ball", ""):
        assert lenient_answer(text, replace(question, answer=other)) == found


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "piece", [*PIECES, "<answer>B", "\\boxed{B", "answer is", "1,", "[1", "1 -", "1.", "A b", ". "]
)
def test_a_megabyte_is_read_in_linear_time(piece: str) -> None:
    text = piece * (1_000_000 // len(piece))
    lenient_answer(text, TIMED)
    lenient_answer(f"<answer>{text}", METERS)
    lenient_answer(f"<think></think><answer>{text}</answer>", SIDE)
