"""Which video and image files there are. Nothing is opened."""

from __future__ import annotations

import os
from collections import Counter

from appo.types import VideoQA

LISTED_AFTER = 8  # files asked for in a folder before it is listed: one listing is cheaper than many looks


def media_of(question: VideoQA) -> list[tuple[str, bool]]:
    """The paths that a question shows, each with whether it is a folder of frames."""
    video = question.video
    shown = [(video.path, video.frames_fps is not None)] if video else []
    return [*shown, (question.image, False)] if question.image else shown


class MediaFiles:
    """Looks files up, each once; folders that are asked about often are listed.

    Attributes:
        missing: the paths asked for that are not there.
    """

    def __init__(self) -> None:
        self.missing: set[str] = set()
        self._found: set[str] = set()
        self._looks: Counter[str] = Counter()
        self._listings: dict[str, frozenset[str]] = {}

    @property
    def asked(self) -> int:
        """How many different paths were asked for."""
        return len(self._found) + len(self.missing)

    def has(self, path: str, is_folder: bool = False) -> bool:
        """Whether there is such a file, or folder of frames."""
        if path in self._found:
            return True
        if path in self.missing:
            return False
        there = os.path.isdir(path) if is_folder else self._is_file(path)
        (self._found if there else self.missing).add(path)
        return there

    def _is_file(self, path: str) -> bool:
        folder, name = os.path.split(path)
        if folder not in self._listings:
            self._looks[folder] += 1
            if self._looks[folder] <= LISTED_AFTER:
                return os.path.isfile(path)
            self._listings[folder] = _files_in(folder)
        # What a listing does not have may still be there: under another case of letters on some file systems.
        return name in self._listings[folder] or os.path.isfile(path)


def _files_in(folder: str) -> frozenset[str]:
    """The names of the plain files in a folder; links are left to be looked at one by one."""
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if entry.is_file(follow_symlinks=False))
    except OSError:
        return frozenset()
