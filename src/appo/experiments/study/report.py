"""A study's summary as Markdown and as curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from appo.evaluation.tables import markdown_table
from appo.experiments.figures import add_legend, line_style, svg_of_panels

LEGEND_COLUMNS = 3
LONGEST_ROW = 40  # characters of names beside one another
AXES = {"perception": "perceivers", "reasoning": "reasoners"}


def markdown(summary: Mapping[str, Any]) -> str:
    """The page of a study: scores of all cells, gains, what is missing, costs."""
    lines = [f"{summary['questions']} questions; answered in all cells: {summary['complete']}.", "", *_grid(summary)]
    if summary["gains"]:
        lines += ["", *_gains(summary)]
    lines += ["", *(f"- {remark}" for remark in remarks(summary))]
    return "\n".join(lines).rstrip() + "\n"


def remarks(summary: Mapping[str, Any]) -> list[str]:
    """Remarks on the numbers: missing and empty answers, and costs."""
    lines = [
        f"**Missing**: {gap['what']}: {gap['count']} of {summary['questions']} ({gap['why']})"
        for gap in summary["missing"]
    ]
    lines += [f"{name}: {n} of its answers are empty and count as wrong" for name, n in summary["empty"].items()]
    for name, cost in summary["costs"].items():
        dollars = "prices not given" if cost["dollars"] is None else f"${cost['dollars']:.4f}"
        unknown = f"; {cost['unknown']} replies did not report them and count as the most" if cost["unknown"] else ""
        lines.append(f"{name}: {cost['read']:,} tokens read, {cost['written']:,} written, {dollars}{unknown}")
    return lines


def curves(summary: Mapping[str, Any]) -> str:
    """An SVG of two panels: the score by perceiver, a curve per reasoner, and by reasoner, a curve per perceiver."""
    score = {(cell["perceiver"], cell["reasoner"]): cell["score"] for cell in summary["cells"]}
    perceivers, reasoners = summary["perceivers"], summary["reasoners"]
    by_perceiver = {r: [score[p, r] for p in perceivers] for r in reasoners}
    by_reasoner = {p: [score[p, r] for r in reasoners] for p in perceivers}

    def draw(axes: Sequence[Any]) -> None:
        _draw_scores(axes[0], "score by perceiver, a curve a reasoner", perceivers, by_perceiver)
        _draw_scores(axes[1], "score by reasoner, a curve a perceiver", reasoners, by_reasoner)

    legend_rows = -(-max(len(perceivers), len(reasoners)) // LEGEND_COLUMNS)
    return svg_of_panels(2, draw, foot=0.3 + 0.18 * legend_rows)


def _draw_scores(axes: Any, title: str, names: Sequence[str], curves: Mapping[str, Sequence[float | None]]) -> None:
    """Curves over the names; if the names are long, each second one stands lower."""
    axes.set_title(title)
    for i, scores in enumerate(curves.values()):
        points = [(place, score) for place, score in enumerate(scores) if score is not None]
        if points:
            gid = f"curve-{title.split()[-1]}-{i}"
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, gid=gid, **line_style(i))
    lower = "\n" if len(" ".join(names)) > LONGEST_ROW else ""
    axes.set_xticks(range(len(names)), [f"{lower if place % 2 else ''}{name}" for place, name in enumerate(names)])
    add_legend(axes, list(curves), loc="upper left", bbox_to_anchor=(0, -0.18), ncols=LEGEND_COLUMNS)


def _grid(summary: Mapping[str, Any]) -> list[str]:
    cells = {(cell["perceiver"], cell["reasoner"]): cell for cell in summary["cells"]}
    rows = [[p, *(_cell(cells[p, r], summary) for r in summary["reasoners"])] for p in summary["perceivers"]]
    title = "Score in per cent (95 % Wilson interval); rows describe, columns answer, from weak to strong as given:"
    return [title, "", *markdown_table(["", *summary["reasoners"]], rows)]


def _cell(cell: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    if cell["score"] is None:
        return "-"
    part = f" of {cell['answered']}" if cell["answered"] < summary["questions"] else ""
    return f"{100 * cell['score']:.1f} ({100 * cell['low']:.1f}, {100 * cell['high']:.1f}){part}"


def _gains(summary: Mapping[str, Any]) -> list[str]:
    found = summary["gains"]
    kinds = {
        "": ("weakest to strongest, points", 100.0, 1),
        "/step": ("a step, points", 100.0, 1),
        "/carried": ("carried, points a point", 1.0, 2),
    }
    names = [name for name in (*AXES, "difference") if name in found]
    rows = [[name, *(_gain(found.get(f"{name}{kind}"), *how[1:]) for kind, how in kinds.items())] for name in names]
    lines = ["Gains, averaged over the other side (95 % paired bootstrap interval over questions):", ""]
    lines += markdown_table(["", *(how[0] for how in kinds.values())], rows)
    for name, members in AXES.items():
        steps = [found[f"{name}/step/{n}"] for n in range(1, len(summary[members])) if f"{name}/step/{n}" in found]
        pairs = zip(summary[members], summary[members][1:], steps, strict=False)
        body = [[f"{one} → {other}", _gain(step, 100.0, 1)] for one, other, step in pairs]
        if len(body) > 1:
            lines += ["", *markdown_table([f"step of {name}", "points"], body)]
    return lines


def _gain(gain: Mapping[str, float] | None, factor: float, digits: int) -> str:
    if gain is None:
        return "-"
    value, low, high = (f"{factor * gain[name]:+.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} ({low}, {high})"
