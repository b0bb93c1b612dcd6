"""The scores of an evaluation's folder: official figures, strict and lenient side by side, and what they rest on.

Scored are the texts on disk, so a later parser can score an evaluation again without asking anything.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from appo.evaluation.predictions import EvaluationFolder, Reply
from appo.evaluation.scoreboard import Sheet
from appo.evaluation.scores import Answered, Score, official_scores, unparsable_share
from appo.rewards.templates import PARSER_VERSION
from appo.types import VideoQA


@dataclass(frozen=True)
class ScoreCard:
    """What an evaluation is worth.

    Attributes:
        settings: of the evaluation (``eval.json``).
        strict: the official figures of responses exactly in the format asked for.
        lenient: the same figures as a forgiving reader extracts answers, in the same order.
        unparsable: share of responses that are not in the format.
        tokens: mean tokens of a response; None without responses.
        seconds: mean seconds a question took; None if nothing was timed.
        missing: questions without a prediction, which count as wrong.
        parser_version: of :mod:`appo.rewards.templates`.
    """

    settings: dict[str, Any]
    strict: list[Score]
    lenient: list[Score]
    unparsable: float
    tokens: float | None
    seconds: float | None
    missing: int
    parser_version: int

    def to_json(self) -> str:
        """The card as scores.json: the same answers give the same bytes, so nothing of time is in it."""
        what = ("model", "dataset", "split", "limit", "questions", "questions_digest", "samples", "temperature", "seed")
        data = {
            **{name: self.settings[name] for name in what},
            "missing": self.missing,
            "unparsable": self.unparsable,
            "tokens": self.tokens,
            "prompt_version": self.settings["prompt_version"],
            "parser_version": self.parser_version,
            "strict": [asdict(score) for score in self.strict],
            "lenient": [asdict(score) for score in self.lenient],
        }
        return json.dumps(data, indent=1) + "\n"

    def sheet(self) -> Sheet:
        """The card as a table, in per cent."""
        columns = ["figure", "n", "strict", "95 % interval", "lenient"]
        skipping = any(score.answered_only is not None for score in self.strict)
        columns += ["strict, answered only"] if skipping else []
        rows = []
        for strict, lenient in zip(self.strict, self.lenient, strict=True):
            row = [strict.name, str(strict.questions), percent(strict.value), interval(strict), percent(lenient.value)]
            rows.append([*row, *([percent(strict.answered_only)] if skipping else [])])
        settings = self.settings
        part = f" {settings['split']}" if settings["split"] else ""
        return Sheet(f"{settings['model']} on {settings['dataset']}{part}", columns, rows, self._remarks())

    def _remarks(self) -> list[str]:
        settings = self.settings
        samples = settings["samples"]
        how = f"{samples} samples at temperature {settings['temperature']:g}" if settings["temperature"] else "greedy"
        remarks = [f"{settings['questions']} questions, {how}; scores in %, b: bootstrap, else Wilson interval"]
        if self.missing:
            of = f"{self.missing} of {settings['questions']} questions"
            remarks.append(f"{of} have no prediction and count as wrong; answered only: without them")
        cost = [f"{percent(self.unparsable)} % of responses unparsable"]
        cost += [] if self.tokens is None else [f"{self.tokens:.1f} tokens a response"]
        cost += [] if self.seconds is None else [f"{self.seconds:.2f} s a question"]
        versions = f"prompt version {settings['prompt_version']}, parser version {self.parser_version}"
        return [*remarks, ", ".join(cost), versions]


def score(folder: EvaluationFolder) -> ScoreCard:
    """Score the predictions of an evaluation; questions not answered yet count as missing.

    Raises:
        appo.reports.jsonl.RecordError: the folder is damaged.
    """
    settings = folder.settings
    questions = folder.questions()
    replies = folder.replies(questions)
    answered = pair(questions, replies)
    lengths = [length for reply in replies if reply is not None for length in reply.tokens]
    seconds, timed = folder.seconds()
    return ScoreCard(
        settings=settings,
        strict=official_scores(settings["dataset"], answered),
        lenient=official_scores(settings["dataset"], answered, lenient=True),
        unparsable=unparsable_share(settings["dataset"], answered),
        tokens=sum(lengths) / len(lengths) if lengths else None,
        seconds=seconds / timed if timed else None,
        missing=sum(not one.texts for one in answered),
        parser_version=PARSER_VERSION,
    )


def pair(questions: Sequence[VideoQA], replies: Sequence[Reply | None]) -> list[Answered]:
    """Questions with their responses."""
    return [
        Answered(question, reply.texts if reply is not None else ())
        for question, reply in zip(questions, replies, strict=True)
    ]


def percent(share: float | None) -> str:
    """A share in per cent without the sign: ``52.3``; ``-`` for None."""
    return "-" if share is None else f"{100 * share:.1f}"


def interval(score: Score) -> str:
    """The interval of a score in per cent: ``47.1-57.4``, with a ``b`` behind it if it was bootstrapped."""
    return f"{percent(score.low)}-{percent(score.high)}{' b' if score.interval == 'bootstrap' else ''}"
