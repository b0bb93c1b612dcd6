"""VSI-Bench: distances, sizes, counts and routes in indoor videos. HF: nyu-visionx/VSI-Bench

JSON lines ``id, dataset, scene_name, question_type, question, ground_truth, options``; video
``<dataset>/<scene_name>.mp4``. Rows with options are multiple choice, the others numbers scored by mean relative
accuracy (``mra``). Overall = unweighted mean of 8 tasks, the levels of object_rel_direction averaged first.
"""

from __future__ import annotations

from collections.abc import Iterator

from appo.data.benchmark import Benchmark, Measure
from appo.data.files import join
from appo.data.row import Row
from appo.types import VideoQA, VideoSource

TASKS = (
    "object_counting", "object_abs_distance", "object_size_estimation", "room_size_estimation",
    "object_rel_distance", "object_rel_direction", "route_planning", "obj_appearance_order",
)  # fmt: skip


class VSIBench(Benchmark):
    """VSI-Bench: the unweighted mean of its tasks."""

    name = "vsi-bench"
    splits = ("arkitscenes", "scannet", "scannetpp")
    file_name = "test.jsonl"
    kinds = ("letter", "mra")
    measures = (Measure("score"),)
    part_fields = ("task",)
    part_order = TASKS

    def rows(self, annotations: str, split: str | None) -> Iterator[Row]:
        """All rows; a split takes those of one of the three sources."""
        for row in super().rows(annotations, split):
            if split in (None, row.fields.get("dataset")) or not row.fields.get("dataset"):
                yield row

    def question(self, row: Row, videos: str, split: str | None) -> VideoQA:
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

    def path(self, question: VideoQA) -> tuple[str, str]:
        """Task and question type: only object_rel_direction has several types, its levels."""
        return str(question.metadata["task"]), str(question.metadata["question_type"])
