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
        """One row a question, each with its ``video_id`` and, where it is cut, the ``end`` of what is shown."""
        path = self.annotation_file(annotations, split)
        cuts = _cuts(path, split)
        for video_id, fields in read_object(path).items():
            video = Row(f"{path}, video {video_id}", fields if isinstance(fields, dict) else {})
            try:
                yield from _asked(video, video_id, cuts.get(video_id, -1))
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


def _asked(video: Row, video_id: str, cut: object) -> list[Row]:
    """The questions about one video."""
    asked = video.value("mc_question")
    if not isinstance(asked, list):
        raise video.error("`mc_question` is no list of questions", "write [{id, question, options, ...}]")
    seconds, end = _seconds(video), _end(video, cut)
    rows = [Row(f"{video.place}, mc_question {index}", index=index) for index in range(len(asked))]
    return [
        replace(row, fields={**one, "video_id": video_id, "end": end, "duration": seconds})
        if isinstance(one, dict)
        else row.faulty(f"holds a {type(one).__name__}", "write an object {id, question, options, ...}")
        for row, one in zip(rows, asked, strict=True)
    ]


def _cuts(path: str, split: str | None) -> dict[str, object]:
    """At which frame videos are cut."""
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
    """How long the whole video is, where the metadata say it."""
    stated = _metadata(video)
    if stated.fields.get("num_frames") is None or not stated.fields.get("frame_rate"):
        return None
    return stated.number("num_frames") / stated.number("frame_rate")


def _metadata(video: Row) -> Row:
    metadata = video.fields.get("metadata")
    return Row(video.place, metadata if isinstance(metadata, dict) else {})
