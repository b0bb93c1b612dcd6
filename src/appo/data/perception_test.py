"""Perception Test, multiple choice: three options. github.com/google-deepmind/perception_test

``mc_question_{split}.json``: {video: {metadata, mc_question: [{id, question, options, answer_id, area, reasoning,
tag}]}}. Cup games end where ``cut_frame_mapping_{split}.json`` says (-1: not cut), else the video shows the answer.
Score: top-1 accuracy, also per area and reasoning type.
"""

from __future__ import annotations

from collections.abc import Iterator

from appo.data.choices import letter_at
from appo.data.files import Row, exists, file_in, join, parent, read_object, stem
from appo.types import VideoQA

SPLITS = ("train", "valid", "test")
PREFIX = "mc_question_"


def rows(annotations: str, split: str | None) -> Iterator[Row]:
    """One row a question, each with its ``video_id`` and, where it is cut, ``clip``."""
    path = file_in(annotations, f"{PREFIX}{split}.json")
    if path != annotations and split is None:
        raise ValueError(f"{annotations} is a folder: name the split ({', '.join(SPLITS)}), or give the file itself")
    cuts = _cuts(path, split)
    for video_id, fields in read_object(path).items():
        video = Row(f"{path}, video {video_id}", fields if isinstance(fields, dict) else {})
        asked = video.value("mc_question")
        if not isinstance(asked, list) or not all(isinstance(one, dict) for one in asked):
            raise video.error("`mc_question` is no list of questions", "write [{id, question, options, ...}]")
        clip = _clip(video, cuts.get(video_id, -1))
        for index, one in enumerate(asked):
            yield Row(f"{video.place}, mc_question {index}", {**one, "video_id": video_id, "clip": clip})


def question(row: Row, videos: str, split: str | None) -> VideoQA:
    """One question about one video."""
    options = row.texts("options")
    return VideoQA(
        id=f"{row.text('video_id')}/{row.text('id')}",
        video=join(videos, f"{row.text('video_id')}.mp4"),
        question=row.text("question"),
        answer=letter_at(row, "answer_id", options),
        kind="letter",
        options=options,
        metadata=row.metadata("area", "reasoning", "tag", "clip"),
    )


def _cuts(path: str, split: str | None) -> dict[str, object]:
    """At which frame videos are cut."""
    cut_path = join(parent(path), f"cut_frame_mapping_{split or stem(path).removeprefix(PREFIX)}.json")
    if not exists(cut_path):
        fix = "put the official file there (a file that holds {} says that no video is cut)"
        raise FileNotFoundError(f"{cut_path}: there is no such file, without it cup games show their answer; {fix}")
    return read_object(cut_path)


def _clip(video: Row, cut: object) -> list[float] | None:
    """[0, seconds of the frame that the video is cut at], or None."""
    frame = Row(video.place, {"cut_frame_mapping": cut}).number("cut_frame_mapping")
    if frame <= 0:
        return None
    metadata = video.value("metadata")
    rate = Row(video.place, metadata if isinstance(metadata, dict) else {}).number("frame_rate")
    if rate <= 0:
        raise video.error(f"`frame_rate` is {rate}", "write the frames per second of the video")
    return [0.0, frame / rate]
