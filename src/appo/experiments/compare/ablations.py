"""One setting at a time: which of a comparison's methods differ in one setting only, and their curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from appo.experiments.compare.methods import variant_of
from appo.experiments.figures import add_legend, line_style, svg_of_panels

DRAWN = ("learning", "L1", "L2", "L3")
Measures = Mapping[str, tuple[float, float, float]]  # line -> mean, low and high end
Found = Mapping[str, Measures]  # by method


@dataclass(frozen=True)
class Ablation:
    """What one setting does to one method: its values in order, and the name of the method that has each."""

    base: str
    setting: str
    points: tuple[tuple[Any, str], ...]


def ablations(methods: Sequence[str], usual: Callable[[str, str], Any]) -> list[Ablation]:
    """Every method with the others that differ from it in one setting.

    Args:
        methods: names.
        usual: (method, setting) -> the value it has.
    """
    found: dict[tuple[str, str], list[tuple[Any, str]]] = {}
    for base in methods:
        for other in methods:
            if (setting := _only_difference(base, other)) is not None:
                found.setdefault((base, setting), []).append((usual(other, setting), other))
    # The same points, seen from another of them, are no second ablation.
    seen: set[frozenset[str]] = set()
    made = []
    for (base, setting), others in found.items():
        points = sorted([(usual(base, setting), base), *others], key=lambda point: _order(point[0]))
        members = frozenset(name for _, name in points)
        if not any(members <= known for known in seen):
            seen.add(members)
            made.append(Ablation(base, setting, tuple(points)))
    return made


def points_over_dapo(to_dapo: Mapping[str, Mapping[str, Any]]) -> Found:
    """What is drawn of a summary's differences to DAPO, in points; one seed has no interval, only its mean."""
    return {method: {name: _points(measures[name]) for name in DRAWN} for method, measures in to_dapo.items()}


def ablation_curves(ablated: Sequence[Ablation], found: Found, unit: str, level: float = 0.0) -> str:
    """An SVG, one panel an ablation: what was found with its interval, by the setting's value.

    Args:
        ablated: the panels; those with fewer than two values found are left out.
        found: of each method; all have the same lines.
        unit: of what was found, for the titles.
        level: where no difference is, drawn grey.
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


def _points(difference: Mapping[str, Any]) -> tuple[float, float, float]:
    mean, low, high = (difference[key] for key in ("mean", "low", "high"))
    return 100 * mean, 100 * (mean if low is None else low), 100 * (mean if high is None else high)


def _only_difference(base: str, other: str) -> str | None:
    """The setting in which `other` differs from `base` and has said so, or None if there is no or more than one."""
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
