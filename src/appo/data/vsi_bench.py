"""VSI-Bench: distances, sizes, counts and routes in indoor videos. HF: nyu-visionx/VSI-Bench

JSON lines ``id, dataset, scene_name, question_type, question, ground_truth, options``; video
``<dataset>/<scene_name>.mp4``. Rows with options are multiple choice, the others numbers scored by mean relative
accuracy (``mra``). Overall = unweighted mean of 8 tasks, the levels of object_rel_direction averaged first.
"""

from __future__ import annotations

from collections.abc import Iterator

from appo.data.files import file_in, join, rows_of_file
from appo.data.row import Row
from appo.types import VideoQA, VideoSource

SPLITS = ("arkitscenes", "scannet", "scannetpp")


def rows(annotations: str, split: str | None) -> Iterator[Row]:
    """The JSON lines (in a folder ``test.jsonl``); a split takes the rows of one of the three sources."""
    for row in rows_of_file(file_in(annotations, "test.jsonl")):
        if split in (None, row.fields.get("dataset")) or not row.fields.get("dataset"):
            yield row


def question(row: Row, videos: str, split: str | None) -> VideoQA:
    """One row."""
    options = row.texts("options") if row.fields.get("options") else ()
    if not options:
        row.number("ground_truth")
    question_type = row.text("question_type")
    return VideoQA(
        id=row.text("id"),
        video=VideoSource(join(videos, f"{row.text('dataset')}/{row.text('scene_name')}.mp4")),
        question=row.text("question"),
        answer=row.text("ground_truth"),
        kind="letter" if options else "mra",
        options=options,
        metadata={
            "task": "object_rel_direction" if question_type.startswith("object_rel_direction") else question_type,
            **row.metadata("question_type", "dataset", "scene_name"),
        },
    )
