"""Figures as SVG by matplotlib, two panels per row; equal numbers give equal files on every machine."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

COLOURS = ("#444444", "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#bcbd22")
STYLES = ("solid", "dashed", "dotted")  # of the first ten lines, the next ten, ...
PANEL_WIDTH, PANEL_HEIGHT = 4.7, 2.9  # inches
# Inches around each panel. Nothing is placed by the size of a text, which depends on fonts and versions.
_LEFT, _RIGHT, _BOTTOM, _TOP = 0.6, 0.15, 0.35, 0.35
_SETTINGS: dict[str, Any] = {
    "axes.edgecolor": "#bbbbbb", "axes.grid": True, "axes.titlelocation": "left", "axes.titlesize": 9.5,
    "axes.spines.right": False, "axes.spines.top": False, "font.sans-serif": ["DejaVu Sans"], "font.size": 9,
    "grid.color": "#eeeeee", "legend.frameon": False, "lines.linewidth": 1.4,
    "path.simplify": False,  # all points are drawn
    "svg.fonttype": "none",  # words stay words, in a font of the reader's
    "svg.hashsalt": "appo",
}  # fmt: skip


def require_matplotlib() -> None:
    """Raise ValueError if matplotlib is not installed, before anything slow starts."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("figures need a package: pip install 'appo[plots]'") from None


def line_style(index: int) -> dict[str, Any]:
    """Colour and dashes of the i-th line, the same in all panels."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": STYLES[index // len(COLOURS) % len(STYLES)]}


def add_legend(place: Any, names: Sequence[str], **options: Any) -> None:
    """The lines' names in their order, on matplotlib's axes or figure; `options` are those of its legend."""
    from matplotlib.lines import Line2D

    place.legend(handles=[Line2D([], [], label=name, **line_style(i)) for i, name in enumerate(names)], **options)


def svg_of_panels(count: int, draw: Callable[[Sequence[Any]], None], foot: float = 0.4) -> str:
    """An SVG of panels, two in a row.

    Args:
        count: of panels.
        draw: called with the axes of each, as matplotlib has them; those that stay without data get no frame.
        foot: inches below all panels, for a note or a legend.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    rows = -(-count // 2)
    width, height = 2 * PANEL_WIDTH, rows * PANEL_HEIGHT + foot
    content = io.StringIO()
    with style.context(["default", _SETTINGS]):
        figure, axes = Figure((width, height)), []
        for i in range(count):
            left, bottom = (i % 2) * PANEL_WIDTH + _LEFT, height - (i // 2 + 1) * PANEL_HEIGHT + _BOTTOM
            size = PANEL_WIDTH - _LEFT - _RIGHT, PANEL_HEIGHT - _BOTTOM - _TOP
            axes.append(figure.add_axes((left / width, bottom / height, size[0] / width, size[1] / height)))
        draw(axes)
        for own in axes:
            own.axison = own.has_data()
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    return content.getvalue()
