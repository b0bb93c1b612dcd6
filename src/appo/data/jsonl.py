"""Your own questions, one JSON object a line: ``video, image, question, options, answer, spans, metadata``.

``question``, ``answer`` and one of ``video`` and ``image`` must be there. ``id`` (default: the row's number) and
``kind`` (default: letter where there are options, else word) may be. Any other column is refused, because a
misspelt one would be lost without a word. JSON lists (``.json``) are read as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from appo.data.files import file_in, join, rows_of_file
from appo.data.row import NO_OPTION, Row
from appo.rewards.templates import answer_letter
from appo.types import VideoQA

SPLITS = ()
COLUMNS = ("video", "image", "question", "options", "answer", "spans", "metadata", "id", "kind")


def rows(annotations: str, split: str | None) -> Iterator[Row]:
    """The rows of the file (in a folder ``annotations.jsonl``)."""
    return rows_of_file(file_in(annotations, "annotations.jsonl"))


def question(row: Row, videos: str, split: str | None) -> VideoQA:
    """One row. A letter answer may be the letter or the text of the option."""
    fields = row.fields
    if unknown := [name for name in fields if name not in COLUMNS]:
        raise row.error(f"unknown column `{unknown[0]}`", f"put it into `metadata`; columns: {', '.join(COLUMNS)}")
    if not (fields.get("video") or fields.get("image")):
        raise row.error("there is neither `video` nor `image`", "give one of the two")
    options = row.texts("options") if fields.get("options") else ()
    kind = row.text("kind") if fields.get("kind") else "letter" if options else "word"
    answer = row.text("answer")
    if kind == "letter" and options:
        letter = answer_letter(answer, options)
        if letter is None:
            problem = f"`answer` is {answer!r}, which names no single one of {list(options)!r}"
            raise row.error(problem, "correct one of the two", NO_OPTION)
        answer = letter
    return VideoQA(
        id=row.text("id") if "id" in fields else str(row.index),
        video=join(videos, row.text("video")) if fields.get("video") else "",
        image=join(videos, row.text("image")) if fields.get("image") else "",
        question=row.text("question"),
        answer=answer,
        kind=kind,
        options=options,
        spans=row.spans("spans") if fields.get("spans") else (),
        metadata=_metadata(row),
    )


def _metadata(row: Row) -> dict[str, Any]:
    """The row's ``metadata``; the three names that have a meaning must mean it."""
    metadata = row.fields.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise row.error(f"`metadata` is {metadata!r}", "write an object {...}")
    frames = metadata.get("event_frames")
    if frames is not None and not (isinstance(frames, list) and all(type(frame) is int for frame in frames)):
        raise row.error(f"`event_frames` in `metadata` is {frames!r}", "write a list of frame indices")
    if metadata.get("clip") is not None:
        ((start, end),) = row.spans("clip", [metadata["clip"]])
        if start == end:
            raise row.error(f"`clip` in `metadata` is {[start, end]}, which is no time", "write [start, end] seconds")
    if metadata.get("frames_fps") is not None and Row(row.place, metadata).number("frames_fps") <= 0:
        raise row.error(f"`frames_fps` in `metadata` is {metadata['frames_fps']!r}", "write frames per second")
    return metadata
