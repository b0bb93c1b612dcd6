"""`appo data check`: every fault of a dataset's annotations, videos and images, before a run meets it.

All rows are read, also behind faulty ones. Each file that they name is then decoded once, in worker processes; its
faults are reported for all rows that use it. For missing files a correction of the paths is searched.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from pathlib import Path, PurePath
from typing import NamedTuple

from appo.data.files import join
from appo.data.loading import MediaFiles, get_benchmark, id_fault, media_folder, media_of, read_each
from appo.data.row import DUPLICATE, NO_OPTION, OUT_OF_RANGE, UNREADABLE, Row, RowError
from appo.files import atomic_write
from appo.types import VideoQA, VideoSource
from appo.video.decode_worker import WorkerFailure, run_tasks
from appo.video.frame_cache import FrameCaching, cache_frames
from appo.video.probing import (
    BAD_IMAGE,
    LIMIT,
    MISSING,
    OUTSIDE,
    TOO_SHORT,
    UNDECODABLE,
    ImageFile,
    Media,
    MediaProbe,
    probe_media,
)

DURATION = "mismatched duration"
IN_ROWS = (UNREADABLE, NO_OPTION, OUT_OF_RANGE, DUPLICATE)
CATEGORIES = (*IN_ROWS, MISSING, UNDECODABLE, TOO_SHORT, DURATION, OUTSIDE, BAD_IMAGE)
# Annotated times are rounded: they may miss by this, or by this share of the video (not in the paper).
TOLERANCE_SECONDS, TOLERANCE_SHARE = 1.0, 0.05
MOST_FILES = 2_000_000  # under a folder, among which missing files are searched


@dataclass(frozen=True)
class Fault:
    """One fault."""

    category: str  # one of `CATEGORIES`
    message: str  # one line that names row, file, problem and fix
    rows: tuple[str, ...]  # the places of all rows concerned
    path: str = ""  # of the file; empty where only a row is at fault


class Use(NamedTuple):
    """What a row says about a file: the clip, the spans that show the answer, the duration of the whole video."""

    place: str
    source: Media
    spans: tuple[tuple[float, float], ...] = ()
    seconds: float | None = None


@dataclass
class Survey:
    """All rows, read: their faults, the uses of each file, and paths as the rows write them."""

    rows: int = 0
    faults: list[Fault] = field(default_factory=list)
    uses: dict[Media, list[Use]] = field(default_factory=lambda: defaultdict(list))
    written: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PathFix:
    """A correction that makes missing files exist."""

    videos: str = ""  # the folder to set as `videos`; empty: the annotations' paths must change
    prefix: str = ""  # start of those paths now
    replacement: str = ""  # what replaces the prefix, relative to `videos`
    found: int = 0  # how many of the files then exist
    files: int = 0  # all files

    def __str__(self) -> str:
        count = f"{self.found} of {self.files} files are then there"
        if self.videos:
            return f"set --videos {self.videos} ({count})"
        by = f"`{self.replacement}`" if self.replacement else "nothing"
        return f"in the annotations, replace `{self.prefix}` at the start of paths by {by} ({count})"


@dataclass(frozen=True)
class Report:
    """The result of a check."""

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
        """Faults by category, with zeros."""
        found = Counter(fault.category for fault in self.faults)
        return {category: found[category] for category in CATEGORIES}

    @property
    def good(self) -> int:
        """Rows without fault."""
        return self.rows - len({place for fault in self.faults for place in fault.rows})

    def write(self, path: Path) -> None:
        """Write the report as JSON."""
        whole = asdict(self) | {"good": self.good, "counts": self.counts, "fix": str(self.fix) if self.fix else None}
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(whole, indent=1, ensure_ascii=False) + "\n")


def check(
    name: str,
    annotations: str,
    videos: str | None = None,
    split: str | None = None,
    *,
    quick: bool = False,
    workers: int = 1,
    frame_caching: FrameCaching | None = None,
    on_progress: Callable[[int, int], None] = lambda done, files: None,
) -> Report:
    """Everything that is wrong with a dataset. The first four arguments are those of :func:`appo.data.read`.

    Args:
        quick: decode one frame of each video instead of all (all packets are read nevertheless).
        workers: processes that decode.
        frame_caching: where the frames of videos without fault are cached.
        on_progress: called with (files done, files) at the start and after each file; again from 1 while caching.

    Raises:
        ValueError, OSError: an unknown name or split, or no annotation file.
    """
    found = _survey(name, annotations, videos, split)
    existing, missing = _split_missing(found.uses)
    faults = [*found.faults, *(_missing_fault(media, found.uses[media]) for media in missing)]
    folder = media_folder(annotations, videos)
    fix = find_fix([media.path for media in missing], [media.path for media in existing], folder, found.written)
    on_progress(0, len(existing))
    for done, (media, probe) in enumerate(_probe_all(existing, found.uses, quick, workers), start=1):
        faults += _faults_of_file(media, probe, found.uses[media])
        on_progress(done, len(existing))
    if frame_caching:
        bad = {fault.path for fault in faults}
        sources = [source for media in existing if media.path not in bad for source in _sources(found.uses[media])]
        tasks = ((source, frame_caching) for source in sources)
        for done, ((source, _), result) in enumerate(run_tasks(cache_frames, tasks, workers, LIMIT), start=1):
            if isinstance(result, WorkerFailure):
                result = f"{source.path}: no frames are cached ({result.reason})"
            if result:
                faults.append(_file_fault(UNDECODABLE, result, source, found.uses[source.whole]))
            on_progress(done, len(sources))
    faults.sort(key=lambda fault: CATEGORIES.index(fault.category))
    return Report(name, annotations, folder, split, quick, found.rows, len(found.uses), faults, fix)


def _survey(name: str, annotations: str, videos: str | None, split: str | None) -> Survey:
    found, folder, benchmark = Survey(), media_folder(annotations, videos), get_benchmark(name)
    place_of_id: dict[str, str] = {}
    place_of_content: dict[int, str] = {}
    for row, question in read_each(name, annotations, videos, split):
        found.rows += 1
        if not isinstance(question, VideoQA):
            category = question.category if isinstance(question, RowError) else MISSING
            found.faults.append(Fault(category, str(question), (row.place,)))
            continue
        _note_media(found, row, question, folder)
        content = hash((question.video, question.image, question.question, question.answer, question.options))
        same = place_of_content.setdefault(content, row.place)
        duplicate = id_fault(row, question, place_of_id)
        if not duplicate and same is not row.place:
            problem = f"question, video and answer were there before ({same})"
            duplicate = row.error(problem, "leave one of the two out", DUPLICATE)
        for fault in (benchmark.answer_fault(row, question), duplicate):
            if fault:
                found.faults.append(Fault(fault.category, str(fault), (row.place,)))
    return found


def _note_media(found: Survey, row: Row, question: VideoQA, folder: str) -> None:
    if question.video:
        stated = question.metadata.get("duration")
        seconds = float(stated) if isinstance(stated, (int, float)) and not isinstance(stated, bool) else None
        found.uses[question.video.whole].append(Use(row.place, question.video, question.spans, seconds))
    if question.image:
        image = ImageFile(question.image)
        found.uses[image].append(Use(row.place, image))
    # A path as the row writes it, where that is more than what follows the folder: ``./a/x.mp4``.
    for path, _ in media_of(question):
        name = os.path.basename(path)
        for text in row.fields.values():
            alike = isinstance(text, str) and text.endswith(name) and not path.endswith(f"/{text}")
            if alike and join(folder, text) == path:
                found.written[path] = text


def _split_missing(uses: Iterable[Media]) -> tuple[list[Media], list[Media]]:
    """The files that exist in some form, and those that do not."""
    files = MediaFiles()
    existing: list[Media] = []
    missing: list[Media] = []
    for media in uses:
        # What exists but is no plain file (a folder, a broken link) is opened, so that its error says what it is.
        is_folder = isinstance(media, VideoSource) and media.frames_fps is not None
        exists = files.has(media.path, is_folder) or os.path.lexists(media.path)
        (existing if exists else missing).append(media)
    return existing, missing


def _missing_fault(media: Media, uses: Sequence[Use]) -> Fault:
    is_image = isinstance(media, ImageFile)
    what = "image" if isinstance(media, ImageFile) else "folder" if media.frames_fps else "video"
    problem = f"there is no {what} {media.path}; check --videos, the folder that paths start from"
    return _file_fault(BAD_IMAGE if is_image else MISSING, problem, media, uses)


def _probe_all(
    files: Sequence[Media], uses: Mapping[Media, Sequence[Use]], quick: bool, workers: int
) -> Iterator[tuple[Media, MediaProbe]]:
    tasks = ((media, _sources(uses[media]), quick) for media in files)
    for (media, *_), result in run_tasks(probe_media, tasks, min(workers, max(1, len(files))), LIMIT):
        if isinstance(result, WorkerFailure):
            problem = f"{media.path}: cannot be decoded ({result.reason}); download it again, or leave its rows out"
            result = MediaProbe(category=BAD_IMAGE if isinstance(media, ImageFile) else UNDECODABLE, problem=problem)
        yield media, result


def _faults_of_file(media: Media, probe: MediaProbe, uses: Sequence[Use]) -> list[Fault]:
    """The faults of a file and of what its rows say about it."""
    if probe.category:
        return [_file_fault(probe.category, probe.problem, media, uses)]
    faults = []
    bad_clips = {source: (category, problem) for source, category, problem in probe.bad_clips}
    by_length: dict[float, list[Use]] = defaultdict(list)
    for use in uses:
        if use.source in bad_clips:
            category, problem = bad_clips[use.source]
            faults.append(_file_fault(category, problem, media, [use]))
        elif problem := _outside(use, probe.seconds):
            faults.append(_file_fault(OUTSIDE, f"{problem} of {media.path}; correct the row", media, [use]))
        if use.seconds is not None:
            by_length[use.seconds].append(use)
    for stated, users in by_length.items():
        if abs(stated - probe.seconds) > tolerance(probe.seconds):
            problem = f"the video is said to last {stated:g} s, but {media.path} lasts {probe.seconds:.2f} s"
            faults.append(_file_fault(DURATION, f"{problem}; take video and annotation of one release", media, users))
    return faults


def tolerance(seconds: float) -> float:
    """By how much an annotated time may miss in a video of this length."""
    return max(TOLERANCE_SECONDS, TOLERANCE_SHARE * seconds)


def _outside(use: Use, seconds: float) -> str:
    """Which clip or span of a row is not within a video of this length, or ""."""
    video = use.source
    if isinstance(video, ImageFile):
        return ""
    if video.end is not None and video.end > seconds + tolerance(seconds):
        return f"{video.clip} is not within the {seconds:.2f} s"
    # Spans count from the start of the clip.
    length = (seconds if video.end is None else min(video.end, seconds)) - (video.start or 0.0)
    for start, end in use.spans:
        if start >= length or end > length + tolerance(length):
            return f"the span [{start:g}, {end:g}] s is not within the {length:.2f} s that are shown"
    return ""


def _sources(uses: Sequence[Use]) -> list[VideoSource]:
    """The video and its clips in use, each once; nothing for an image."""
    return list(dict.fromkeys(use.source for use in uses if isinstance(use.source, VideoSource)))


def _file_fault(category: str, problem: str, media: Media, uses: Sequence[Use]) -> Fault:
    rows = tuple(use.place for use in uses)
    more = f" (and {len(rows) - 1} more)" if len(rows) > 1 else ""
    return Fault(category, f"{rows[0]}{more}: {problem}", rows, media.path)


def find_fix(
    missing: Collection[str], existing: Collection[str], videos: str, written: Mapping[str, str] | None = None
) -> PathFix | None:
    """The correction under which most of the missing files exist; None if there is none.

    A found file matches a missing one if its name is the same and no other file of the name shares more of the path.

    Args:
        missing: paths without file, as `videos` and the annotations give them.
        existing: paths with a file; a new `videos` must not lose them.
        videos: the folder that paths start from; it need not exist.
        written: paths as the annotations write them; default: what follows `videos`.
    """
    texts = {path: path.removeprefix(f"{videos.rstrip('/')}/") for path in missing} | dict(written or {})
    root = Path(os.path.abspath(videos))
    nearest = next(folder for folder in (root, *root.parents) if folder.is_dir())
    votes: Counter[tuple[str, ...]] = Counter()
    for base in (nearest, nearest.parent):
        if missing and not votes and base != Path(base.anchor):  # never a whole disk
            places = _files_named({PurePath(path).name for path in missing}, base)
            votes.update(filter(None, (_explain(path, texts[path], places, root) for path in missing)))
    files = len(missing) + len(existing)
    for (kind, *values), count in votes.most_common():
        if kind == "replace":
            return PathFix("", values[0], values[1], count + len(existing), files)
        still = sum(Path(values[0], os.path.relpath(path, root)).is_file() for path in existing)
        if count + still > len(existing):
            return PathFix(values[0], found=count + still, files=files)
    return None


def _files_named(names: Collection[str], base: Path) -> Mapping[str, list[tuple[str, ...]]]:
    """The paths, in parts, of the files of these names under a folder."""
    found: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    count = 0
    for folder, _, files in os.walk(base):
        count += len(files)
        if count > MOST_FILES:
            break
        for name in set(names).intersection(files):
            found[name].append((*Path(folder).parts, name))
    return found


def _explain(path: str, text: str, places: Mapping[str, list[tuple[str, ...]]], root: Path) -> tuple[str, ...] | None:
    """("videos", folder) or ("replace", prefix, replacement), under which a missing path becomes an existing file.

    ``text`` is the path as the annotations write it; the prefix is of it.
    """
    inside = not os.path.isabs(text) and os.path.abspath(path).startswith(str(root) + os.sep)
    wanted = Path(os.path.relpath(path, root)).parts if inside else Path(path).parts
    by_length = sorted(((_common_end(wanted, place), place) for place in places.get(wanted[-1], [])), reverse=True)
    if not by_length or (len(by_length) > 1 and by_length[0][0] == by_length[1][0]):
        return None  # none, or two equally good
    common, place = by_length[0]
    if inside and common == len(wanted):
        return "videos", str(Path(*place[:-common]))
    # The replacement should lie in the folder that paths start from: shorten the common part until it does.
    while common > 1 and place[: len(root.parts)] == root.parts and len(place) - common < len(root.parts):
        common -= 1
    new = os.path.relpath(Path(*place[:-common]), root)
    return "replace", _without_end(text, common), "" if new == os.curdir else f"{PurePath(new).as_posix()}/"


def _without_end(text: str, parts: int) -> str:
    """A path as written, without its last parts: `file:///tmp/` of `file:///tmp/a//x.mp4` without two."""
    names = re.split("(/)", text)  # each slash by itself, so that nothing is lost
    while names and parts:
        parts -= names.pop() not in ("", ".", "/")
    return "".join(names)


def _common_end(one: Sequence[str], other: Sequence[str]) -> int:
    """How many last parts two paths share."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
