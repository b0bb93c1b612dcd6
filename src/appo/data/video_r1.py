"""Video-R1-260k: one JSON list of video and image questions of five types. HF: Video-R1/Video-R1-data.

``split="video"`` or ``"image"`` takes the rows of one sort; without it all are there, image rows as questions about
an image alone. Rewards of its authors: multiple choice exact; numerical equal at 2 decimals; OCR 1 - WER; free-form
the mean of ROUGE-1/2/L; regression 1 - relative error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from appo.data.benchmark import Benchmark, Measure
from appo.data.files import join
from appo.data.row import Row
from appo.types import VideoQA, VideoSource

KIND_OF = {
    "multiple choice": "letter",
    "numerical": "number",
    "OCR": "ocr",
    "free-form": "text",
    "regression": "regression",
}
_SOLUTION = re.compile(r"\s*<answer>\s*(.*?)\s*</answer>\s*", re.DOTALL)


class VideoR1(Benchmark):
    """Video-R1-260k: the mean reward of its authors, overall and by type of problem."""

    name = "video-r1"
    splits = ("video", "image")
    file_name = "Video-R1-260k.json"
    kinds = tuple(KIND_OF.values())
    measures = (Measure("score"),)
    part_fields = ("problem_type",)

    def rows(self, annotations: str, split: str | None) -> Iterator[Row]:
        """The rows of a sort, or all. `question` refuses rows of no known sort."""
        for row in super().rows(annotations, split):
            data_type = row.fields.get("data_type")
            if split in (None, data_type) or data_type not in self.splits:
                yield row

    def question(self, row: Row, videos: str, split: str | None) -> VideoQA:
        """One row; its id is its index in the list, for problem_id may repeat."""
        data_type = row.value("data_type")
        if data_type not in self.splits:
            raise row.error(f"`data_type` is {data_type!r}", "write video or image")
        problem_type = row.text("problem_type")
        if problem_type not in KIND_OF:
            raise row.error(f"`problem_type` is {problem_type!r}", f"write one of {', '.join(KIND_OF)}")
        solution = _SOLUTION.fullmatch(row.text("solution"))
        if not solution or not solution[1]:
            raise row.error(f"`solution` is {row.value('solution')!r}", "write <answer>...</answer>")
        is_video, path = data_type == "video", join(videos, row.text("path"))
        return VideoQA(
            id=str(row.index),
            video=VideoSource(path) if is_video else None,
            image="" if is_video else path,
            question=row.text("problem"),
            answer=solution[1],
            kind=KIND_OF[problem_type],
            options=row.texts("options") if problem_type == "multiple choice" else (),
            metadata=row.metadata("problem_id", "problem_type", "data_type", "data_source"),
        )
