"""What a figure shows: the points of its curves and its words."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

SVG = "{http://www.w3.org/2000/svg}"
Points = list[tuple[float, float]]


def curves_of(svg: str) -> dict[str, Points]:
    """By id, the points of each curve in the SVG's units; y grows downwards."""
    curves = [group for group in ET.fromstring(svg).iter(f"{SVG}g") if group.get("id", "").startswith("curve-")]
    return {str(curve.get("id")): _points(str(curve.find(f"{SVG}path").attrib["d"])) for curve in curves}  # type: ignore[union-attr]


def words_of(svg: str) -> list[str]:
    """Every text in the order of the file."""
    return [str(element.text) for element in ET.fromstring(svg).iter(f"{SVG}text")]


def size_of(svg: str) -> tuple[float, float]:
    """Width and height."""
    _, _, width, height = map(float, ET.fromstring(svg).attrib["viewBox"].split())
    return width, height


def _points(path: str) -> Points:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path)]
