"""The embedded world's clips, as `appo.world.generate` writes them: ``annotations.jsonl`` beside the mp4 files."""

from __future__ import annotations

from appo.data.benchmark import Benchmark
from appo.data.files import join
from appo.data.row import Row
from appo.types import VideoQA, VideoSource


class Spotlight(Benchmark):
    """The embedded world: the accuracy, overall and by level."""

    name = "spotlight"
    kinds = ("word",)
    part_fields = ("level",)

    def question(self, row: Row, videos: str, split: str | None) -> VideoQA:
        """One clip's question."""
        row.value("metadata")
        metadata = row.part("metadata").fields
        return VideoQA(
            id=row.text("id"),
            video=VideoSource(join(videos, row.text("video"))),
            question=row.text("question"),
            answer=row.text("answer"),
            kind="word",
            spans=row.spans("event_spans"),
            event_frames=row.event_frames(),
            metadata={name: value for name, value in metadata.items() if name != "event_frames"},
        )
