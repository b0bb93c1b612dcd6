"""Learning curves of a comparison as one SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from appo.experiments.compare.summaries import Cells, paired_seeds
from appo.experiments.figures import add_legend, line_style, svg_of_panels

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
