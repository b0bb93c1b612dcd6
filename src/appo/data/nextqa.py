"""NExT-QA, multiple choice: causal, temporal and descriptive questions. github.com/doc-doc/NExT-QA

csv ``video,frame_count,width,height,question,answer,qid,type,a0..a4``; the answer is an index from 0. Score: accuracy,
overall and by the first letter of the type: C (CW CH), T (TN TC TP), D (DL DO DC).
"""

from __future__ import annotations

from collections.abc import Iterator

from appo.data.choices import five_options, letter_at
from appo.data.files import exists, file_in, join, joined, parent, read_object, rows_of_file
from appo.data.row import Row
from appo.types import VideoQA, VideoSource

SPLITS = ("train", "val", "test")
GROUPS = {"C": "causal", "T": "temporal", "D": "descriptive"}
VIDEO_MAP = "map_vid_vidorID.json"


def rows(annotations: str, split: str | None) -> Iterator[Row]:
    """The csv (in a folder ``{split}.csv``), each row with the ``file`` of its video."""
    path = csv_file(annotations, split)
    return with_video_files(rows_of_file(path), parent(path), "video")


def question(row: Row, videos: str, split: str | None) -> VideoQA:
    """One line of the csv."""
    options = five_options(row)
    return VideoQA(
        id=f"{row.text('video')}_{row.text('qid')}",
        video=VideoSource(join(videos, row.text("file"))),
        question=row.text("question"),
        answer=letter_at(row, "answer", options),
        kind="letter",
        options=options,
        metadata={"type": row.text("type"), "group": question_group(row, "type")},
    )


def csv_file(annotations: str, split: str | None) -> str:
    """The csv itself, or the one of a split in a folder."""
    path = file_in(annotations, f"{split}.csv")
    if path != annotations and split is None:
        raise ValueError(f"{annotations} is a folder: name the split ({', '.join(SPLITS)}), or give the csv itself")
    return path


def with_video_files(found: Iterator[Row], folder: str, column: str) -> Iterator[Row]:
    """Rows with the ``file`` of their video: as ``map_vid_vidorID.json`` beside the csv says, else ``{video}.mp4``."""
    map_path = join(folder, VIDEO_MAP)
    names = read_object(map_path) if exists(map_path) else None

    def file(row: Row) -> dict[str, str]:
        video = row.text(column)
        if names is not None and video not in names:
            raise row.error(f"video {video!r} is not in {map_path}", "take map and csv of the same release")
        return {"file": f"{names[video] if names else video}.mp4"}

    return joined(found, file)


def question_group(row: Row, column: str) -> str:
    """causal, temporal or descriptive: the groups that scores are given for."""
    kind = row.text(column)
    if kind[:1] not in GROUPS:
        raise row.error(f"`{column}` is {kind!r}", "write a type of NExT-QA: CW CH TN TC TP DC DL DO")
    return GROUPS[kind[:1]]
