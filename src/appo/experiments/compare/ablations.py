"""One setting at a time: which of a comparison's methods differ in one setting only, and their curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from appo.experiments.compare.methods import variant_of
from appo.experiments.compare.plots import HEIGHT, LEFT, TOP, WIDTH, colour, page, text

DRAWN = ("learning", "L1", "L2", "L3")
Found = Mapping[str, Mapping[str, tuple[float, float, float]]]  # method -> line -> mean, low and high end


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
    shown = [one for one in ablated if sum(name in found for _, name in one.points) > 1]
    lines = list(next(iter(found.values()), {}))
    panels = [_panel(one, found, unit, level, ((i % 2) * WIDTH, (i // 2) * HEIGHT)) for i, one in enumerate(shown)]
    legend = [
        f'<rect x="{at}" y="-8" width="18" height="3" fill="{colour(i)}"/>{text(at + 24, -3, name)}'
        for i, name in enumerate(lines)
        for at in [LEFT + 110 * i]
    ]
    rows = -(-len(shown) // 2)
    foot = f'<g transform="translate(0,{rows * HEIGHT + 16})">{"".join(legend)}</g>'
    return page(rows * HEIGHT + 24, [*panels, foot])


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


def _panel(one: Ablation, found: Found, unit: str, level: float, place: tuple[float, float]) -> str:
    shown = [(value, found[name]) for value, name in one.points if name in found]
    lines = list(shown[0][1])
    ends = [end for _, own in shown for name in lines for end in own[name]]
    low, high = min(level, *ends), max(level, *ends)
    width, height = WIDTH - LEFT - 16, HEIGHT - TOP - 34
    span = (high - low) or 1.0

    def y(value: float) -> float:
        return TOP + height * (high - value) / span

    def middle(place: int) -> float:
        return LEFT + width * (place + 0.5) / len(shown)

    def x(place: int, shift: int) -> float:
        return middle(place) + 4 * (shift - (len(lines) - 1) / 2)

    marks = [f'<line x1="{LEFT}" x2="{LEFT + width}" y1="{y(level):.1f}" y2="{y(level):.1f}" stroke="#bbbbbb"/>']
    for i, name in enumerate(lines):
        means = " ".join(f"{x(k, i):.1f},{y(own[name][0]):.1f}" for k, (_, own) in enumerate(shown))
        marks.append(f'<polyline fill="none" stroke="{colour(i)}" points="{means}"/>')
        for k, (_, own) in enumerate(shown):
            at, bottom, top = x(k, i), y(own[name][1]), y(own[name][2])
            marks.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{bottom:.1f}" y2="{top:.1f}" stroke="{colour(i)}"/>')
    words = [text(middle(k), TOP + height + 14, value, "middle") for k, (value, _) in enumerate(shown)]
    words += [text(LEFT - 4, TOP + 8, f"{high:.3g}", "end"), text(LEFT - 4, TOP + height, f"{low:.3g}", "end")]
    words.append(text(LEFT, TOP - 10, f"{one.base}: {one.setting}, {unit}"))
    return f'<g transform="translate({place[0]},{place[1]})">{"".join(marks)}{"".join(words)}</g>'
