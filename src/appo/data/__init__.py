"""Datasets by name: annotation files -> :class:`appo.types.VideoQA` -> a table that trains. See docs/data.md.

The same object is asked in training and in evaluation, and `score_answer` scores it in both. Each
dataset is one small module with ``rows`` (files -> rows that know where they stand) and ``question`` (row -> VideoQA).
Nothing here opens a video. A row that cannot be used raises, named by file and line; none is dropped. `read_each` goes
on behind such a row: `appo data check` (:mod:`appo.data.validation`) lists them all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

from appo.data import (
    jsonl,
    mvbench,
    nextgqa,
    nextqa,
    perception_test,
    seed_bench_r1,
    spotlight,
    video_r1,
    vsi_bench,
)
from appo.data.choices import LETTERS
from appo.data.files import is_file, is_url, parent
from appo.data.media import MediaFiles, media_of
from appo.data.row import DUPLICATE, NO_OPTION, UNREADABLE, Row, RowError
from appo.data.table import rows_of
from appo.rewards.functions import comparison
from appo.rewards.templates import FORMATS
from appo.types import VideoQA

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["DATASETS", "OFFICIAL_FORMATS", "load", "read", "read_each", "rows_of"]

DATASETS: dict[str, ModuleType] = {
    "seed-bench-r1": seed_bench_r1,
    "video-r1": video_r1,
    "nextqa": nextqa,
    "nextgqa": nextgqa,
    "perception-test": perception_test,
    "vsi-bench": vsi_bench,
    "mvbench": mvbench,
    "spotlight": spotlight,
    "jsonl": jsonl,
}
# What the official score of a dataset reads beside the answer; all others read the answer alone.
OFFICIAL_FORMATS = {"nextgqa": "grounded"}
AnyPath = str | os.PathLike[str]


def read(name: str, annotations: AnyPath, videos: AnyPath | None = None, split: str | None = None) -> Iterator[VideoQA]:
    """The questions of a dataset, one after the other.

    Args:
        name: one of `DATASETS`.
        annotations: the annotation file, or the folder of it under its official name; ``hf://datasets/...`` and every
            other URL that fsspec knows work as well.
        videos: the local folder that the annotations' video paths start from; default: where the annotations lie.
        split: what part; the names depend on the dataset (docs/data.md).

    Raises:
        ValueError: name or split is unknown, or (while iterating) a row is not of the schema; names file and line.
        OSError: (while iterating) a file is missing.
    """
    return (question for _, question in _raised(read_each(name, annotations, videos, split)))


def load(
    name: str,
    annotations: AnyPath,
    videos: AnyPath | None = None,
    split: str | None = None,
    *,
    response_format: str | None = None,
    instruction: str | None = None,
) -> Dataset:
    """A dataset as the table that :class:`appo.APPOTrainer` trains on (columns: `rows_of`), checked.

    Beyond what `read` checks: ids are unique, every gold answer can be scored, and every video and image exists. No
    video is opened.

    Args:
        name: as in `read`.
        annotations: as in `read`.
        videos: as in `read`.
        split: as in `read`.
        response_format: what the policy is asked to write, one of `FORMATS`; default: what the
            dataset's official score needs (`OFFICIAL_FORMATS`).
        instruction: closes every prompt; default: the one that asks for the format. ``""`` leaves it out.

    Raises:
        ValueError: as `read`, or a check fails; names file, line and fix.
        OSError: an annotation file, a video or an image is missing.
    """
    asked = asked_format(name, response_format)
    table = rows_of(_with_media(answerable(read_each(name, annotations, videos, split))), instruction, asked)
    if not len(table):
        raise ValueError(f"{os.fspath(annotations)}: holds no question" + (f" of split {split!r}" if split else ""))
    return table


def asked_format(name: str, response_format: str | None = None) -> str:
    """The format that responses are asked for: the one given, else the one that the dataset's official score needs.

    Raises:
        ValueError: it is none of :data:`appo.rewards.templates.FORMATS`.
    """
    asked = OFFICIAL_FORMATS.get(name, "answer") if response_format is None else response_format
    if asked not in FORMATS:
        raise ValueError(f"response_format is {asked!r}: it must be one of {', '.join(FORMATS)}")
    return asked


def read_each(
    name: str, annotations: AnyPath, videos: AnyPath | None = None, split: str | None = None
) -> Iterator[tuple[Row, VideoQA | RowError | OSError]]:
    """Every row with its question, or with why there is none: a walk that no row ends.

    Args:
        name: as in `read`.
        annotations: as in `read`.
        videos: as in `read`.
        split: as in `read`.

    Raises:
        ValueError: name or split is unknown, or (while iterating) a file is not of its format as a whole.
        OSError: (while iterating) an annotation file is missing.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown dataset {name!r}; there are {', '.join(DATASETS)}")
    dataset, source = DATASETS[name], os.fspath(annotations)
    if split is not None and split not in dataset.SPLITS:
        splits = f"the splits {', '.join(dataset.SPLITS)}" if dataset.SPLITS else "no splits: leave it out"
        raise ValueError(f"unknown split {split!r}; {name} has {splits}")
    folder = media_folder(annotations, videos)
    if is_url(folder):
        raise ValueError(f"videos are looked for in {folder}, which is no local folder: download them, set `videos`")

    def walk() -> Iterator[tuple[Row, VideoQA | RowError | OSError]]:
        for row in dataset.rows(source, split):
            try:
                yield row, row.fault or dataset.question(row, folder, split)
            except RowError as error:
                yield row, error

    return walk()


def media_folder(annotations: AnyPath, videos: AnyPath | None = None) -> str:
    """The folder that video and image paths start from: `videos`, else where the annotations lie."""
    source = os.fspath(annotations)
    return os.fspath(videos) if videos is not None else parent(source) if is_file(source) else source


def answer_fault(row: Row, question: VideoQA) -> RowError | None:
    """Why no answer to the question can be scored, or None."""
    if len(question.options) > len(LETTERS):
        return row.error(f"{len(question.options)} options cannot be lettered", f"give at most {len(LETTERS)}")
    try:
        comparison(question.answer, question.kind, question.options)
    except ValueError as error:
        return row.error(str(error), "correct the row", NO_OPTION if question.options else UNREADABLE)
    return None


def _raised(found: Iterator[tuple[Row, VideoQA | RowError | OSError]]) -> Iterator[tuple[Row, VideoQA]]:
    """The same walk, ended by the first row without a question."""
    for row, question in found:
        if not isinstance(question, VideoQA):
            raise question
        yield row, question


def answerable(found: Iterator[tuple[Row, VideoQA | RowError | OSError]]) -> Iterator[tuple[Row, VideoQA]]:
    """The rows of `read_each`, ended by the first that cannot be asked or scored, or whose id was there before.

    Raises:
        ValueError, OSError: that row's; names file and line.
    """
    place_of: dict[str, str] = {}
    for row, question in _raised(found):
        first = place_of.setdefault(question.id, row.place)
        if first is not row.place:
            problem = f"id {question.id!r} was there before ({first})"
            raise row.error(problem, "give every question an id of its own", DUPLICATE)
        if fault := answer_fault(row, question):
            raise fault
        yield row, question


def _with_media(found: Iterator[tuple[Row, VideoQA]]) -> Iterator[VideoQA]:
    """The questions; what files are missing is counted and raised at the end."""
    media = MediaFiles()
    first_missing = ""
    for row, question in found:
        for path, is_folder in media_of(question):
            if not media.has(path, is_folder) and not first_missing:
                first_missing = f"{row.place}: there is no {path}"
        yield question
    if first_missing:
        count = f"{len(media.missing)} of {media.asked} video and image files are missing"
        fix = "check `videos`, the folder that paths start from; `appo data check` finds it"
        raise FileNotFoundError(f"{first_missing} ({count}); {fix}")
