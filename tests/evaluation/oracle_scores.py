"""The official scores written down once more, from the datasets' papers and scripts, on what is known to be said.

Nothing of `appo` is used but `VideoQA`: responses are made from what they shall say, so no parser is needed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from random import Random
from typing import Any

from appo.types import VideoQA

OPTIONS = ("a red cup", "a blue ball", "a green box", "a dog", "nothing")


@dataclass(frozen=True)
class Said:
    """A response and what it says: a letter, a number or words, and a span; None where nothing can be read."""

    text: str
    answer: Any = None
    span: tuple[Fraction, Fraction] | None = None


Pair = tuple[VideoQA, Said | None]  # None: the prediction is missing


# --- responses ---------------------------------------------------------------------------------------------------


def wrapped(answer: str, time: str | None = None) -> str:
    return f"<think>because</think><answer>{answer}</answer>" + ("" if time is None else f"<time>{time}</time>")


def say_letter(rng: Random, options: Sequence[str], gold: str) -> tuple[str, str | None]:
    """An answer's words and the letter that they name."""
    letter = gold if rng.random() < 0.5 else rng.choice("ABCDE"[: len(options)])
    text = options["ABCDE".index(letter)]
    forms = [letter, f"({letter})", letter.lower(), f"{letter}.", f"{letter}. {text}", text, f"({letter}) {text}"]
    unreadable = ["Z", "A and B", "none of them", f"{letter} or so"]
    return (rng.choice(forms), letter) if rng.random() < 0.85 else (rng.choice(unreadable), None)


def say_number(rng: Random, gold: str) -> tuple[str, Fraction | None]:
    """An answer's words and the number that they are."""
    near = Fraction(gold) * rng.choice([Fraction(step, 20) for step in range(42)])
    value = rng.choice([near, Fraction(gold), Fraction(rng.randrange(-300, 900), rng.choice([1, 10, 100]))])
    value = Fraction(round(value * 1000), 1000)
    shown = f"{float(value):.3f}"
    forms = [shown, f"{shown} m", f"{shown}0", f"{float(value):,.3f}"]
    unreadable = ["many", "about 3", "3 or 4", "1/2", "nan"]
    return (rng.choice(forms), value) if rng.random() < 0.85 else (rng.choice(unreadable), None)


def say_words(rng: Random, gold: str) -> tuple[str, str | None]:
    words = gold.split()
    if rng.random() < 0.3:
        rng.shuffle(words)
    words = [word if rng.random() < 0.8 else rng.choice(["ball", "red", "Exit"]) for word in words]
    return (" ".join(words), " ".join(words))


def say_time(rng: Random) -> tuple[str, tuple[Fraction, Fraction] | None]:
    start = Fraction(rng.randrange(0, 80), 4)
    end = start + Fraction(rng.randrange(0, 60), 4)
    first, last = f"{float(start)}", f"{float(end)}"
    forms = [f"[{first}, {last}]", f"({first}, {last})", f"{first}s - {last}s", f"{first} to {last} seconds"]
    unreadable = ["soon", f"[{first}]", "", f"{first}, {last}"]
    return (rng.choice(forms), (start, end)) if rng.random() < 0.85 else (rng.choice(unreadable), None)


def response(rng: Random, question: VideoQA, grounded: bool) -> Said:
    """A response of the format asked for, or (one in ten) of none."""
    if question.kind == "letter":
        words, answer = say_letter(rng, question.options, question.answer)
    elif question.kind in ("number", "regression", "mra"):
        words, answer = say_number(rng, question.answer)
    else:
        words, answer = say_words(rng, question.answer)
    time, span = say_time(rng) if grounded else (None, None)
    if rng.random() < 0.1 or (grounded and span is None):
        broken = [words, f"<answer>{words}</answer>", f"{wrapped(words, time)} Done.", "", f"<think>{words}</think>"]
        return Said(rng.choice(broken) if span or not grounded else wrapped(words, time))
    return Said(wrapped(words, time), answer, span)


# --- formulas ----------------------------------------------------------------------------------------------------


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def word_errors(said: Sequence[str], true: Sequence[str]) -> int:
    table = [[i + j if not i or not j else 0 for j in range(len(true) + 1)] for i in range(len(said) + 1)]
    for i in range(1, len(said) + 1):
        for j in range(1, len(true) + 1):
            change = table[i - 1][j - 1] + (said[i - 1] != true[j - 1])
            table[i][j] = min(change, table[i - 1][j] + 1, table[i][j - 1] + 1)
    return table[-1][-1]


def rouge(said: str, true: str) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scores = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True).score(true, said)
    return mean(score.fmeasure for score in scores.values())


def reward(kind: str, said: Any, gold: str) -> float:
    """Video-R1's five rewards, VSI-Bench's MRA, and equality."""
    if said is None:
        return 0.0
    if kind == "number":
        return float(round(float(said), 2) == round(float(gold), 2))
    if kind == "regression":
        return 1 - min(1.0, abs(float(said) - float(gold)) / abs(float(gold)))
    if kind == "mra":
        error = abs(said - Fraction(gold)) / Fraction(gold)
        return mean(float(error <= 1 - Fraction(50 + 5 * step, 100)) for step in range(10))
    if kind == "ocr":
        return min(1.0, max(0.0, 1 - word_errors(said.split(), gold.split()) / len(gold.split())))
    if kind == "text":
        return rouge(said, gold)
    return float(said == gold) if kind == "letter" else float(said.lower().rstrip(".") == gold.lower().rstrip("."))


def right(pair: Pair) -> float:
    question, said = pair
    return 0.0 if said is None else reward(question.kind, said.answer, question.answer)


def grouped(pairs: Sequence[Pair], name: Callable[[VideoQA], str | None]) -> dict[str, list[float]]:
    groups = defaultdict(list)
    for pair in pairs:
        if (key := name(pair[0])) is not None:
            groups[key].append(right(pair))
    return groups


def overall_and(pairs: Sequence[Pair], headline: str, *names: Callable[[VideoQA], str | None]) -> dict[str, float]:
    groups = {key: values for name in names for key, values in grouped(pairs, name).items()}
    return {headline: mean(map(right, pairs))} | {key: mean(values) for key, values in groups.items()}


def next_qa(pairs: Sequence[Pair]) -> dict[str, float]:
    """eval_mc.py: TP is renamed TN before anything is counted; here TP is shown by itself as well."""
    renamed = [(pair, "TN" if pair[0].metadata["type"] == "TP" else pair[0].metadata["type"]) for pair in pairs]
    scores = {"accuracy": mean(map(right, pairs))}
    for name in {kind for _, kind in renamed} | {kind[0] for _, kind in renamed}:
        scores[name] = mean(right(pair) for pair, kind in renamed if name in (kind, kind[0]))
    tp = [right(pair) for pair in pairs if pair[0].metadata["type"] == "TP"]
    return scores | ({"TP": mean(tp)} if tp else {})


def next_gqa(pairs: Sequence[Pair], *, skip: bool) -> dict[str, float]:
    """eval_ground.py: a question without a predicted span is passed over; `skip=False` counts it as wrong."""
    rows = []
    for question, said in pairs:
        if said is None or said.span is None:
            rows += [] if skip else [(0.0, 0.0, 0.0)]
            continue
        start, end = map(float, said.span)
        iou = iop = 0.0
        for true_start, true_end in question.spans:
            if start == end:
                iop = max(iop, float(true_start <= start <= true_end))
                continue
            shared = max(0.0, min(end, true_end) - max(start, true_start))
            iou = max(iou, shared / (max(end, true_end) - min(start, true_start)))
            iop = max(iop, shared / (end - start))
        rows.append((iou, iop, float(said.answer == question.answer)))
    answered = [pair for pair in pairs if pair[1] is not None] if skip else pairs
    return {
        "mIoU": mean(iou for iou, _, _ in rows),
        "mIoP": mean(iop for _, iop, _ in rows),
        **{f"IoU@{limit}": mean(float(iou >= limit) for iou, _, _ in rows) for limit in (0.3, 0.5)},
        **{f"IoP@{limit}": mean(float(iop >= limit) for _, iop, _ in rows) for limit in (0.3, 0.5)},
        "Acc@QA": mean(map(right, answered)),
        "Acc@GQA": mean(float(iop >= 0.5 and correct == 1) for _, iop, correct in rows),
    }


def vsi_bench(pairs: Sequence[Pair]) -> dict[str, float]:
    """Mean of each question type; direction is the mean of its levels; overall the mean of the tasks."""
    types = {name: mean(values) for name, values in grouped(pairs, lambda one: one.metadata["question_type"]).items()}
    levels = [value for name, value in types.items() if name.startswith("object_rel_direction")]
    tasks = {name: value for name, value in types.items() if not name.startswith("object_rel_direction")}
    tasks |= {"object_rel_direction": mean(levels)} if levels else {}
    return {"score": mean(tasks.values())} | tasks
