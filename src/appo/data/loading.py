"""Benchmarks by name: annotation files -> :class:`appo.types.VideoQA` -> a table that trains.

Nothing here opens a video. A row that cannot be used raises, named by file and line; none is dropped. `read_each`
continues behind such a row: `appo data check` (:mod:`appo.data.validation`) lists them all.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from appo.data.benchmark import Benchmark
from appo.data.files import is_file, is_url, parent
from appo.data.jsonl import OwnQuestions
from appo.data.mvbench import MVBench
from appo.data.nextgqa import NextGQA
from appo.data.nextqa import NextQA
from appo.data.perception_test import PerceptionTest
from appo.data.row import DUPLICATE, Row, RowError
from appo.data.seed_bench_r1 import SeedBenchR1
from appo.data.spotlight import Spotlight
from appo.data.table import rows_of
from appo.data.video_r1 import VideoR1
from appo.data.vsi_bench import VSIBench
from appo.rewards.templates import FORMATS
from appo.types import VideoQA

if TYPE_CHECKING:
    from datasets import Dataset

# A new benchmark is its file and a name here.
BENCHMARKS: tuple[type[Benchmark], ...] = (
    SeedBenchR1, VideoR1, NextQA, NextGQA, PerceptionTest, VSIBench, MVBench, Spotlight, OwnQuestions,
)  # fmt: skip
DATASETS: dict[str, Benchmark] = {one.name: one() for one in BENCHMARKS}
LISTED_AFTER = 8  # look-ups in a folder before it is listed: one listing is cheaper than many look-ups
AnyPath = str | os.PathLike[str]


def get_benchmark(name: str | Benchmark) -> Benchmark:
    """The benchmark of a name; a benchmark of your own as it is.

    Raises:
        ValueError: there is none of that name.
    """
    if isinstance(name, Benchmark):
        return name
    if name not in DATASETS:
        raise ValueError(f"unknown dataset {name!r}; there are {', '.join(DATASETS)}")
    return DATASETS[name]


def read(
    name: str | Benchmark, annotations: AnyPath, videos: AnyPath | None = None, split: str | None = None
) -> Iterator[VideoQA]:
    """The questions of a benchmark, one after the other.

    Args:
        name: one of `DATASETS`, or a benchmark of your own.
        annotations: the annotation file, or the folder of it under its official name; ``hf://datasets/...`` and every
            other URL that fsspec knows work as well.
        videos: the local folder that the annotations' video paths start from; default: where the annotations lie.
        split: what part, one of the benchmark's `splits`.

    Raises:
        ValueError: name or split is unknown, or (while iterating) a row is not of the schema; names file and line.
        OSError: (while iterating) a file is missing.
    """
    return (question for _, question in _raised(read_each(name, annotations, videos, split)))


def load(
    name: str | Benchmark,
    annotations: AnyPath,
    videos: AnyPath | None = None,
    split: str | None = None,
    *,
    response_format: str | None = None,
    instruction: str | None = None,
) -> Dataset:
    """A dataset as the table that :class:`appo.APPOTrainer` trains on (columns: `rows_of`), checked.

    Beyond what `read` checks: ids are unique, every gold answer can be scored, and every video and image exists. No
    video is opened. The first four arguments are those of `read`.

    Args:
        response_format: that prompts request, one of `FORMATS`; default: what the benchmark's official score needs.
        instruction: closes every prompt; default: the one of the format. ``""`` leaves it out.

    Raises:
        ValueError: as `read`, or a check fails; names file, line and fix.
        OSError: an annotation file, a video or an image is missing.
    """
    response_format = response_format_of(name, response_format)
    table = rows_of(_with_media(answerable(name, annotations, videos, split)), instruction, response_format)
    if not len(table):
        raise ValueError(f"{os.fspath(annotations)}: holds no question" + (f" of split {split!r}" if split else ""))
    return table


load_dataset = load  # as `appo` exports it


def response_format_of(name: str | Benchmark, response_format: str | None = None) -> str:
    """The format that prompts request: the one given, else the one that the benchmark's official score needs.

    Raises:
        ValueError: it is none of :data:`appo.rewards.templates.FORMATS`, or there is no such benchmark.
    """
    usual = get_benchmark(name).response_format
    response_format = usual if response_format is None else response_format
    if response_format not in FORMATS:
        raise ValueError(f"response_format is {response_format!r}: it must be one of {', '.join(FORMATS)}")
    return response_format


def read_each(
    name: str | Benchmark, annotations: AnyPath, videos: AnyPath | None = None, split: str | None = None
) -> Iterator[tuple[Row, VideoQA | RowError | OSError]]:
    """Every row with its question, or with the error why there is none. Arguments as in `read`.

    Raises:
        ValueError: name or split is unknown, or (while iterating) a file is not of its format as a whole.
        OSError: (while iterating) an annotation file is missing.
    """
    benchmark, source = get_benchmark(name), os.fspath(annotations)
    if split is not None and split not in benchmark.splits:
        splits = f"the splits {', '.join(benchmark.splits)}" if benchmark.splits else "no splits: leave it out"
        raise ValueError(f"unknown split {split!r}; {benchmark.name} has {splits}")
    folder = media_folder(annotations, videos)
    if is_url(folder):
        raise ValueError(f"videos are looked for in {folder}, which is no local folder: download them, set `videos`")

    def walk() -> Iterator[tuple[Row, VideoQA | RowError | OSError]]:
        for row in benchmark.rows(source, split):
            try:
                yield row, row.fault or benchmark.question(row, folder, split)
            except RowError as error:
                yield row, error

    return walk()


def media_folder(annotations: AnyPath, videos: AnyPath | None = None) -> str:
    """The folder that video and image paths start from: `videos`, else where the annotations lie."""
    source = os.fspath(annotations)
    return os.fspath(videos) if videos is not None else parent(source) if is_file(source) else source


def _raised(found: Iterator[tuple[Row, VideoQA | RowError | OSError]]) -> Iterator[tuple[Row, VideoQA]]:
    """The same rows; the first error is raised."""
    for row, question in found:
        if not isinstance(question, VideoQA):
            raise question
        yield row, question


def answerable(
    name: str | Benchmark, annotations: AnyPath, videos: AnyPath | None = None, split: str | None = None
) -> Iterator[tuple[Row, VideoQA]]:
    """Every row with its question. Arguments as in `read`.

    Raises:
        ValueError, OSError: as `read`, or a row cannot be scored, or its id was there before; names file and line.
    """
    fault_of = get_benchmark(name).answer_fault
    place_of: dict[str, str] = {}
    for row, question in _raised(read_each(name, annotations, videos, split)):
        if fault := id_fault(row, question, place_of) or fault_of(row, question):
            raise fault
        yield row, question


def id_fault(row: Row, question: VideoQA, place_of: dict[str, str]) -> RowError | None:
    """The error that a question's id was there before, or None; `place_of` maps each id to its row, and is updated."""
    first = place_of.setdefault(question.id, row.place)
    if first is row.place:
        return None
    return row.error(f"id {question.id!r} was there before ({first})", "give every question its own id", DUPLICATE)


def _with_media(found: Iterator[tuple[Row, VideoQA]]) -> Iterator[VideoQA]:
    """The questions; missing files are counted and raised at the end."""
    media = MediaFiles()
    first_missing = ""
    for row, question in found:
        for path, is_folder in media_of(question):
            if not media.has(path, is_folder) and not first_missing:
                first_missing = f"{row.place}: there is no {path}"
        yield question
    if first_missing:
        count = f"{len(media.missing)} of {len(media.existing) + len(media.missing)} video and image files are missing"
        fix = "check `videos`, the folder that paths start from; `appo data check` finds it"
        raise FileNotFoundError(f"{first_missing} ({count}); {fix}")


def media_of(question: VideoQA) -> list[tuple[str, bool]]:
    """The paths of a question's video and image, each with whether it is a folder of frames."""
    video = [(question.video.path, question.video.frames_fps is not None)] if question.video else []
    return [*video, (question.image, False)] if question.image else video


class MediaFiles:
    """Looks files up, each once, and lists folders with many look-ups. No file is opened.

    Attributes:
        existing: the paths looked up that exist.
        missing: those that do not.
    """

    def __init__(self) -> None:
        self.existing: set[str] = set()
        self.missing: set[str] = set()
        self._lookups: Counter[str] = Counter()
        self._listings: dict[str, frozenset[str]] = {}

    def has(self, path: str, is_folder: bool = False) -> bool:
        """Whether there is such a file, or folder of frames."""
        if path not in self.existing and path not in self.missing:
            exists = os.path.isdir(path) if is_folder else self._is_file(path)
            (self.existing if exists else self.missing).add(path)
        return path in self.existing

    def _is_file(self, path: str) -> bool:
        folder, name = os.path.split(path)
        if folder not in self._listings:
            self._lookups[folder] += 1
            if self._lookups[folder] <= LISTED_AFTER:
                return os.path.isfile(path)
            self._listings[folder] = _files_in(folder)
        # A name that is not listed may still exist: in another case of letters, on some file systems.
        return name in self._listings[folder] or os.path.isfile(path)


def _files_in(folder: str) -> frozenset[str]:
    """The names of the plain files in a folder; links are looked up one by one."""
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if entry.is_file(follow_symlinks=False))
    except OSError:
        return frozenset()
