"""Answer and format rewards: plain functions of TRL's shape, ``f(completions, **columns) -> list[float]``.

`score_answer` is the one place that says whether an answer is right; training and evaluation both call it, so
they cannot drift. A response that is not as it should be scores 0 and never raises; a *dataset* that is not as it
should be raises, because every reward of the run would be wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from appo.prompts import answer_letter, normalize_words, option_texts, parse_response


def accuracy_reward(
    completions: Sequence[Any],
    answer: Sequence[str] | None = None,
    kind: Sequence[str | None] | str | None = None,
    options: Sequence[Sequence[str] | None] | None = None,
    **kwargs: Any,
) -> list[float]:
    """1.0 for each completion whose answer is right, else 0.0.

    Args:
        completions: texts, or conversations whose last message is the assistant's.
        answer: the dataset's column of gold answers, one a completion.
        kind: the column that says how the answer is compared (see `KINDS`), or one kind for all. Missing: ``letter``
            where there are options, else ``word``.
        options: the column of choices.
        kwargs: the dataset's other columns and what TRL adds; not used.

    Raises:
        ValueError: a column is missing, of another length, or holds what cannot be scored; names row and fix.
    """
    if answer is None:
        raise ValueError("accuracy_reward needs the gold answers: add a column `answer` to the dataset")
    rows = len(completions)
    answers = _column("answer", answer, rows)
    kinds = [kind] * rows if kind is None or isinstance(kind, str) else _column("kind", kind, rows)
    choices = [None] * rows if options is None else _column("options", options, rows)
    rewards = []
    for row in range(rows):
        text = completion_text(completions[row])
        try:
            rewards.append(score_answer(text or "", answers[row], kinds[row], choices[row] or ()))
        except ValueError as error:
            raise ValueError(f"accuracy_reward, row {row}: {error}") from None
    return rewards


def format_reward(completions: Sequence[Any], **kwargs: Any) -> list[float]:
    """1.0 for each completion that is exactly ``<think>...</think><answer>...</answer>``, else 0.0."""
    texts = map(completion_text, completions)
    return [float(text is not None and parse_response(text) is not None) for text in texts]


def score_answer(text: str, answer: str, kind: str | None = None, options: Sequence[str] = ()) -> float:
    """Whether a response answers the question: 1.0 or 0.0.

    Args:
        text: the whole response. Without a well-formed answer block it is wrong, whatever it says.
        answer: the gold answer.
        kind: how the two are compared, one of `KINDS`; None: ``letter`` if there are options, else ``word``.
        options: the choices as shown, lettered or not; empty for open questions.

    Raises:
        ValueError: gold answer, kind or options cannot be scored. The response alone never raises.
    """
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"`answer` is {answer!r}: it must be a text that is not empty")
    if isinstance(options, str) or not all(isinstance(option, str) for option in options):
        raise ValueError(f"`options` is {options!r}: it must be a list of texts, one a choice")
    if kind is None:
        kind = "letter" if options else "word"
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"`kind` is {kind!r}: it must be one of {', '.join(KINDS)}")
    is_right = KINDS[kind](answer, options)
    parsed = parse_response(text)
    return float(parsed is not None and is_right(parsed.answer))


def completion_text(completion: Any) -> str | None:
    """The text of a completion: a string, or a conversation that ends with the assistant; None if it is neither."""
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, Sequence) or isinstance(completion, bytes) or not completion:
        return None
    message = completion[-1]
    if not isinstance(message, Mapping) or message.get("role") != "assistant":
        return None
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        return None
    parts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
    return "".join(part for part in parts if isinstance(part, str)) if parts else None


def _letter_rule(gold: str, options: Sequence[str]) -> Callable[[str], bool]:
    """Right is an answer that names the same option, by letter or by text."""
    letter = answer_letter(gold, options)
    if letter is None:
        among = f"among the {len(options)} options {list(options)!r}" if options else "a letter"
        raise ValueError(f"`answer` is {gold!r}, which is not {among}: correct the answer or the options")
    return lambda answer: answer_letter(answer, options) == letter


def _word_rule(gold: str, options: Sequence[str]) -> Callable[[str], bool]:
    """Right are the same words, but for case, white space and closing punctuation."""
    if options and normalize_words(gold) not in map(normalize_words, option_texts(options)):
        raise ValueError(f"`answer` is {gold!r}, which is not among the options {list(options)!r}")
    words = normalize_words(gold)
    return lambda answer: normalize_words(answer) == words


# How an answer is compared: gold answer and options -> is this answer right?
KINDS: dict[str, Callable[[str, Sequence[str]], Callable[[str], bool]]] = {
    "letter": _letter_rule,
    "word": _word_rule,
}


def _column(name: str, values: Any, rows: int) -> Sequence[Any]:
    """A dataset column with one entry a completion."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"column `{name}` is {type(values).__name__}: it must be a list, one entry a completion")
    if len(values) != rows:
        raise ValueError(f"column `{name}` has {len(values)} entries for {rows} completions: give one for each")
    return values
