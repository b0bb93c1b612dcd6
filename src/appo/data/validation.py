"""`appo data check`: everything that is wrong with a dataset's annotations, videos and images, before a run meets it.

Rows are read one after the other, none ends the walk. Each file that they name is then decoded once, however many
questions ask about it, in processes of their own. What is found about files is said for the rows that show them.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from appo.data.files import join
from appo.data.loading import get_benchmark, id_fault, media_folder, read_each
from appo.data.media import MediaFiles, media_of
from appo.data.relocating import PathFix, find_fix
from appo.data.row import DUPLICATE, NO_OPTION, OUT_OF_RANGE, UNREADABLE, Row, RowError
from appo.files import atomic_write
from appo.types import VideoQA, VideoSource
from appo.video.caching import Keeping, keep
from appo.video.probing import (
    BAD_IMAGE,
    LIMIT,
    MISSING,
    OUTSIDE,
    TOO_SHORT,
    UNDECODABLE,
    ImageFile,
    Media,
    Probe,
    probe,
)
from appo.video.workers import Lost, run_tasks

DURATION = "mismatched duration"
IN_ROWS = (UNREADABLE, NO_OPTION, OUT_OF_RANGE, DUPLICATE)
CATEGORIES = (*IN_ROWS, MISSING, UNDECODABLE, TOO_SHORT, DURATION, OUTSIDE, BAD_IMAGE)
# Annotated times are rounded, also to whole seconds: they may miss by this, or by this share of the video («ours»).
TOLERANCE_SECONDS, TOLERANCE_SHARE = 1.0, 0.05


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        category: one of `CATEGORIES`.
        message: one line that names row, file, problem and fix.
        rows: all rows that it is about.
        path: the file that it is about; empty where it is about a row alone.
    """

    category: str
    message: str
    rows: tuple[str, ...]
    path: str = ""


class Use(NamedTuple):
    """What a row shows of a file: the spans in which the answer is seen, and how long the whole is said to be."""

    place: str
    shown: Media
    spans: tuple[tuple[float, float], ...] = ()
    seconds: float | None = None


@dataclass
class Survey:
    """What the rows say.

    Attributes:
        rows: how many there are.
        faults: what is wrong with them.
        uses: the files that they show, and who shows them.
        written: paths of files as the rows write them.
    """

    rows: int = 0
    faults: list[Fault] = field(default_factory=list)
    uses: dict[Media, list[Use]] = field(default_factory=lambda: defaultdict(list))
    written: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What a check found."""

    dataset: str
    annotations: str
    videos: str
    split: str | None
    quick: bool
    rows: int
    files: int
    faults: Sequence[Fault]
    fix: PathFix | None

    @property
    def counts(self) -> dict[str, int]:
        """Faults by category, none left out."""
        found = Counter(fault.category for fault in self.faults)
        return {category: found[category] for category in CATEGORIES}

    @property
    def good(self) -> int:
        """Rows with which nothing is wrong."""
        return self.rows - len({place for fault in self.faults for place in fault.rows})

    def write(self, path: Path) -> None:
        """All of it as JSON."""
        whole = asdict(self) | {"good": self.good, "counts": self.counts, "fix": str(self.fix) if self.fix else None}
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(whole, indent=1, ensure_ascii=False) + "\n")


def survey(name: str, annotations: str, videos: str | None, split: str | None) -> Survey:
    """Read all rows.

    Raises:
        ValueError, OSError: as :func:`appo.data.read_each`: there is nothing to walk over.
    """
    found, folder, dataset = Survey(), media_folder(annotations, videos), get_benchmark(name)
    place_of_id: dict[str, str] = {}
    place_of_content: dict[int, str] = {}
    for row, question in read_each(name, annotations, videos, split):
        found.rows += 1
        if not isinstance(question, VideoQA):
            category = question.category if isinstance(question, RowError) else MISSING
            found.faults.append(Fault(category, str(question), (row.place,)))
            continue
        _note_media(found, row.place, question)
        _note_written(found, row, question, folder)
        if fault := dataset.answer_fault(row, question):
            found.faults.append(Fault(fault.category, str(fault), (row.place,)))
        same = place_of_content.setdefault(_content(question), row.place)
        if fault := id_fault(row, question, place_of_id):
            found.faults.append(Fault(fault.category, str(fault), (row.place,)))
        elif same is not row.place:
            error = row.error(f"question, video and answer were there before ({same})", "leave one of the two out")
            found.faults.append(Fault(DUPLICATE, str(error), (row.place,)))
    return found


def _content(question: VideoQA) -> int:
    return hash((question.video, question.image, question.question, question.answer, question.options))


def _note_media(found: Survey, place: str, question: VideoQA) -> None:
    if question.video:
        stated = question.metadata.get("duration")
        seconds = float(stated) if isinstance(stated, (int, float)) and not isinstance(stated, bool) else None
        found.uses[question.video.whole].append(Use(place, question.video, question.spans, seconds))
    if question.image:
        image = ImageFile(question.image)
        found.uses[image].append(Use(place, image))


def _note_written(found: Survey, row: Row, question: VideoQA, folder: str) -> None:
    """Keep a file's path as the row writes it, where that is more than what follows the folder: ``./a/x.mp4``."""
    for path, _ in media_of(question):
        name = os.path.basename(path)
        for text in row.fields.values():
            alike = isinstance(text, str) and text.endswith(name) and not path.endswith(f"/{text}")
            if alike and join(folder, text) == path:
                found.written[path] = text


def split_missing(uses: Iterable[Media]) -> tuple[list[Media], list[Media]]:
    """The files that are there in some form, and those that are not."""
    files = MediaFiles()
    there: list[Media] = []
    gone: list[Media] = []
    for media in uses:
        # What is there but no plain file (a folder, a link that leads nowhere) is opened, which says what it is.
        is_folder = isinstance(media, VideoSource) and media.frames_fps is not None
        found = files.has(media.path, is_folder) or os.path.lexists(media.path)
        (there if found else gone).append(media)
    return there, gone


def missing_fault(media: Media, uses: Sequence[Use]) -> Fault:
    """The fault of a file that is not there."""
    what = "image" if isinstance(media, ImageFile) else "folder" if media.frames_fps else "video"
    category = BAD_IMAGE if isinstance(media, ImageFile) else MISSING
    problem = f"there is no {what} {media.path}; check --videos, the folder that paths start from"
    return _file_fault(category, problem, media, uses)


def probe_all(
    files: Sequence[Media], uses: Mapping[Media, Sequence[Use]], quick: bool, workers: int
) -> Iterator[tuple[Media, Probe]]:
    """Decode every file, as they come; one that hangs or crashes the decoder has that as its problem."""
    tasks = ((media, _sources(uses[media]), quick) for media in files)
    for (media, *_), result in run_tasks(probe, tasks, min(workers, max(1, len(files))), LIMIT):
        if isinstance(result, Lost):
            problem = f"{media.path}: cannot be decoded ({result.reason}); download it again, or leave its rows out"
            result = Probe(category=BAD_IMAGE if isinstance(media, ImageFile) else UNDECODABLE, problem=problem)
        yield media, result


def judge(media: Media, found: Probe, uses: Sequence[Use]) -> list[Fault]:
    """What is wrong with a file and with what its rows say about it."""
    if found.category:
        return [_file_fault(found.category, found.problem, media, uses)]
    faults = []
    bad_clips = {source: (category, problem) for source, category, problem in found.bad_clips}
    for use in uses:
        if use.shown in bad_clips:
            category, problem = bad_clips[use.shown]
            faults.append(_file_fault(category, problem, media, [use]))
        elif problem := _outside(use, found.seconds):
            faults.append(_file_fault(OUTSIDE, f"{problem} of {media.path}; correct the row", media, [use]))
    by_length: dict[float, list[Use]] = defaultdict(list)
    for use in uses:
        if use.seconds is not None:
            by_length[use.seconds].append(use)
    for stated, users in by_length.items():
        if abs(stated - found.seconds) > tolerance(found.seconds):
            problem = f"the video is said to last {stated:g} s, but {media.path} lasts {found.seconds:.2f} s"
            faults.append(_file_fault(DURATION, f"{problem}; take video and annotation of one release", media, users))
    return faults


def tolerance(seconds: float) -> float:
    """By how much an annotated time may miss in a video of this length."""
    return max(TOLERANCE_SECONDS, TOLERANCE_SHARE * seconds)


def _outside(use: Use, seconds: float) -> str:
    """Which clip of a row is not within a video of this length, or which span not within what is shown of it, or ""."""
    video = use.shown
    if isinstance(video, ImageFile):
        return ""
    if video.end is not None and video.end > seconds + tolerance(seconds):
        return f"{video.clip} is not within the {seconds:.2f} s"
    # Spans count from where a clip starts.
    shown = (seconds if video.end is None else min(video.end, seconds)) - (video.start or 0.0)
    for start, end in use.spans:
        if start >= shown or end > shown + tolerance(shown):
            return f"the span [{start:g}, {end:g}] s is not within the {shown:.2f} s that are shown"
    return ""


def _sources(uses: Sequence[Use]) -> list[VideoSource]:
    """What is shown of a video, whole or in clips, each once; nothing of an image."""
    return list(dict.fromkeys(use.shown for use in uses if isinstance(use.shown, VideoSource)))


def _keep_all(
    sources: Sequence[VideoSource], uses: Mapping[Media, Sequence[Use]], keeping: Keeping, workers: int
) -> Iterator[Fault | None]:
    """Put what is shown into the cache, as they come; the fault of each that cannot be, None for the others."""
    tasks = ((source, keeping) for source in sources)
    for (source, _), result in run_tasks(keep, tasks, workers, LIMIT):
        problem = f"{source.path}: no frames are kept ({result.reason})" if isinstance(result, Lost) else result
        yield _file_fault(UNDECODABLE, problem, source, uses[source.whole]) if problem else None


def _file_fault(category: str, problem: str, media: Media, uses: Sequence[Use]) -> Fault:
    rows = tuple(use.place for use in uses)
    more = f" (and {len(rows) - 1} more)" if len(rows) > 1 else ""
    return Fault(category, f"{rows[0]}{more}: {problem}", rows, media.path)


def check(
    name: str,
    annotations: str,
    videos: str | None = None,
    split: str | None = None,
    *,
    quick: bool = False,
    workers: int = 1,
    keeping: Keeping | None = None,
    on_file: Any = None,
) -> Report:
    """Everything that is wrong with a dataset.

    Args:
        name: as in :func:`appo.data.read`.
        annotations: as there.
        videos: as there.
        split: as there.
        quick: decode one frame of each video instead of all (all packets are read nevertheless).
        workers: processes that decode.
        keeping: which frames of the videos without fault are put into a cache.
        on_file: called with (files done, files) at the start and after each; again from 1 for those put into a cache.

    Raises:
        ValueError, OSError: there is nothing to walk over: an unknown name or split, no annotation file.
    """
    found = survey(name, annotations, videos, split)
    there, gone = split_missing(found.uses)
    faults = [*found.faults, *(missing_fault(media, found.uses[media]) for media in gone)]
    folder = media_folder(annotations, videos)
    missing = [media.path for media in gone]
    written = {path: found.written[path] for path in missing if path in found.written}
    fix = find_fix(missing, [media.path for media in there], folder, written) if gone else None
    tell = on_file or (lambda done, files: None)
    tell(0, len(there))
    for done, (media, result) in enumerate(probe_all(there, found.uses, quick, workers), start=1):
        faults += judge(media, result, found.uses[media])
        tell(done, len(there))
    if keeping:
        bad = {fault.path for fault in faults}
        shown = [source for media in there if media.path not in bad for source in _sources(found.uses[media])]
        for done, fault in enumerate(_keep_all(shown, found.uses, keeping, workers), start=1):
            faults += [fault] if fault else []
            tell(done, len(shown))
    faults.sort(key=lambda fault: CATEGORIES.index(fault.category))
    return Report(name, annotations, folder, split, quick, found.rows, len(found.uses), faults, fix)
