"""Your own questions, one JSON object a line: ``video, image, question, options, answer, spans, metadata``.

``question``, ``answer`` and one of ``video`` and ``image`` must be there. ``id`` (default: the row's number) and
``kind`` (default: letter where there are options, else word) may be. Any other column is refused: a
misspelt one would be lost silently. JSON lists (``.json``) are read as well.
"""

from __future__ import annotations

from appo.data.benchmark import Benchmark, Measure
from appo.data.files import join
from appo.data.row import NO_OPTION, Row
from appo.rewards.scorers import KINDS
from appo.rewards.templates import answer_letter
from appo.types import VideoQA, VideoSource

COLUMNS = ("video", "image", "question", "options", "answer", "spans", "metadata", "id", "kind")
FIELDS = ("clip", "frames_fps", "event_frames")  # of the metadata, that become fields of the question


class OwnQuestions(Benchmark):
    """Your own questions: the mean score, overall and by kind of answer."""

    name = "jsonl"
    kinds = tuple(KINDS)
    measures = (Measure("score"),)

    def question(self, row: Row, videos: str, split: str | None) -> VideoQA:
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
        metadata = row.part("metadata")
        start, end = metadata.clip("clip") if metadata.fields.get("clip") is not None else (None, None)
        fps = metadata.number("frames_fps") if metadata.fields.get("frames_fps") is not None else None
        if fps is not None and fps <= 0:
            problem = f"`frames_fps` in `metadata` is {metadata.fields['frames_fps']!r}"
            raise metadata.error(problem, "write frames per second")
        return VideoQA(
            id=row.text("id") if "id" in fields else str(row.index),
            video=VideoSource(join(videos, row.text("video")), start, end, fps) if fields.get("video") else None,
            image=join(videos, row.text("image")) if fields.get("image") else "",
            question=row.text("question"),
            answer=answer,
            kind=kind,
            options=options,
            spans=row.spans("spans") if fields.get("spans") else (),
            event_frames=row.event_frames(),
            metadata={name: value for name, value in metadata.fields.items() if name not in FIELDS},
        )

    def parts(self, question: VideoQA) -> list[str]:
        """The kind of answer."""
        return [f"kind/{question.kind}"]
