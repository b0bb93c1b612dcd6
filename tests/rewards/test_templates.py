"""The prompt and its parser: a table, a slow oracle on random strings, and hostile input."""

from __future__ import annotations

import random
import re

import pytest

from appo.rewards.templates import (
    INSTRUCTION,
    ParsedResponse,
    answer_letter,
    build_messages,
    lettered,
    normalize_words,
    option_texts,
    parse_response,
)
from appo.types import VideoQA, VideoSource

GOOD = "<think>a red ball</think><answer>B</answer>"


def text_of(qa: VideoQA, **kwargs: str) -> str:
    return build_messages(qa, **kwargs)[0]["content"][-1]["text"]


def test_messages_of_a_video_question() -> None:
    qa = VideoQA("1", VideoSource("clip.mp4"), "What falls?", "B", "letter", ("a cup", "a ball"))
    assert build_messages(qa, instruction="Think.") == [
        {
            "role": "user",
            "content": [
                {"type": "video", "video": "clip.mp4"},
                {"type": "text", "text": "What falls?\nA. a cup\nB. a ball\nThink."},
            ],
        }
    ]


def test_messages_with_an_image_beside_or_instead_of_the_video() -> None:
    both = build_messages(VideoQA("1", VideoSource("clip.mp4"), "Where?", "left", image="map.png"))[0]["content"]
    assert [part["type"] for part in both] == ["video", "image", "text"]
    assert both[1] == {"type": "image", "image": "map.png"}
    image_only = build_messages(VideoQA("1", None, "Where?", "left", image="map.png"))[0]["content"]
    assert [part["type"] for part in image_only] == ["image", "text"]
    with pytest.raises(ValueError, match="question 'q7' has neither"):
        build_messages(VideoQA("q7", None, "Where?", "left"))


def test_the_instruction_can_be_left_out() -> None:
    qa = VideoQA("1", VideoSource("clip.mp4"), "What falls?", "ball")
    assert text_of(qa, instruction="") == "What falls?"
    assert text_of(qa) == f"What falls?\n{INSTRUCTION}"


def test_the_default_instruction_asks_for_what_the_parser_reads() -> None:
    positions = [INSTRUCTION.index(tag) for tag in ("<think>", "</think>", "<answer>", "</answer>")]
    assert positions == sorted(positions)


@pytest.mark.parametrize(
    ("options", "shown", "texts", "remark"),
    [
        (("cup", "ball"), ["A. cup", "B. ball"], ["cup", "ball"], "lettered by us"),
        (("A. cup", "B. ball"), ["A. cup", "B. ball"], ["cup", "ball"], "lettered already"),
        (("(A) cup", "(B) ball"), ["(A) cup", "(B) ball"], ["cup", "ball"], "in brackets"),
        (("A) cup", "B: ball"), ["A) cup", "B: ball"], ["cup", "ball"], "mixed signs"),
        (("B. cup", "A. ball"), ["A. B. cup", "B. A. ball"], ["B. cup", "A. ball"], "not in order: no letters"),
        (("A. cup", "ball"), ["A. A. cup", "B. ball"], ["A. cup", "ball"], "one alone is no lettering"),
        (("A cup", "B ball"), ["A. A cup", "B. B ball"], ["A cup", "B ball"], "an article is no letter"),
        ((), [], [], "no options"),
    ],
)
def test_lettering(options: tuple[str, ...], shown: list[str], texts: list[str], remark: str) -> None:
    assert lettered(options) == shown, remark
    assert option_texts(options) == texts, remark


def test_too_many_options() -> None:
    assert lettered([str(i) for i in range(26)])[-1] == "Z. 25"
    with pytest.raises(ValueError, match="27 options"):
        lettered([str(i) for i in range(27)])


@pytest.mark.parametrize(
    ("text", "expected", "remark"),
    [
        (GOOD, ("a red ball", "B"), "plain"),
        (f" \n\t{GOOD}\r\n ", ("a red ball", "B"), "white space around"),
        ("<think> a </think> \n <answer> B </answer>", ("a", "B"), "white space between and inside"),
        ("<think></think><answer>B</answer>", ("", "B"), "empty thought is allowed"),
        ("<think>a\n\nb</think><answer>two\nlines</answer>", ("a\n\nb", "two\nlines"), "line breaks"),
        ("<think>日本 é</think>\u3000<answer>赤い🎈</answer>", ("日本 é", "赤い🎈"), "unicode, wide space between"),
        ("<think>a\0b</think><answer>\0B</answer>", ("a\0b", "\0B"), "NUL is a character"),
        ("<think>1 < 2 > 0 </b></think><answer><B></answer>", ("1 < 2 > 0 </b>", "<B>"), "other tags are text"),
        ("<think><THINK></think><answer>B</answer>", ("<THINK>", "B"), "upper case is text too"),
        (f"<think>{'x' * 1_000_000}</think><answer>B</answer>", ("x" * 1_000_000, "B"), "1 MB"),
        ("", None, "empty"),
        ("B", None, "no tags"),
        ("<answer>B</answer>", None, "no thought"),
        ("<think>a</think>", None, "no answer"),
        ("<think>a</think><answer></answer>", None, "empty answer"),
        ("<think>a</think><answer> \n\t</answer>", None, "blank answer"),
        ("<think>a<answer>B</answer>", None, "thought not closed"),
        ("<think>a</think><answer>B", None, "answer not closed"),
        ("a</think><answer>B</answer>", None, "thought not opened"),
        ("<think>a</think>B</answer>", None, "answer not opened"),
        ("<answer>B</answer><think>a</think>", None, "out of order"),
        ("</think>a<think><answer>B</answer>", None, "closed before opened"),
        ("<think>a</think></answer>B<answer>", None, "answer closed before opened"),
        ("<think>a<answer>B</answer></think>", None, "nested"),
        ("<think>a<answer></think>B</answer>", None, "interleaved"),
        ("<think>a</think><think>b</think><answer>B</answer>", None, "two thoughts"),
        ("<think>a</think><answer>B</answer><answer>C</answer>", None, "two answers"),
        ("<think><think>a</think></think><answer>B</answer>", None, "nested thoughts"),
        ("<think>a</think><answer><answer>B</answer></answer>", None, "nested answers"),
        ("<think>say <answer> next</think><answer>B</answer>", None, "a tag quoted in the thought"),
        (f"Sure! {GOOD}", None, "text before"),
        (f"{GOOD} That is all.", None, "text after"),
        (f"{GOOD}<|im_end|>", None, "a special token after"),
        ("<think>a</think>so<answer>B</answer>", None, "text between"),
        ("<THINK>a</THINK><ANSWER>B</ANSWER>", None, "tags in upper case"),
        ("< think>a</think><answer>B</answer>", None, "a space in a tag"),
        ("<think>a</think>\0<answer>B</answer>", None, "NUL between is text"),
        (f"\ufeff{GOOD}", None, "a byte order mark is text"),
        ("<think>a</think><answer>B</answer", None, "last sign missing"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 40 and "<" not in value else "",
)
def test_parser_table(text: str, expected: tuple[str, str] | None, remark: str) -> None:
    assert parse_response(text) == (ParsedResponse(*expected) if expected else None), remark


def slow_parse(text: str) -> ParsedResponse | None:
    """The contract written a second way: a walk over the text's tags and what lies between them."""
    pieces = re.split(r"(</?(?:think|answer)>)", text)
    if pieces[1::2] != ["<think>", "</think>", "<answer>", "</answer>"]:
        return None
    before, think, between, answer, after = (piece.strip() for piece in pieces[0::2])
    if before or between or after or not answer:
        return None
    return ParsedResponse(think, answer)


def test_parser_agrees_with_the_oracle_on_random_strings() -> None:
    random_ = random.Random(0)
    tags = ["<think>", "</think>", "<answer>", "</answer>"]
    junk = ["", " ", "\n", "\0", "B", "é", "\u3000", "\x1c", "<", ">", "/", "<think", "answer>", "</", "<ANSWER>"]
    accepted = 0
    for step in range(100_000):
        if step % 2:  # anything at all
            text = "".join(random_.choices(tags + junk, k=random_.randrange(12)))
        else:  # near a good one: junk between the tags, sometimes one piece lost
            pieces = [random_.choice([*junk[:4], random_.choice(junk)]) for _ in range(5)]
            whole = [piece for pair in zip(pieces, [*tags, ""], strict=True) for piece in pair]
            if random_.random() < 0.3:
                del whole[random_.randrange(len(whole))]
            text = "".join(whole)
        parsed = parse_response(text)
        assert parsed == slow_parse(text), repr(text)
        accepted += parsed is not None
    assert 1_000 < accepted < 90_000, "both outcomes must be common"


@pytest.mark.timeout(60)  # a second or so when linear; quadratic would take days
@pytest.mark.parametrize(
    "piece", ["<think>", "</think>", "<think", "<", " ", "<think></think>", "<think> </think> <answer>", "<answer"]
)
def test_parser_is_linear_on_hostile_input(piece: str) -> None:
    hostile = piece * (10_000_000 // len(piece))
    for text in (hostile, f"<think>{hostile}</think><answer>{hostile}", f"{hostile}</answer>"):
        assert parse_response(text) is None
    hidden = parse_response(f"<think>a</think><answer>{'<thin' * 2_000_000}</answer>")
    assert hidden is not None
    assert len(hidden.answer) == 10_000_000
    assert answer_letter(hidden.answer, ["x"]) is None


OPTIONS = ("a red cup", "a blue ball", "nothing")


@pytest.mark.parametrize(
    ("answer", "options", "expected", "remark"),
    [
        ("B", OPTIONS, "B", "letter"),
        ("b", OPTIONS, "B", "in lower case"),
        (" (B) ", OPTIONS, "B", "in brackets"),
        ("(b).", OPTIONS, "B", "in brackets, with a full stop"),
        ("B.", OPTIONS, "B", "with a full stop"),
        ("B)", OPTIONS, "B", "half a bracket"),
        ("B:", OPTIONS, "B", "with a colon"),
        ("B. a blue ball", OPTIONS, "B", "letter and text"),
        ("(B) A blue ball.", OPTIONS, "B", "letter and text in other case"),
        ("B: the ball", OPTIONS, "B", "letter and another wording"),
        ("B. a red cup", OPTIONS, None, "letter and text contradict"),
        ("a blue ball", OPTIONS, "B", "text"),
        ("A  Blue BALL!", OPTIONS, "B", "text in other case, white space and punctuation"),
        ("ball", OPTIONS, None, "part of a text"),
        ("A red", OPTIONS, None, "an article is no letter"),
        ("D", OPTIONS, None, "beyond the options"),
        ("D. none", OPTIONS, None, "beyond the options, with text"),
        ("B or C", OPTIONS, None, "two letters"),
        ("B, C", OPTIONS, None, "two letters with a comma"),
        ("AB", OPTIONS, None, "two letters in one"),
        ("", OPTIONS, None, "empty"),
        ("é", OPTIONS, None, "not a Latin capital"),
        ("Ⓑ", OPTIONS, None, "nor a look-alike"),
        ("B", ("A. cup", "B. ball"), "B", "lettered options"),
        ("ball", ("A. cup", "B. ball"), "B", "text of a lettered option"),
        ("B. ball", ("A. cup", "B. ball"), "B", "the lettered option itself"),
        ("a.m.", ("p.m.", "a.m."), "B", "text that looks like a letter"),
        ("cup", ("cup", "Cup."), None, "the text of two options"),
        ("B", ("B", "A"), "B", "letters win over texts that are letters"),
        ("Q", (), "Q", "no options: any letter"),
        ("Q. why", (), "Q", "no options: any letter with text"),
        ("why", (), None, "no options: no text"),
    ],
)
def test_answer_letter(answer: str, options: tuple[str, ...], expected: str | None, remark: str) -> None:
    assert answer_letter(answer, options) == expected, remark


def test_every_shown_option_names_its_letter() -> None:
    options = [f"choice number {i}" for i in range(26)]
    for option, shown, letter in zip(options, lettered(options), "ABCDEFGHIJKLMNOPQRSTUVWXYZ", strict=True):
        for answer in (option, shown, letter, letter.lower(), f"({letter})", f"{letter}.", f"{letter}. {option}"):
            assert answer_letter(answer, options) == letter


@pytest.mark.parametrize(
    ("text", "expected"),
    [(" The  Red\nBall. ", "the red ball"), ("STRASSE", "strasse"), ("3.5", "3.5"), ("?!", "?!"), ("", "")],
)
def test_normalize_words(text: str, expected: str) -> None:
    assert normalize_words(text) == expected
    assert normalize_words(expected) == expected
