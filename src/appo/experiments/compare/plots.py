"""Learning curves as one SVG file, drawn by hand: no library for five panels of lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

from appo.experiments.compare.summaries import Cells, paired_seeds

WIDTH, HEIGHT, LEFT, TOP = 420, 260, 48, 30
WINDOW = 5  # steps of the moving mean
COLOURS = ("#444444", "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#bcbd22")
PANELS = (  # title, name of x, name of y
    ("sampled accuracy by generated tokens", "generated", "accuracy"),
    ("sampled accuracy by seconds of processor time", "own_seconds", "accuracy"),
    ("sampled accuracy by step", "step", "accuracy"),
    ("entropy by step", "step", "entropy"),
    ("gradient norm by step", "step", "grad_norm"),
)
Points = list[tuple[float, float]]


def learning_curves(cells: Cells, methods: Sequence[str]) -> str:
    """An SVG of all `PANELS`: means over each method's finished seeds at each step, y as a moving mean."""
    seeds = {method: paired_seeds(cells, [method]) for method in methods if method != "start"}
    trained, panels = [method for method, own in seeds.items() if own], []
    for index, (title, x, y) in enumerate(PANELS):
        curves = {m: mean_curve([cells[m, seed]["curve"] for seed in seeds[m]], x, y) for m in trained}
        place = (index % 2) * WIDTH, (index // 2) * HEIGHT
        panels.append(panel(title, curves, place))
    rows = -(-(len(PANELS) + 1) // 2)
    names = legend(trained, (WIDTH, (rows - 1) * HEIGHT))
    counts = sorted({len(seeds[method]) for method in trained})
    note = f"means over {' to '.join(map(str, counts))} seeds, moving mean of {WINDOW} steps"
    return page(rows * HEIGHT + 20, [*panels, names, text(8, rows * HEIGHT + 12, note)])


def mean_curve(curves: Sequence[Sequence[Mapping[str, float]]], x: str, y: str) -> Points:
    """(x, y) at each step that all curves have: means over the curves, y then over the last `WINDOW`."""
    rows = [[step for step in curve if x in step and y in step] for curve in curves]
    together = list(zip(*rows, strict=False))
    xs = [sum(step[x] for step in steps) / len(steps) for steps in together]
    ys = [sum(step[y] for step in steps) / len(steps) for steps in together]
    recent = [ys[max(0, i + 1 - WINDOW) : i + 1] for i in range(len(ys))]
    return [(at, sum(values) / len(values)) for at, values in zip(xs, recent, strict=True)]


def panel(title: str, curves: Mapping[str, Points], place: tuple[float, float]) -> str:
    """Lines in a frame with the ends of both axes; nothing without points."""
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return ""
    (x0, x1), (y0, y1) = (_range([point[axis] for point in points]) for axis in (0, 1))
    width, height = WIDTH - LEFT - 16, HEIGHT - TOP - 34

    def at(point: tuple[float, float]) -> str:
        return f"{LEFT + width * (point[0] - x0) / (x1 - x0):.1f},{TOP + height * (y1 - point[1]) / (y1 - y0):.1f}"

    lines = [
        f'<polyline fill="none" stroke="{colour(i)}" stroke-width="1.6" points="{" ".join(map(at, curve))}"/>'
        for i, curve in enumerate(curves.values())
    ]
    ends = [
        text(LEFT, TOP + height + 14, f"{x0:.4g}"), text(LEFT + width, TOP + height + 14, f"{x1:.4g}", "end"),
        text(LEFT - 4, TOP + height, f"{y0:.3g}", "end"), text(LEFT - 4, TOP + 8, f"{y1:.3g}", "end"),
        text(LEFT, TOP - 10, title),
    ]  # fmt: skip
    frame = f'<rect x="{LEFT}" y="{TOP}" width="{width}" height="{height}" fill="none" stroke="#bbbbbb"/>'
    return f'<g transform="translate({place[0]},{place[1]})">{frame}{"".join(lines)}{"".join(ends)}</g>'


def legend(methods: Sequence[str], place: tuple[float, float]) -> str:
    """The colour of each name, in order."""
    entries = [
        f'<rect x="{LEFT}" y="{TOP + 16 * i}" width="18" height="3" fill="{colour(i)}"/>'
        + text(LEFT + 26, TOP + 5 + 16 * i, name)
        for i, name in enumerate(methods)
    ]
    return f'<g transform="translate({place[0]},{place[1]})">{"".join(entries)}</g>'


def page(height: float, parts: Sequence[str]) -> str:
    """A white SVG page two panels wide."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * WIDTH} {height}" '
        f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
        f"{''.join(parts)}</svg>\n"
    )


def text(x: float, y: float, words: Any, anchor: str = "start") -> str:
    """Words at a place, escaped."""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{escape(str(words))}</text>'


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def colour(index: int) -> str:
    """Of the i-th line."""
    return COLOURS[index % len(COLOURS)]
