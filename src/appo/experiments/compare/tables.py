"""A comparison's summary as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from appo.experiments.compare.methods import variant_of
from appo.experiments.compare.summaries import MEASURES, NONE

SIDES = ("winners", "losers")
TITLES = {"learning": "reward, all steps", "reward": "last third"}


def markdown(summary: Mapping[str, Any], settings: Mapping[str, Any], unfinished: Sequence[str]) -> str:
    """The page of a comparison: what was run, means, paired differences, perception, what is not finished."""
    lines = [
        f"{settings['steps']} steps at the demo's settings on clips of level {settings['level']}, "
        f"{settings['questions']} held-out questions a level.",
        "",
    ]
    if summary["seeds"]:
        lines += [*_means(summary), ""]
        for baseline, rows in summary["differences"].items():
            lines += [*_differences(baseline, rows), "", *_each(baseline, rows, summary["seeds"]), ""] if rows else []
        lines += [*_recovered(summary["recovered"]), *_perception(summary["means"]), ""]
    if unfinished:
        lines += [f"Not finished: {', '.join(unfinished)}.", ""]
    return "\n".join(lines)


def _means(summary: Mapping[str, Any]) -> list[str]:
    head = ["method", "seeds", *_titles(), "tokens, k", "mean weight", "entropy", "grad norm", ""]
    rows = [
        [name, str(len(summary["seeds"].get(name, [0]))), *(_percent(own[measure]) for measure in MEASURES),
         _number(own["tokens"], 1e-3, 0),
         *(_number(own[key], 1, 2) for key in ("mean_weight", "entropy", "grad_norm")), variant_of(name).meaning]
        for name, own in summary["means"].items()
    ]  # fmt: skip
    return ["Means over seeds, in per cent:", "", *table(head, rows)]


def _differences(baseline: str, rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    head = [f"minus {baseline}", "seeds", *_titles()]
    body = [
        [name, str(len(own["L1"]["each"])), *(interval(own[measure]) for measure in MEASURES)]
        for name, own in rows.items()
    ]
    title = (
        f"Paired difference to {baseline} in points, mean over seeds (95 % bootstrap interval), p by flipping signs:"
    )
    return [title, "", *table(head, body)]


def _each(baseline: str, rows: Mapping[str, Mapping[str, Any]], seeds: Mapping[str, Sequence[int]]) -> list[str]:
    """Every seed's difference in the first of the measures."""
    columns = seeds[baseline]
    body = []
    for name, own in rows.items():
        both = [seed for seed in columns if seed in seeds[name]]
        found = dict(zip(both, own["learning"]["each"], strict=True))
        body.append([name, *(_points(found.get(seed, NONE)) for seed in columns)])
    title = f"The same of each seed, {TITLES['learning']}:"
    return [title, "", *table([f"minus {baseline}", *(f"seed {seed}" for seed in columns)], body)]


def _recovered(recovered: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    lines = []
    for oracle, rows in recovered.items():
        body = [[name, *(_number(own.get(measure), 100, 0) for measure in MEASURES)] for name, own in rows.items()]
        if body:
            title = f"Share of {oracle}'s gain over dapo that is recovered, per cent, where that gain is above zero:"
            lines += [title, "", *table(["method", *_titles()], body), ""]
    return lines


def _titles() -> list[str]:
    return [TITLES.get(measure, measure) for measure in MEASURES]


def _perception(means: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    head = ["method", "while training", "after it, raw", "after it, relative", "attention on it, winners", "losers"]
    found = (("recall", "crucial"), ("recall_raw", "crucial_raw"), ("recall_relative", "crucial_relative"))
    rows = [
        [name, *(_found(own[right], own[chance]) for right, chance in found), *(_percent(own[s]) for s in SIDES)]
        for name, own in means.items()
    ]
    title = "True frames among the crucial ones (by chance), and attention to the video that is on them, in per cent:"
    return [title, "", *table(head, rows)]


def _found(recall: float | None, chance: float | None) -> str:
    return "-" if recall is None else f"{_percent(recall)} ({_percent(chance)})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; the first column to the left, all others to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]


def _percent(value: float | None) -> str:
    return _number(value, 100, 1)


def _number(value: float | None, factor: float, digits: int) -> str:
    return "-" if value is None or value != value else f"{value * factor:.{digits}f}"


def interval(difference: Mapping[str, Any]) -> str:
    """A paired difference in points, with interval and p where they are known."""
    mean = _points(difference["mean"])
    if difference["low"] is None:
        return mean
    return f"{mean} ({_points(difference['low'])}, {_points(difference['high'])}) p {difference['p']:.2g}"


def _points(value: float) -> str:
    return "-" if value != value else f"{100 * value:+.1f}"
