"""Rewards: plain functions of TRL's shape, ``f(completions, **columns) -> list[float]``, chosen by name.

`score_answer` alone decides how right an answer is: training and evaluation both call it, so they cannot drift. A
response in the wrong format scores 0 and never raises; a *dataset* that cannot be scored raises, because every reward
of the run would be wrong. Columns that all rewards take:

- ``completions``: texts, or conversations whose last message is the assistant's.
- ``response_format``: names of `FORMATS`, one a completion or one for all; missing: ``answer``.

The setting ``reward_weights`` weights the rewards; the one named by ``accuracy_reward`` also splits a group into high
and low responses, at ``threshold``. The soft punishment of overlong responses is the setting ``overlong_cache``: it
needs the longest length and no dataset (see :class:`appo.APPOConfig`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from appo.rewards.answer_parsing import strict_answer
from appo.rewards.scorers import KINDS, Comparison
from appo.rewards.templates import parse_spans
from appo.rewards.temporal_iou import duration, temporal_iou


def accuracy_reward(
    completions: Sequence[Any],
    answer: Sequence[str] | None = None,
    kind: Sequence[str | None] | str | None = None,
    options: Sequence[Sequence[str] | None] | None = None,
    response_format: Sequence[str | None] | str | None = None,
    **kwargs: Any,
) -> list[float]:
    """How right the answer of each completion is, from 0.0 to 1.0 (see `score_answer`).

    Args:
        answer: the column of gold answers, one a completion.
        kind: how answers are compared (see `KINDS`), a column or one for all; missing: ``letter`` where there are
            options, else ``word``.
        options: the column of choices.

    Raises:
        ValueError: a column is missing, of another length, or holds what cannot be scored; names row and fix.
    """
    if answer is None:
        raise ValueError("accuracy_reward needs the gold answers: add a column `answer` to the dataset")
    rows = len(completions)
    answers = _column("answer", answer, rows)
    kinds = _column_or_one("kind", kind, rows)
    choices = [None] * rows if options is None else _column("options", options, rows)
    formats = _column_or_one("response_format", response_format, rows)

    def score(row: int, text: str) -> float:
        return score_answer(text, answers[row], kinds[row], choices[row] or (), formats[row])

    return _for_each_row("accuracy_reward", completions, score)


def format_reward(
    completions: Sequence[Any], response_format: Sequence[str | None] | str | None = None, **kwargs: Any
) -> list[float]:
    """1.0 for each completion that is exactly of its row's format, else 0.0.

    Raises:
        ValueError: the column is of another length or names no format.
    """
    formats = _column_or_one("response_format", response_format, len(completions))

    def score(row: int, text: str) -> float:
        return float(strict_answer(text, formats[row]) is not None)

    return _for_each_row("format_reward", completions, score)


def temporal_iou_reward(
    completions: Sequence[Any],
    spans: Sequence[Sequence[Sequence[float]]] | None = None,
    response_format: Sequence[str | None] | str | None = None,
    **kwargs: Any,
) -> list[float]:
    """Temporal IoU of the spans each completion predicts with the union of the true ones, exact, from 0.0 to 1.0.

    The predicted spans (see `parse_spans`) are in ``<time>`` where the row's format is ``grounded``, else in
    ``<answer>``. No format, no spans: 0.0.

    Args:
        spans: the column of true spans: for each completion a list of ``(start, end)`` in seconds.

    Raises:
        ValueError: a column is missing, of another length, or holds what cannot be scored; names row and fix.
    """
    if spans is None:
        raise ValueError("temporal_iou_reward needs the true spans: add a column `spans` to the dataset")
    true = _column("spans", spans, len(completions))
    formats = _column_or_one("response_format", response_format, len(completions))

    def score(row: int, text: str) -> float:
        _check_spans(true[row])
        parsed = strict_answer(text, formats[row])
        predicted = parse_spans(parsed.time or parsed.answer) if parsed else None
        return float(temporal_iou(predicted, true[row])) if predicted else 0.0

    return _for_each_row("temporal_iou_reward", completions, score)


PAPER_REWARDS = {"accuracy": 0.9, "format": 0.1}  # name -> weight: APPO sec. 4
REWARDS: dict[str, Callable[..., list[float]]] = {
    "accuracy": accuracy_reward,
    "format": format_reward,
    "temporal_iou": temporal_iou_reward,
}


def reward_functions(names: Sequence[str], setting: str = "rewards") -> list[Callable[..., Any]]:
    """The reward functions that a configuration names, in its order.

    Args:
        names: of `REWARDS`, or paths ``module.function`` or ``module:function``, whose modules are imported.
        setting: its name, for messages.

    Raises:
        ValueError: a name that leads to no function, or two functions that would be logged under one name.
    """
    if isinstance(names, str) or not names:
        raise ValueError(f"{setting} is {names!r}: it must be a list of names, such as [{', '.join(REWARDS)}]")
    functions = [REWARDS[name] if name in REWARDS else _imported(name, setting) for name in names]
    logged = [function.__name__ for function in functions]
    for name, function_name in zip(names, logged, strict=True):
        if logged.count(function_name) > 1:
            raise ValueError(f"{setting} holds {function_name} more than once ({name!r}): name each function once")
    return functions


def _imported(path: str, setting: str) -> Callable[..., Any]:
    """The function at ``module.function`` or ``module:function``, of the current folder too."""
    module, _, name = str(path).partition(":") if ":" in str(path) else str(path).rpartition(".")
    if not module or not name:
        problem = f"{setting} holds {path!r}, which is neither one of {', '.join(REWARDS)} nor the path of a function"
        raise ValueError(f"{problem}: write module.function")
    # An installed command does not search the current folder. Last, so that no folder hides a library of its name.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(import_module(module), name, None)
    except Exception as error:  # importing runs the user's code
        problem = f"{setting} holds {path!r}, but importing {module!r} fails ({type(error).__name__}: {error})"
        fix = "correct the path, and start in the module's folder or put it on PYTHONPATH"
        raise ValueError(f"{problem}: {fix}") from error
    if not callable(found) or not hasattr(found, "__name__"):
        what = f"has no {name!r}" if found is None else f"has {name!r}, but it is no function: {found!r}"
        raise ValueError(f"{setting} holds {path!r}, but {module!r} {what}: name a function")
    reward: Callable[..., Any] = found
    return reward


def score_answer(
    text: str,
    answer: str,
    kind: str | None = None,
    options: Sequence[str] = (),
    response_format: str | None = None,
) -> float:
    """How right a response's answer is: from 0.0 to 1.0, one of the two for letters, words and numbers.

    Args:
        text: the whole response; wrong unless it is exactly of the format.
        answer: the gold answer.
        kind: how the two are compared, one of `KINDS`; None: ``letter`` if there are options, else ``word``.
        options: the choices, lettered or not; empty for open questions.
        response_format: one of `FORMATS`; None: ``answer``.

    Raises:
        ValueError: gold answer, kind, options or format cannot be scored. The response alone never raises.
    """
    compare = comparison(answer, kind, options)
    parsed = strict_answer(text, response_format)
    return compare(parsed.answer) if parsed else 0.0


def comparison(answer: str, kind: str | None = None, options: Sequence[str] = ()) -> Comparison:
    """The function that scores answers to one question; also checks the row of a dataset.

    Raises:
        ValueError: gold answer, kind or options cannot be scored (see `score_answer`).
    """
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"`answer` is {answer!r}: it must be a text that is not empty")
    if isinstance(options, str) or not all(isinstance(option, str) for option in options):
        raise ValueError(f"`options` is {options!r}: it must be a list of texts, one a choice")
    if kind is None:
        kind = "letter" if options else "word"
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"`kind` is {kind!r}: it must be one of {', '.join(KINDS)}")
    return KINDS[kind](answer, options)


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


def _check_spans(spans: Any) -> None:
    """Refuse true spans that no prediction can match."""
    if isinstance(spans, (str, bytes)) or not isinstance(spans, Sequence):
        raise ValueError(f"`spans` is {spans!r}: it must be a list of (start, end) in seconds")
    try:
        seconds = duration(spans)
    except ValueError as error:
        raise ValueError(f"`spans`: {error}; correct the annotation") from None
    if not seconds:
        raise ValueError(f"`spans` is {spans!r}, which covers no time: leave such rows out of the dataset")


def _for_each_row(reward: str, completions: Sequence[Any], score: Callable[[int, str], float]) -> list[float]:
    """The score of each (row, text of its completion); errors name the reward and the row."""
    rewards = []
    for row, completion in enumerate(completions):
        try:
            rewards.append(score(row, completion_text(completion) or ""))
        except ValueError as error:
            raise ValueError(f"{reward}, row {row}: {error}") from None
    return rewards


def _column_or_one(name: str, values: Any, rows: int) -> Sequence[Any]:
    """A dataset column, or one value for all completions."""
    return [values] * rows if values is None or isinstance(values, str) else _column(name, values, rows)


def _column(name: str, values: Any, rows: int) -> Sequence[Any]:
    """A dataset column with one entry a completion."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"column `{name}` is {type(values).__name__}: it must be a list, one entry a completion")
    if len(values) != rows:
        raise ValueError(f"column `{name}` has {len(values)} entries for {rows} completions: give one for each")
    return values
