"""One setting at a time: which of a comparison's methods differ in one setting only, and their curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from appo.comparing.methods import variant_of
from appo.comparing.plots import HEIGHT, LEFT, TOP, WIDTH, colour, page, text

DRAWN = ("learning", "L1", "L2", "L3")


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


def ablation_curves(found: Sequence[Ablation], to_dapo: Mapping[str, Mapping[str, Any]]) -> str:
    """An SVG, one panel an ablation: difference to DAPO in points with its interval, by the setting's value."""
    panels = [_panel(one, to_dapo, ((i % 2) * WIDTH, (i // 2) * HEIGHT)) for i, one in enumerate(found)]
    legend = [
        f'<rect x="{at}" y="-8" width="18" height="3" fill="{colour(i)}"/>{text(at + 24, -3, name)}'
        for i, name in enumerate(DRAWN)
        for at in [LEFT + 110 * i]
    ]
    rows = -(-len(found) // 2)
    foot = f'<g transform="translate(0,{rows * HEIGHT + 16})">{"".join(legend)}</g>'
    return page(rows * HEIGHT + 24, [*panels, foot])


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


def _panel(one: Ablation, to_dapo: Mapping[str, Mapping[str, Any]], place: tuple[float, float]) -> str:
    shown = [(value, to_dapo[name]) for value, name in one.points if name in to_dapo]
    if not shown:
        return ""
    ends = [end for _, own in shown for name in DRAWN for end in _interval(own[name])]
    low, high = min(0.0, *ends), max(0.0, *ends)
    width, height = WIDTH - LEFT - 16, HEIGHT - TOP - 34
    span = (high - low) or 1.0

    def y(points: float) -> float:
        return TOP + height * (high - points) / span

    def x(place: int, shift: int) -> float:
        return LEFT + width * (place + 0.5) / len(shown) + 4 * (shift - 1.5)

    marks = [f'<line x1="{LEFT}" x2="{LEFT + width}" y1="{y(0):.1f}" y2="{y(0):.1f}" stroke="#bbbbbb"/>']
    for i, name in enumerate(DRAWN):
        middles = [(x(k, i), y(100 * own[name]["mean"])) for k, (_, own) in enumerate(shown)]
        line = " ".join(f"{at:.1f},{up:.1f}" for at, up in middles)
        marks.append(f'<polyline fill="none" stroke="{colour(i)}" points="{line}"/>')
        for (at, _), (_, own) in zip(middles, shown, strict=True):
            bottom, top = _interval(own[name])
            marks.append(
                f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y(bottom):.1f}" y2="{y(top):.1f}" stroke="{colour(i)}"/>'
            )
    words = [text(x(k, 1), TOP + height + 14, value, "middle") for k, (value, _) in enumerate(shown)]
    words += [text(LEFT - 4, TOP + 8, f"{high:+.1f}", "end"), text(LEFT - 4, TOP + height, f"{low:+.1f}", "end")]
    words.append(text(LEFT, TOP - 10, f"{one.base}: {one.setting}, points over dapo"))
    return f'<g transform="translate({place[0]},{place[1]})">{"".join(marks)}{"".join(words)}</g>'


def _interval(difference: Mapping[str, Any]) -> tuple[float, float]:
    """In points; without an interval (one seed) the mean alone."""
    ends = (difference["low"], difference["high"])
    low, high = (difference["mean"] if end is None else end for end in ends)
    return 100 * low, 100 * high
