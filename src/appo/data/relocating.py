"""Where missing files are: which setting, or which change of the annotations' paths, makes them resolve."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

MOST_ENTRIES = 2_000_000  # files looked at under a folder; more are left alone

Parts = tuple[str, ...]


@dataclass(frozen=True)
class PathFix:
    """What makes missing files resolve.

    Attributes:
        videos: the folder to set as `videos`; empty: the annotations' paths must change.
        prefix: what those paths start with now,
        replacement: and what they should start with instead, counted from `videos`.
        found: how many of the files are then there,
        files: of how many.
    """

    videos: str = ""
    prefix: str = ""
    replacement: str = ""
    found: int = 0
    files: int = 0

    def __str__(self) -> str:
        count = f"{self.found} of {self.files} files are then there"
        if self.videos:
            return f"set --videos {self.videos} ({count})"
        by = f"`{self.replacement}`" if self.replacement else "nothing"
        return f"in the annotations, replace `{self.prefix}` at the start of paths by {by} ({count})"


def find_fix(
    missing: Collection[str], there: Collection[str], videos: str, written: Mapping[str, str] | None = None
) -> PathFix | None:
    """The change under which most of the missing files are there.

    A file is taken for a missing one if both have the same name and no other of that name has more of the path in
    common; the same prefix then explains them all.

    Args:
        missing: paths that lead nowhere, as `videos` and the annotations make them.
        there: paths that do lead to a file; a new `videos` must not lose them.
        videos: the folder that paths start from; it may not exist itself.
        written: missing paths as they stand in the annotations; default: what follows `videos`.
    """
    texts = {path: path.removeprefix(f"{videos.rstrip('/')}/") for path in missing} | dict(written or {})
    root = Path(os.path.abspath(videos))
    votes: Counter[tuple[str, ...]] = Counter()
    for base in _places_to_look(root):
        places = _files_named({PurePath(path).name for path in missing}, base)
        votes.update(filter(None, (_explain(path, texts[path], places, root) for path in missing)))
        if votes:
            break
    files = len(missing) + len(there)
    for (kind, *values), count in votes.most_common():
        if kind == "replace":
            return PathFix("", values[0], values[1], count + len(there), files)
        kept = sum(Path(values[0], os.path.relpath(path, root)).is_file() for path in there)
        if count + kept > len(there):
            return PathFix(values[0], found=count + kept, files=files)
    return None


def _places_to_look(root: Path) -> Iterator[Path]:
    """The folder, or the nearest there is, and then the one above; never a whole disk."""
    nearest = next(folder for folder in (root, *root.parents) if folder.is_dir())
    for folder in (nearest, nearest.parent):
        if folder != Path(folder.anchor):
            yield folder


def _files_named(names: Collection[str], base: Path) -> Mapping[str, list[Parts]]:
    """Where files of these names lie."""
    found: dict[str, list[Parts]] = defaultdict(list)
    seen = 0
    for folder, _, files in os.walk(base):
        seen += len(files)
        if seen > MOST_ENTRIES:
            break
        for name in names & set(files) if isinstance(names, set) else set(names) & set(files):
            found[name].append((*Path(folder).parts, name))
    return found


def _explain(path: str, text: str, places: Mapping[str, list[Parts]], root: Path) -> tuple[str, ...] | None:
    """("videos", folder) or ("replace", prefix, replacement), by which a missing path becomes a file that is there.

    ``text`` is the path as the annotations write it, of which the prefix is.
    """
    inside = not os.path.isabs(text) and os.path.abspath(path).startswith(str(root) + os.sep)
    wanted: Parts = Path(os.path.relpath(path, root)).parts if inside else Path(path).parts
    by_length = sorted(((_common_end(wanted, place), place) for place in places.get(wanted[-1], [])), reverse=True)
    if not by_length or (len(by_length) > 1 and by_length[0][0] == by_length[1][0]):
        return None  # nothing, or two that are as good
    common, place = by_length[0]
    if inside and common == len(wanted):
        return "videos", str(Path(*place[:-common]))
    # What is put in front should lie in the folder that paths start from: shorten what they have in common until so.
    while common > 1 and place[: len(root.parts)] == root.parts and len(place) - common < len(root.parts):
        common -= 1
    new = os.path.relpath(Path(*place[:-common]), root)
    return "replace", _without_end(text, common), "" if new == os.curdir else f"{PurePath(new).as_posix()}/"


def _without_end(text: str, parts: int) -> str:
    """A path as it is written, without its last parts: `file:///tmp/` of `file:///tmp/a//x.mp4` without two."""
    names = re.split("(/)", text)  # each slash by itself, so that nothing is lost
    while names and parts:
        parts -= names.pop() not in ("", ".", "/")
    return "".join(names)


def _common_end(one: Parts, other: Parts) -> int:
    """How many last parts two paths have in common."""
    count = 0
    while count < min(len(one), len(other)) and one[-1 - count] == other[-1 - count]:
        count += 1
    return count
