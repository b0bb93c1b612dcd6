"""A comparison's summary as Markdown; its learning curves and ablations as SVG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from appo.evaluation.tables import markdown_table
from appo.experiments.compare.methods import variant_of
from appo.experiments.compare.summaries import MEASURES, NONE, Cells, paired_seeds
from appo.experiments.figures import add_legend, line_style, svg_of_panels

# --- Markdown --------------------------------------------------------------------------------------------------------


SIDES = ("winners", "losers")
TITLES = {"learning": "reward, all steps", "reward": "last third"}


def markdown(summary: Mapping[str, Any], settings: Mapping[str, Any], unfinished: Sequence[str]) -> str:
    """The page of a comparison: settings, means, paired differences, perception, unfinished cells."""
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
    return ["Means over seeds, in per cent:", "", *markdown_table(head, rows)]


def _differences(baseline: str, rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    head = [f"minus {baseline}", "seeds", *_titles()]
    body = [
        [name, str(len(own["L1"]["each"])), *(interval(own[measure]) for measure in MEASURES)]
        for name, own in rows.items()
    ]
    title = (
        f"Paired difference to {baseline} in points, mean over seeds (95 % bootstrap interval), p by flipping signs:"
    )
    return [title, "", *markdown_table(head, body)]


def _each(baseline: str, rows: Mapping[str, Mapping[str, Any]], seeds: Mapping[str, Sequence[int]]) -> list[str]:
    """Every seed's difference in the first of the measures."""
    columns = seeds[baseline]
    body = []
    for name, own in rows.items():
        both = [seed for seed in columns if seed in seeds[name]]
        found = dict(zip(both, own["learning"]["each"], strict=True))
        body.append([name, *(_points(found.get(seed, NONE)) for seed in columns)])
    title = f"The same of each seed, {TITLES['learning']}:"
    return [title, "", *markdown_table([f"minus {baseline}", *(f"seed {seed}" for seed in columns)], body)]


def _recovered(recovered: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    lines = []
    for oracle, rows in recovered.items():
        body = [[name, *(_number(own.get(measure), 100, 0) for measure in MEASURES)] for name, own in rows.items()]
        if body:
            title = f"Share of {oracle}'s gain over dapo that is recovered, per cent, where that gain is above zero:"
            lines += [title, "", *markdown_table(["method", *_titles()], body), ""]
    return lines


def _titles() -> list[str]:
    return [TITLES.get(measure, measure) for measure in MEASURES]


def _perception(means: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    head = ["method", "while training", "after it, raw", "after it, relative", "attention on it, winners", "losers"]
    columns = (("recall", "crucial"), ("recall_raw", "crucial_raw"), ("recall_relative", "crucial_relative"))
    rows = [
        [name, *(_recall(own[right], own[chance]) for right, chance in columns), *(_percent(own[s]) for s in SIDES)]
        for name, own in means.items()
    ]
    title = "True frames among the crucial ones (by chance), and attention to the video that is on them, in per cent:"
    return [title, "", *markdown_table(head, rows)]


def _recall(recall: float | None, chance: float | None) -> str:
    return "-" if recall is None else f"{_percent(recall)} ({_percent(chance)})"


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


# --- learning curves -------------------------------------------------------------------------------------------------


WINDOW = 5  # steps of the moving mean
LEGEND_ROWS = 14
PANELS = (  # title, name of x, name of y
    ("sampled accuracy by generated tokens", "generated", "accuracy"),
    ("sampled accuracy by seconds of processor time", "own_seconds", "accuracy"),
    ("sampled accuracy by step", "step", "accuracy"),
    ("entropy by step", "step", "entropy"),
    ("gradient norm by step", "step", "grad_norm"),
)


def learning_curves(cells: Cells, methods: Sequence[str]) -> str:
    """An SVG of all `PANELS`: means over each method's finished seeds at each step, y as a moving mean."""
    seeds = {method: paired_seeds(cells, [method]) for method in methods if method != "start"}
    trained = [method for method, own in seeds.items() if own]
    counts = sorted({len(seeds[method]) for method in trained})

    def draw(axes: Sequence[Any]) -> None:
        for number, (own, (title, x, y)) in enumerate(zip(axes, PANELS, strict=False)):
            own.set_title(title)
            own.locator_params(axis="x", nbins=7)
            for i, method in enumerate(trained):
                points = mean_curve([cells[method, seed]["curve"] for seed in seeds[method]], x, y)
                if points:
                    own.plot(*zip(*points, strict=True), gid=f"curve-{number}-{i}", **line_style(i))
        add_legend(axes[-1], trained, loc="upper left", ncols=1 + (len(trained) - 1) // LEGEND_ROWS)
        note = f"means over {' to '.join(map(str, counts))} seeds, moving mean of {WINDOW} steps"
        axes[0].figure.text(0.01, 0.01, note)

    return svg_of_panels(len(PANELS) + 1, draw)


def mean_curve(curves: Sequence[Sequence[Mapping[str, float]]], x: str, y: str) -> list[tuple[float, float]]:
    """(x, y) at each step that all curves have: means over the curves, y then over the last `WINDOW`."""
    rows = [[step for step in curve if x in step and y in step] for curve in curves]
    together = list(zip(*rows, strict=False))
    xs = [sum(step[x] for step in steps) / len(steps) for steps in together]
    ys = [sum(step[y] for step in steps) / len(steps) for steps in together]
    recent = [ys[max(0, i + 1 - WINDOW) : i + 1] for i in range(len(ys))]
    return [(at, sum(values) / len(values)) for at, values in zip(xs, recent, strict=True)]


# --- ablations: methods that differ in one setting -------------------------------------------------------------------


DRAWN = ("learning", "L1", "L2", "L3")
Measures = Mapping[str, tuple[float, float, float]]  # line -> mean, low and high end
Found = Mapping[str, Measures]  # by method


@dataclass(frozen=True)
class Ablation:
    """One setting of one method: its values in order, and the name of the method that has each."""

    base: str
    setting: str
    points: tuple[tuple[Any, str], ...]


def ablations(methods: Sequence[str], usual: Callable[[str, str], Any]) -> list[Ablation]:
    """Every method with the others that differ from it in one setting; `usual`: (method, setting) -> its value."""
    found: dict[tuple[str, str], list[tuple[Any, str]]] = {}
    for base in methods:
        for other in methods:
            if (setting := _only_difference(base, other)) is not None:
                found.setdefault((base, setting), []).append((usual(other, setting), other))
    # The same points with another of them as base are no second ablation.
    known: list[frozenset[str]] = []
    made = []
    for (base, setting), others in found.items():
        points = sorted([(usual(base, setting), base), *others], key=lambda point: _order(point[0]))
        members = frozenset(name for _, name in points)
        if not any(members <= other for other in known):
            known.append(members)
            made.append(Ablation(base, setting, tuple(points)))
    return made


def points_over_dapo(to_dapo: Mapping[str, Mapping[str, Any]]) -> Found:
    """A summary's differences to DAPO, in points; one seed has no interval, only its mean."""
    return {method: {name: _mean_low_high(measures[name]) for name in DRAWN} for method, measures in to_dapo.items()}


def ablation_curves(ablated: Sequence[Ablation], found: Found, unit: str, level: float = 0.0) -> str:
    """An SVG, one panel per ablation: measures with their intervals by the setting's value.

    Args:
        ablated: the panels; those with fewer than two measured values are left out.
        found: the measures of each method; all have the same lines.
        unit: of the measures, for the titles.
        level: of no difference, drawn grey.
    """
    panels = [one for one in ablated if sum(name in found for _, name in one.points) > 1]
    lines = list(next(iter(found.values()), {}))

    def draw(axes: Sequence[Any]) -> None:
        for number, (own, one) in enumerate(zip(axes, panels, strict=True)):
            own.set_title(f"{one.base}: {one.setting}, {unit}")
            _draw_panel(own, number, {str(value): found[name] for value, name in one.points if name in found}, level)
        if axes:
            add_legend(axes[0].figure, lines, loc="lower left", ncols=len(lines))

    return svg_of_panels(len(panels), draw)


def _mean_low_high(difference: Mapping[str, Any]) -> tuple[float, float, float]:
    mean, low, high = (difference[key] for key in ("mean", "low", "high"))
    return 100 * mean, 100 * (mean if low is None else low), 100 * (mean if high is None else high)


def _only_difference(base: str, other: str) -> str | None:
    """The one setting that `other` changes of `base`; None if there is none or more than one."""
    one, two = variant_of(base), variant_of(other)
    if base == other or (one.method, one.control, one.needs) != (two.method, two.control, two.needs):
        return None
    if not one.settings.keys() <= two.settings.keys():
        return None
    changed = [key for key, value in two.settings.items() if key not in one.settings or one.settings[key] != value]
    return changed[0] if len(changed) == 1 else None


def _order(value: Any) -> tuple[bool, Any]:
    return (isinstance(value, str), value)


def _draw_panel(axes: Any, number: int, by_value: Mapping[str, Measures], level: float) -> None:
    """A curve of each line's means with its intervals, side by side at each value."""
    axes.axhline(level, color="#999999", linewidth=0.8)
    lines = list(next(iter(by_value.values())))
    for i, name in enumerate(lines):
        xs = [place + 0.05 * (i - (len(lines) - 1) / 2) for place in range(len(by_value))]
        means, lows, highs = zip(*(own[name] for own in by_value.values()), strict=True)
        axes.plot(xs, means, marker="o", markersize=3, gid=f"curve-{number}-{i}", **line_style(i))
        axes.vlines(xs, lows, highs, linewidth=0.8, **line_style(i))
    axes.set_xlim(-0.5, len(by_value) - 0.5)
    axes.set_xticks(range(len(by_value)), list(by_value))
    axes.grid(visible=False, axis="x")
