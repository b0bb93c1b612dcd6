"""NExT-GQA: NExT-QA questions with the seconds that show the answer. github.com/doc-doc/NExT-GQA

Two forms are read. Official: csv with ``video_id`` and the answer as *text*, and ``gsub_{split}.json`` beside it:
{video: {duration, fps, location: {qid: [[start, end], ...]}}}. Repackaged: a JSON list ``qid, question, video_path,
options, answer (index as string), qtype, duration, time_clues``. Spans are for evaluation and for a grounding reward;
they are never in the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

from appo.data.benchmark import Benchmark, Measure
from appo.data.files import join, parent, read_object, rows_of_file, stem, with_fields
from appo.data.nextqa import five_options, question_group, with_video_files
from appo.data.row import Row
from appo.types import VideoQA, VideoSource


def _grounding(name: str, of: Callable[[Fraction, Fraction, float], float], *, graded: bool = False) -> Measure:
    """A measure of (IoU, IoP, how right the answer is) that skips a response without a time."""
    return Measure(name, lambda mark: of(*mark.overlap, mark.right) if mark.overlap else None, graded)


GROUNDING = (
    _grounding("mIoU", lambda iou, iop, right: float(iou), graded=True),
    _grounding("mIoP", lambda iou, iop, right: float(iop), graded=True),
    _grounding("IoU@0.3", lambda iou, iop, right: float(iou >= Fraction(3, 10))),
    _grounding("IoU@0.5", lambda iou, iop, right: float(iou >= Fraction(1, 2))),
    _grounding("IoP@0.3", lambda iou, iop, right: float(iop >= Fraction(3, 10))),
    _grounding("IoP@0.5", lambda iou, iop, right: float(iop >= Fraction(1, 2))),
    Measure("Acc@QA"),
    _grounding("Acc@GQA", lambda iou, iop, right: right * (iop >= Fraction(1, 2))),
)


class NextGQA(Benchmark):
    """NExT-GQA: how well the named time overlaps the true spans, and the answers."""

    name = "nextgqa"
    splits = ("val", "test")  # val is what one trains on; the train split has no spans
    file_name = "{split}.csv"
    response_format = "grounded"
    measures = GROUNDING

    def rows(self, annotations: str, split: str | None) -> Iterator[Row]:
        """The JSON list, or the csv with each row's spans and video file."""
        if annotations.endswith((".json", ".jsonl")):
            return rows_of_file(annotations)
        path = self.annotation_file(annotations, split)
        gsub_path = join(parent(path), f"gsub_{split or stem(path)}.json")
        gsub = read_object(gsub_path)

        def clues(row: Row) -> dict[str, Any]:
            video = gsub.get(row.text("video_id"))
            location = video.get("location") if isinstance(video, dict) else None
            spans = location.get(row.text("qid")) if isinstance(location, dict) else None
            if spans is None or video is None:
                fix = "take csv and gsub of NExT-GQA (NExT-QA's own csv has questions without spans)"
                raise row.error(f"video {row.text('video_id')}, qid {row.text('qid')} is not in {gsub_path}", fix)
            return {"time_clues": spans, "duration": video.get("duration")}

        return with_fields(with_video_files(rows_of_file(path), parent(path), "video_id"), clues)

    def question(self, row: Row, videos: str, split: str | None) -> VideoQA:
        """One row, of either form."""
        official = "video_id" in row.fields
        options = five_options(row) if official else row.texts("options")
        video = row.text("file") if official else row.text("video_path")
        spans = row.spans("time_clues")
        if not spans:
            raise row.error("`time_clues` is empty", "give at least one [start, end], or take nextqa")
        qtype = "type" if official else "qtype"
        return VideoQA(
            id=f"{row.text('video_id') if official else stem(video)}_{row.text('qid')}",
            video=VideoSource(join(videos, video)),
            question=row.text("question"),
            answer=row.letter_of("answer", options) if official else row.letter_at("answer", options),
            kind="letter",
            options=options,
            spans=spans,
            metadata={"type": row.text(qtype), "group": question_group(row, qtype), **row.metadata("duration")},
        )
