"""The spotlight page: loaded runs -> one self-contained HTML file, and its data as JSON beside it.

Nothing is computed in the template. The page loads nothing over the network. Everything from models, annotations or
file names reaches it as JSON and is inserted as text, never as HTML.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from appo import __version__
from appo.files import atomic_write
from appo.reports.curves import run_curves, run_facts, run_levels, run_settings, run_times
from appo.reports.group_view import NAME_LENGTH, ViewSettings, clean, group_view, lean
from appo.reports.jsonl import unwritable
from appo.reports.records import RolloutRecord
from appo.reports.run_folder import LoadedRun

# A page stays under 8 MB, to open at once and to be sent by mail (not in the paper).
FILM_BYTES, GROUP_BYTES = 2_000_000, 4_600_000
SCRIPTS = ("dom.js", "curves.js", "stage.js", "words.js", "groups.js", "page.js")
_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}


def page_data(runs: Sequence[LoadedRun]) -> dict[str, Any]:
    """All data of a page, as JSON can hold it.

    Returns:
        ``runs`` (name, facts, settings, curves, levels, times, notes), ``groups`` (`group_view` with the number of the
        run and the comparison to the question's other groups), ``films`` (pictures by name as data addresses).
    """
    groups: list[dict[str, Any]] = []
    for number, run in enumerate(runs):
        settings = ViewSettings.of(run.settings)
        own = [{"run": number, **group_view(record, settings)} for record in run.groups]
        _compare_steps(own, run.groups)
        groups += own
    films = _films(runs, groups)  # sets ``film`` of the groups
    return {
        "made": {"version": __version__, "at": datetime.now(UTC).isoformat(timespec="seconds")},
        "runs": [_run_view(run) for run in runs],
        "groups": _fitted(groups),
        "films": films,
    }


def write_page(file: Path, runs: Sequence[LoadedRun]) -> Path:
    """Write the page, and its data beside it as .json, each whole or not at all; returns the page's path.

    Raises:
        RecordError: they cannot be written.
    """
    data = page_data(runs)
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    title = " · ".join(run["name"] for run in data["runs"]) or "spotlight"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file.with_suffix(".json"), text + "\n")
        atomic_write(file, render(text, title))
    except OSError as error:
        raise unwritable(file, error) from error
    return file


def render(data: str, title: str) -> str:
    """The page around its data, a JSON text in ASCII."""
    environment = Environment(loader=PackageLoader("appo.reports", "pages"), autoescape=True, undefined=StrictUndefined)
    pages = resources.files("appo.reports") / "pages"
    scripts = [(pages / name).read_text(encoding="utf-8") for name in SCRIPTS]
    return environment.get_template("spotlight.html.jinja").render(
        title=title,
        style=(pages / "spotlight.css").read_text(encoding="utf-8"),
        script='"use strict";\n{\n' + "\n".join(scripts) + "\n}",
        data=embeddable(data),
    )


def embeddable(data: str) -> str:
    """A JSON text in ASCII that can stand in a script element: no markup can begin or end in it."""
    for character, escape in _ESCAPES.items():
        data = data.replace(character, escape)
    return data


def _run_view(run: LoadedRun) -> dict[str, Any]:
    return {
        "name": clean(run.name, NAME_LENGTH),
        "facts": run_facts(run.about, run.settings, run.metrics),
        "settings": run_settings(run.settings),
        "curves": run_curves(run.metrics),
        "levels": run_levels(run.evaluation),
        "times": run_times(run.metrics),
        "notes": [clean(note, 2 * NAME_LENGTH) for note in run.notes],
    }


def _compare_steps(groups: Sequence[dict[str, Any]], records: Sequence[RolloutRecord]) -> None:
    """Add to each group the steps of the question's other groups, and the change since the first.

    ``won``: less than half right at first, at least half now. ``lost``: at least half at first, less now.
    """
    same: dict[tuple[str, str, str], list[int]] = {}
    for number, record in enumerate(records):
        same.setdefault((record.id, record.question, record.video), []).append(number)
    for numbers in same.values():
        numbers.sort(key=lambda number: records[number].step)
        steps, shares = [groups[one]["step"] for one in numbers], [_share(groups[one]) for one in numbers]
        first = shares[0]
        for number, share in zip(numbers, shares, strict=True):
            group = groups[number]
            known = first is not None and share is not None
            group["steps"], group["shares"] = steps, shares
            group["key"] = f"{group['run']}/{numbers[0]}"
            group["change"] = round(share - first, 4) if known else None  # type: ignore[operator]
            group["won"] = known and first < 0.5 <= share  # type: ignore[operator]
            group["lost"] = known and share < 0.5 <= first  # type: ignore[operator]
            group["allWrong"] = share == 0
            group["interest"] = _interest(group)


def _share(group: Mapping[str, Any]) -> float | None:
    return round(group["right"] / group["judged"], 4) if group["judged"] else None


def _films(runs: Sequence[LoadedRun], groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The pictures of the groups, together at most `FILM_BYTES`; ``film`` of a group without one becomes None."""
    pictures = {(number, name): data for number, run in enumerate(runs) for name, data in run.films.items()}
    size = sum(map(len, pictures.values()))
    share = min(1.0, FILM_BYTES / size) if size else 1.0
    films = {}
    for (number, name), data in pictures.items():
        if view := _film(data, share):
            films[f"{number}/{clean(name, NAME_LENGTH)}"] = view
    for group in groups:
        name = f"{group['run']}/{clean(group['film'], NAME_LENGTH)}"
        group["film"] = name if name in films else None
    return films


def _film(data: bytes, share: float) -> dict[str, Any] | None:
    """A picture as a data address, scaled to about `share` of its bytes; None if it is no picture."""
    try:
        with Image.open(io.BytesIO(data), formats=("WEBP",)) as opened:
            picture: Image.Image = opened.convert("RGB")
            if share < 1:
                scale = 0.9 * math.sqrt(share)
                picture = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
                buffer = io.BytesIO()
                picture.save(buffer, "WEBP", quality=50, method=4)
                data = buffer.getvalue()
            size = {"width": picture.width, "height": picture.height}
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    return {"src": "data:image/webp;base64," + base64.b64encode(data).decode("ascii"), **size}


def _fitted(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups within `GROUP_BYTES`: if need be, the less interesting ones without their tokens."""
    sizes = [_size(group) for group in groups]
    if sum(sizes) <= GROUP_BYTES:
        return list(groups)
    fitted = [lean(group) for group in groups]
    left = GROUP_BYTES - sum(map(_size, fitted))
    for i in sorted(range(len(groups)), key=lambda i: groups[i]["interest"], reverse=True):
        cost = sizes[i] - _size(fitted[i])
        if cost <= left:
            left -= cost
            fitted[i] = groups[i]
    return fitted


def _size(group: Mapping[str, Any]) -> int:
    return len(json.dumps(group, separators=(",", ":")))


def _interest(group: Mapping[str, Any]) -> float:
    """How interesting a group is (not in the paper): changed, repeated, or winners attend to other frames."""
    score: float = 4.0 * group["won"] + 2.0 * group["lost"] + 2.0 * (len(group["steps"]) > 1)
    right, wrong = group["meanHeat"]["right"], group["meanHeat"]["wrong"]
    if right and wrong:
        frames = group["event"] or group["crucial"]
        score += 1 + max((right[frame] - wrong[frame] for frame in frames), default=0) / 50
    return round(score, 3)
