"""Kinds of answers: how each is compared with the gold answer, from 0 to 1, in training and evaluation alike.

Letters and words are right or wrong; the other kinds are those of Video-R1 (``number``, ``ocr``, ``text``,
``regression``) and of VSI-Bench (``mra``). A kind takes gold answer and options, raises ValueError for what cannot be
scored, and returns the comparison of one answer, which never raises.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

from appo.rewards.templates import answer_letter, normalize_words, option_texts

Comparison = Callable[[str], float]
GRADED = ("ocr", "text", "regression", "mra")  # kinds whose score may lie between 0 and 1

_LONGEST_NUMBER = 64
_WORD = r"(?!hundred|thousand|million|billion|trillion|dozen)[A-Za-zµμ]+(?:\^?[23]|[²³])?"
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)(?P<currency>[$€£¥]?)"
    r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?P<decimals>\.[0-9]+)?(?:[eE](?P<power>[+-]?[0-9]{1,2}))?"
    rf"\s*(?P<unit>%|°[CFcf]?|(?:square |cubic )?{_WORD}(?:(?: per |/){_WORD})?)?\.?"
)
_SAME_UNIT = {
    "percent": "%", "sec": "s", "second": "s", "min": "minute", "hr": "h", "hour": "h", "meter": "m", "metre": "m",
    "centimeter": "cm", "centimetre": "cm", "kilometer": "km", "kilometre": "km", "foot": "feet", "ft": "feet",
    "square meter": "m2", "square metre": "m2", "cubic meter": "m3", "cubic metre": "m3",
}  # fmt: skip


@dataclass(frozen=True)
class Quantity:
    """A number exactly as it is written, and its unit in a canonical spelling, or empty."""

    value: Fraction
    unit: str = ""


def parse_number(text: str) -> Quantity | None:
    """The one number that a text consists of, or None.

    Understood are a sign, thousands separated by commas in groups of three, a decimal point, a power of ten
    (``1.5e3``), a currency sign before and one unit behind (``%``, ``°C``, a word, ``m^2``, ``square meters``,
    ``km/h``), and a closing full stop. Nothing is converted: 50% is 50 with the unit %. Not understood are words before
    the number (``about 3``), number words (``3 million``), fractions, decimal commas (``3,5``), and nan or infinity.
    """
    text = text.strip().replace("\u2212", "-")  # the typographic minus sign
    match = _NUMBER.fullmatch(text) if len(text) <= _LONGEST_NUMBER else None
    if match is None or not (match["whole"] or match["decimals"]):
        return None
    digits = f"{match['sign']}{match['whole'].replace(',', '') or '0'}{match['decimals'] or ''}e{match['power'] or 0}"
    return Quantity(Fraction(digits), match["currency"] or _canonical_unit(match["unit"] or ""))


def _canonical_unit(unit: str) -> str:
    unit = " ".join(unit.casefold().split()).replace("²", "2").replace("³", "3").replace("^", "")
    singular = unit[:-1] if len(unit) > 3 and unit.endswith("s") else unit
    return _SAME_UNIT.get(singular, singular)


def _letter(gold: str, options: Sequence[str]) -> Comparison:
    """Right: the answer names the same option, by letter or by text."""
    letter = answer_letter(gold, options)
    if letter is None:
        among = f"among the {len(options)} options {list(options)!r}" if options else "a letter"
        raise ValueError(f"`answer` is {gold!r}, which is not {among}: correct the answer or the options")
    return lambda answer: float(answer_letter(answer, options) == letter)


def _word(gold: str, options: Sequence[str]) -> Comparison:
    """Right: the same words, but for case, white space and closing punctuation."""
    if options and normalize_words(gold) not in map(normalize_words, option_texts(options)):
        raise ValueError(f"`answer` is {gold!r}, which is not among the options {list(options)!r}")
    words = normalize_words(gold)
    return lambda answer: float(normalize_words(answer) == words)


def _numeric(score: Callable[[Fraction, Fraction], float]) -> Callable[[str, Sequence[str]], Comparison]:
    """A kind that scores (answer's value, gold value); no number, or two units that differ, score 0."""

    def kind(gold: str, options: Sequence[str]) -> Comparison:
        true = parse_number(gold)
        if true is None:
            raise ValueError(f"`answer` is {gold!r}, which is not a number: correct it, or choose another kind")

        def compare(answer: str) -> float:
            found = parse_number(answer)
            if found is None or (found.unit and true.unit and found.unit != true.unit):
                return 0.0
            return score(found.value, true.value)

        return compare

    return kind


def same_number(predicted: Fraction, true: Fraction) -> float:
    """Video-R1's ``numerical``: 1.0 if equal at two decimals.

    Its script also refuses 3.0 for 3 (one has a decimal point); here only values count.
    """
    return float(round(float(predicted), 2) == round(float(true), 2))


def relative_closeness(predicted: Fraction, true: Fraction) -> float:
    """Video-R1's ``regression``: 1 - min(1, |p - g| / |g|); where g is 0, 1.0 for exactly 0 and else 0.0."""
    return float(1 - min(Fraction(1), _relative_error(predicted, true)))


def mean_relative_accuracy(predicted: Fraction, true: Fraction) -> float:
    """VSI-Bench's MRA: the share of theta in {.50, .55, ..., .95} with |p - t| / |t| <= 1 - theta.

    Exact, so 11 for 10 reaches theta = .9; with floats, as in its script, 1 - .9 falls just short of .1. Where t is 0,
    1.0 for exactly 0 and else 0.0.
    """
    error = _relative_error(predicted, true)
    return sum(error <= 1 - Fraction(percent, 100) for percent in range(50, 100, 5)) / 10


def _relative_error(predicted: Fraction, true: Fraction) -> Fraction:
    if not true:
        return Fraction(predicted != 0)
    return abs(predicted - true) / abs(true)


def word_error_rate(predicted: Sequence[str], true: Sequence[str]) -> Fraction:
    """Fewest words inserted, deleted or replaced to get from one to the other, per true word (Levenshtein 1966)."""
    from rapidfuzz.distance import Levenshtein

    return Fraction(Levenshtein.distance(predicted, true), len(true))


def _ocr(gold: str, options: Sequence[str]) -> Comparison:
    """Video-R1's ``OCR``: 1 - WER, at least 0. Case and punctuation count, white space does not."""
    true = gold.split()

    return lambda answer: float(max(Fraction(0), 1 - word_error_rate(answer.split(), true)))


def _text(gold: str, options: Sequence[str]) -> Comparison:
    """Video-R1's ``free-form``: the mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L, on stems.

    A gold answer of one word has no pairs of words, so the same word scores 2/3: that is the published measure.
    """
    if re.search("[a-z0-9]", gold.lower()) is None:
        raise ValueError(f"`answer` is {gold!r}: ROUGE reads ASCII letters and digits only, choose another kind")

    def compare(answer: str) -> float:
        scores = _rouge().score(gold, answer)
        return min(1.0, sum(float(score.fmeasure) for score in scores.values()) / len(scores))

    return compare


@cache
def _rouge() -> Any:
    """ROUGE with its authors' settings; loaded at first use, because it takes a second."""
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


# The kinds by name: (gold answer, options) -> (answer -> score from 0 to 1).
KINDS: dict[str, Callable[[str, Sequence[str]], Comparison]] = {
    "letter": _letter,
    "word": _word,
    "number": _numeric(same_number),
    "ocr": _ocr,
    "text": _text,
    "regression": _numeric(relative_closeness),
    "mra": _numeric(mean_relative_accuracy),
}
