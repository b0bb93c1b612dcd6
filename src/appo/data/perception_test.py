"""Perception Test, multiple choice: three options. github.com/google-deepmind/perception_test

``mc_question_{split}.json``: {video: {metadata, mc_question: [{id, question, options, answer_id, area, reasoning,
tag}]}}. Cup games end where ``cut_frame_mapping_{split}.json`` says (-1: not cut), else the video shows the answer.
Score: top-1 accuracy, also per area and reasoning type.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from appo.data.benchmark import Benchmark
from appo.data.files import exists, join, parent, read_object, stem
from appo.data.row import Row, RowError
from appo.types import VideoQA, VideoSource

PREFIX = "mc_question_"


class PerceptionTest(Benchmark):
    """Perception Test: the accuracy, overall, by area and by type of reasoning."""

    name = "perception-test"
    splits = ("train", "valid", "test")
    file_name = f"{PREFIX}{{split}}.json"
    part_fields = ("area", "reasoning")

    def rows(self, annotations: str, split: str | None) -> Iterator[Row]:
        """One row a question, each with its ``video_id`` and, where the video is cut, its ``end``."""
        path = self.annotation_file(annotations, split)
        cuts = _cuts(path, split)
        for video_id, fields in read_object(path).items():
            video = Row(f"{path}, video {video_id}", fields if isinstance(fields, dict) else {})
            try:
                yield from _questions(video, video_id, cuts.get(video_id, -1))
            except RowError as error:
                yield Row(video.place, fault=error)

    def question(self, row: Row, videos: str, split: str | None) -> VideoQA:
        """One question about one video."""
        options = row.texts("options")
        end = row.fields["end"]
        return VideoQA(
            id=f"{row.text('video_id')}/{row.text('id')}",
            video=VideoSource(join(videos, f"{row.text('video_id')}.mp4"), None if end is None else 0.0, end),
            question=row.text("question"),
            answer=row.letter_at("answer_id", options),
            kind="letter",
            options=options,
            metadata=row.metadata("area", "reasoning", "tag", "duration"),
        )


def _questions(video: Row, video_id: str, cut: object) -> list[Row]:
    questions = video.value("mc_question")
    if not isinstance(questions, list):
        raise video.error("`mc_question` is no list of questions", "write [{id, question, options, ...}]")
    more = {"video_id": video_id, "end": _end(video, cut), "duration": _seconds(video)}
    rows = [Row(f"{video.place}, mc_question {index}", index=index) for index in range(len(questions))]
    return [
        replace(row, fields=fields | more)
        if isinstance(fields, dict)
        else row.faulty(f"holds a {type(fields).__name__}", "write an object {id, question, options, ...}")
        for row, fields in zip(rows, questions, strict=True)
    ]


def _cuts(path: str, split: str | None) -> dict[str, object]:
    """The frames at which videos are cut."""
    cut_path = join(parent(path), f"cut_frame_mapping_{split or stem(path).removeprefix(PREFIX)}.json")
    if not exists(cut_path):
        fix = "put the official file there (a file that holds {} says that no video is cut)"
        raise FileNotFoundError(f"{cut_path}: there is no such file, without it cup games show their answer; {fix}")
    return read_object(cut_path)


def _end(video: Row, cut: object) -> float | None:
    """Seconds of the frame that the video is cut at, or None."""
    frame = Row(video.place, {"cut_frame_mapping": cut}).number("cut_frame_mapping")
    if frame <= 0:
        return None
    rate = _metadata(video).number("frame_rate")
    if rate <= 0:
        raise video.error(f"`frame_rate` is {rate}", "write the frames per second of the video")
    return frame / rate


def _seconds(video: Row) -> float | None:
    """The duration of the whole video, if stated."""
    metadata = _metadata(video)
    if metadata.fields.get("num_frames") is None or not metadata.fields.get("frame_rate"):
        return None
    return metadata.number("num_frames") / metadata.number("frame_rate")


def _metadata(video: Row) -> Row:
    metadata = video.fields.get("metadata")
    return Row(video.place, metadata if isinstance(metadata, dict) else {})
