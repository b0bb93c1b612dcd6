"""NExT-QA, multiple choice: causal, temporal and descriptive questions. github.com/doc-doc/NExT-QA

csv ``video,frame_count,width,height,question,answer,qid,type,a0..a4``; the answer is an index from 0. Score: accuracy,
overall and by the first letter of the type: C (CW CH), T (TN TC TP), D (DL DO DC).
"""

from __future__ import annotations

from collections.abc import Iterator

from appo.data.benchmark import Benchmark
from appo.data.files import exists, join, parent, read_object, rows_of_file, with_fields
from appo.data.row import Row
from appo.types import VideoQA, VideoSource

GROUPS = {"C": "causal", "T": "temporal", "D": "descriptive"}
VIDEO_MAP = "map_vid_vidorID.json"


class NextQA(Benchmark):
    """NExT-QA: the accuracy, overall, by group and by type."""

    name = "nextqa"
    splits = ("train", "val", "test")
    file_name = "{split}.csv"
    part_order = ("C", "T", "D", "CW", "CH", "TN", "TC", "TP", "DC", "DL", "DO")

    def rows(self, annotations: str, split: str | None) -> Iterator[Row]:
        """The csv (in a folder ``{split}.csv``), each row with the ``file`` of its video."""
        path = self.annotation_file(annotations, split)
        return with_video_files(rows_of_file(path), parent(path), "video")

    def question(self, row: Row, videos: str, split: str | None) -> VideoQA:
        """One line of the csv."""
        options = five_options(row)
        return VideoQA(
            id=f"{row.text('video')}_{row.text('qid')}",
            video=VideoSource(join(videos, row.text("file"))),
            question=row.text("question"),
            answer=row.letter_at("answer", options),
            kind="letter",
            options=options,
            metadata={"type": row.text("type"), "group": question_group(row, "type")},
        )

    def parts(self, question: VideoQA) -> list[str]:
        """Group, type, and for TP also TN, which it counts as."""
        kind = str(question.metadata["type"])
        return [kind[0], kind, *(["TN"] if kind == "TP" else [])]


def five_options(row: Row) -> tuple[str, ...]:
    """The columns a0 to a4 of NExT-QA and NExT-GQA."""
    return tuple(row.text(f"a{index}") for index in range(5))


def with_video_files(rows: Iterator[Row], folder: str, column: str) -> Iterator[Row]:
    """Rows with the ``file`` of their video: as ``map_vid_vidorID.json`` beside the csv says, else ``{video}.mp4``."""
    map_path = join(folder, VIDEO_MAP)
    names = read_object(map_path) if exists(map_path) else None

    def file(row: Row) -> dict[str, str]:
        video = row.text(column)
        if names is not None and video not in names:
            raise row.error(f"video {video!r} is not in {map_path}", "take map and csv of the same release")
        return {"file": f"{names[video] if names else video}.mp4"}

    return with_fields(rows, file)


def question_group(row: Row, column: str) -> str:
    """causal, temporal or descriptive: the groups that scores are given for."""
    kind = row.text(column)
    if kind[:1] not in GROUPS:
        raise row.error(f"`{column}` is {kind!r}", "write a type of NExT-QA: CW CH TN TC TP DC DL DO")
    return GROUPS[kind[:1]]
