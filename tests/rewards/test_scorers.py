"""Kinds of answers: tables of valid, invalid and mixed, oracles written another way, and a fuzz of all kinds."""

from __future__ import annotations

import math
import random
from collections import Counter
from fractions import Fraction
from functools import cache

import pytest

from appo.rewards.scorers import (
    KINDS,
    Quantity,
    mean_relative_accuracy,
    parse_number,
    relative_closeness,
    word_error_rate,
)


@pytest.mark.parametrize(
    ("text", "value", "unit", "remark"),
    [
        ("3", 3, "", "whole"),
        (" 3.50 ", "3.5", "", "decimals and white space"),
        (".5", "0.5", "", "no whole part"),
        ("-7", -7, "", "negative"),
        ("−7", -7, "", "the typographic minus sign"),
        ("+7", 7, "", "plus"),
        ("1,234,567.8", "1234567.8", "", "thousands"),
        ("1234567", 1234567, "", "no separators"),
        ("1.5e3", 1500, "", "power of ten"),
        ("2E-2", "0.02", "", "negative power"),
        ("3.", 3, "", "closing full stop"),
        ("50%", 50, "%", "percent is a unit, it does not divide"),
        ("50 percent", 50, "%", "in words"),
        ("$1,200", 1200, "$", "currency"),
        ("-$5.25", "-5.25", "$", "negative currency"),
        ("20°C", 20, "°c", "degrees"),
        ("3 chairs", 3, "chair", "what is counted"),
        ("12 Seconds.", 12, "s", "unit in other words, closing full stop"),
        ("12s", 12, "s", "unit at once"),
        ("12 m²", 12, "m2", "squared"),
        ("12 m^2", 12, "m2", "squared, typed"),
        ("12 square meters", 12, "m2", "squared, in words"),
        ("60 km/h", 60, "km/h", "quotient"),
        ("1e5", 100000, "", "a power, not a unit e5"),
    ],
)
def test_numbers(text: str, value: str | int, unit: str, remark: str) -> None:
    assert parse_number(text) == Quantity(Fraction(value), unit), remark


@pytest.mark.parametrize(
    ("text", "remark"),
    [
        ("", "empty"),
        ("chair", "no number"),
        ("-", "a sign only"),
        (".", "a point only"),
        ("%", "a unit only"),
        ("three", "a number word"),
        ("about 3", "a word before"),
        ("it is 3", "a sentence"),
        ("3 or 4", "two numbers"),
        ("3 4", "two numbers, no word"),
        ("3-4", "a range"),
        ("1/2", "a fraction"),
        ("3½", "a fraction sign"),
        ("1,5", "a decimal comma"),
        ("12,34,567", "groups of two"),
        ("1.2.3", "two points"),
        ("3 million", "a number word behind"),
        ("nan", "nan"),
        ("inf", "infinity"),
        ("1e999", "beyond all measure"),
        ("٣", "digits of another script"),
        ("0x10", "hexadecimal"),
        ("1_000", "Python's separator"),
        ("9" * 65, "longer than any number asked for"),
        ("3\n4", "two lines"),
        ("--3", "two signs"),
        ("3 very small chairs", "more than a unit"),
    ],
)
def test_what_is_no_number(text: str, remark: str) -> None:
    assert parse_number(text) is None, remark
    for kind in ("number", "regression", "mra"):
        assert KINDS[kind]("3", ())(text) == 0.0, remark
        with pytest.raises(ValueError, match="which is not a number"):
            KINDS[kind](text, ())


LONG = "the man opens the door and walks into the red house"


@pytest.mark.parametrize(
    ("kind", "gold", "answer", "score", "remark"),
    [
        ("number", "3", "3", 1.0, "equal"),
        ("number", "3", "3.0", 1.0, "equal, written otherwise"),
        ("number", "0.333", "0.33", 1.0, "equal at two decimals"),
        ("number", "0.33", "0.34", 0.0, "not equal at two decimals"),
        ("number", "1200", "1,200", 1.0, "thousands"),
        ("number", "12.5%", "12.5", 1.0, "gold has a unit, the answer has none"),
        ("number", "5", "5 chairs", 1.0, "the answer has a unit, gold has none"),
        ("number", "5 seconds", "5s", 1.0, "the same unit"),
        ("number", "5 m", "5 cm", 0.0, "another unit"),
        ("number", "0.5", "50%", 0.0, "percent is not converted"),
        ("number", "-3", "3", 0.0, "the sign counts"),
        ("number", "0", "-0", 1.0, "zero has no sign"),
        ("ocr", "EXIT", "EXIT", 1.0, "equal"),
        ("ocr", "EXIT", "exit", 0.0, "case counts"),
        ("ocr", "no  entry\nhere", "no entry here", 1.0, "white space does not"),
        ("ocr", "no entry here now", "no entry there now", 0.75, "one of four words replaced"),
        ("ocr", "no entry here now", "no entry now", 0.75, "one deleted"),
        ("ocr", "no entry here now", "no entry in here now", 0.75, "one inserted"),
        ("ocr", "no entry", "a b c d e f g", 0.0, "clipped at 0"),
        ("ocr", "stop", "stop stop", 0.0, "as many errors as words"),
        ("text", LONG, LONG.upper() + "!", 1.0, "equal but for case and punctuation"),
        ("text", LONG, "zebra", 0.0, "nothing in common"),
        ("text", "red house", "house red", 0.5, "both words, no pair, half in order: (1 + 0 + 1/2) / 3"),
        ("text", "doors opening", "door opened", 1.0, "stems are compared"),
        ("text", "house", "house", 2 / 3, "one word has no pairs: the published measure"),
        ("text", "house", "", 0.0, "no words"),
        ("text", "house", "家", 0.0, "no ASCII"),
        ("regression", "10", "10", 1.0, "equal"),
        ("regression", "10", "9", 0.9, "a tenth below"),
        ("regression", "10", "11", 0.9, "a tenth above"),
        ("regression", "-10", "-9", 0.9, "negative"),
        ("regression", "10", "25", 0.0, "more than all off: clipped"),
        ("regression", "0", "0.00", 1.0, "gold is 0, answer too"),
        ("regression", "0", "0.001", 0.0, "gold is 0, answer is not"),
        ("mra", "10", "10", 1.0, "equal"),
        ("mra", "10", "9.5", 1.0, "exactly at the last threshold"),
        ("mra", "10", "11", 0.9, "exactly at theta = .9, which floats miss"),
        ("mra", "10", "9.4", 0.9, "just beyond the last threshold"),
        ("mra", "10", "5", 0.1, "half: the first threshold only"),
        ("mra", "10", "15", 0.1, "half too much"),
        ("mra", "10", "4.99", 0.0, "beyond every threshold"),
        ("mra", "2.0", "2.0 meters", 1.0, "with its unit"),
        ("mra", "0", "0", 1.0, "gold is 0, answer too"),
        ("mra", "0", "1", 0.0, "gold is 0, answer is not"),
        ("letter", "B", "(b)", 1.0, "letter"),
        ("word", "red ball", "Red  ball.", 1.0, "words"),
    ],
)
def test_kinds(kind: str, gold: str, answer: str, score: float, remark: str) -> None:
    assert KINDS[kind](gold, ())(answer) == pytest.approx(score, abs=1e-12), remark


def test_a_gold_answer_that_rouge_cannot_read_is_refused() -> None:
    with pytest.raises(ValueError, match="ASCII letters and digits only"):
        KINDS["text"]("赤い家", ())


def test_mra_and_regression_are_their_formulas() -> None:
    random_ = random.Random(0)
    thetas = [Fraction(1, 2) + Fraction(step, 20) for step in range(10)]
    for _ in range(5_000):
        true = Fraction(random_.randrange(1, 400), random_.choice([1, 10, 20, 100]))
        predicted = true * Fraction(random_.randrange(0, 42), 20) if random_.random() < 0.5 else Fraction(
            random_.randrange(400), random_.choice([1, 10, 100])
        )  # fmt: skip
        passed = [abs(predicted - true) <= (1 - theta) * true for theta in thetas]
        assert mean_relative_accuracy(predicted, true) == float(Fraction(sum(passed), 10))
        assert relative_closeness(predicted, true) == float(max(Fraction(0), (true - abs(predicted - true)) / true))


def test_word_error_rate_is_the_recursive_edit_distance() -> None:
    @cache
    def distance(one: tuple[str, ...], other: tuple[str, ...]) -> int:
        if not one or not other:
            return len(one) + len(other)
        if one[0] == other[0]:
            return distance(one[1:], other[1:])
        return 1 + min(distance(one[1:], other), distance(one, other[1:]), distance(one[1:], other[1:]))

    random_ = random.Random(0)
    for _ in range(3_000):
        predicted, true = (tuple(random_.choices("abc", k=random_.randrange(8))) for _ in range(2))
        if true:
            assert word_error_rate(predicted, true) == Fraction(distance(predicted, true), len(true))
            clipped = max(0.0, 1 - distance(predicted, true) / len(true))
            assert KINDS["ocr"](" ".join(true), ())(" ".join(predicted)) == pytest.approx(clipped, abs=1e-12)


def test_rouge_is_n_grams_and_the_longest_common_subsequence() -> None:
    """Lin 2004, written out, on words that are their own stems."""

    def f1(common: int, predicted: int, true: int) -> float:
        return 2 * common / (predicted + true) if common else 0.0

    def grams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    def longest(one: list[str], other: list[str]) -> int:
        if not one or not other:
            return 0
        if one[0] == other[0]:
            return 1 + longest(one[1:], other[1:])
        return max(longest(one[1:], other), longest(one, other[1:]))

    random_ = random.Random(0)
    for _ in range(500):
        one, other = (random_.choices(["cup", "ball", "red"], k=random_.randrange(1, 7)) for _ in range(2))
        scores = [f1(longest(one, other), len(one), len(other))]
        for n in (1, 2):
            both = grams(one, n) & grams(other, n)
            scores.append(f1(both.total(), max(0, len(one) + 1 - n), max(0, len(other) + 1 - n)))
        assert KINDS["text"](" ".join(other), ())(" ".join(one)) == pytest.approx(sum(scores) / 3, abs=1e-12)


GOLD = {
    "letter": "B",
    "word": "red",
    "number": "3.5",
    "ocr": "no entry",
    "text": LONG,
    "regression": "0",
    "mra": "7",
}
PIECES = [
    "B", "(b)", "red", "ball", "no", "entry", "3", "3.5", "-", "+", ".", ",", "1,000", "e", "e99", "e-99", "E5",
    "%", "$", "°", "m^2", "nan", "inf", "½", "²", "٣", "−", " ", "  ", "\n", "\t", "\0", "\ud800", "é", "日本", "🎈",
    "\u3000", "A.", "oed", "sses", "ying", "<b>", "[", "]", "9" * 30, "0" * 30, "/", " per ", "square ", "𝟛", "ﬁ", "İ",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_no_answer_makes_a_kind_fail(kind: str) -> None:
    assert set(GOLD) == set(KINDS)
    random_ = random.Random(kind)
    compare = KINDS[kind](GOLD[kind], ())
    seen = set()
    for _ in range(20_000):
        answer = "".join(random_.choices(PIECES, k=random_.randrange(7)))
        score = compare(answer)
        assert isinstance(score, float)
        assert 0.0 <= score <= 1.0, repr(answer)
        seen.add(score)
    assert len(seen) > 1, "some are right, some are wrong"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("piece", ["9", ",", " ", "a ", "1,", "e", "é", "$", "\n"])
def test_kinds_are_quick_on_hostile_answers(piece: str) -> None:
    hostile = piece * (1_000_000 // len(piece))
    for kind in set(KINDS) - {"text"}:
        assert KINDS[kind](GOLD[kind], ())(hostile) == 0.0
    assert 0 <= KINDS["text"]("red ball", ())(hostile) < 1e-3


def test_every_kind_is_right_about_its_own_gold_answer() -> None:
    for kind, gold in GOLD.items():
        assert math.isclose(KINDS[kind](gold, ())(gold), 1.0), kind
