"""MVBench: 20 tasks of 200 questions, one JSON list a task. HF: OpenGVLab/MVBench

``video, question, candidates, answer (text)``, some with ``start, end`` seconds; episodic_reasoning has folders of
frames, 3 a second. Score: accuracy per task; average = all right answers / all questions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from appo.data.benchmark import Benchmark
from appo.data.files import is_file, join, rows_of_file, stem
from appo.data.row import Row
from appo.types import VideoQA, VideoSource

# Where each task's videos lie under the release's video folder, as in the official evaluation notebook.
FOLDERS = {
    "action_sequence": "star/Charades_v1_480",
    "action_prediction": "star/Charades_v1_480",
    "action_antonym": "ssv2_video",
    "fine_grained_action": "Moments_in_Time_Raw/videos",
    "unexpected_action": "FunQA_test/test",
    "object_existence": "clevrer/video_validation",
    "object_interaction": "star/Charades_v1_480",
    "object_shuffle": "perception/videos",
    "moving_direction": "clevrer/video_validation",
    "action_localization": "sta/sta_video",
    "scene_transition": "scene_qa/video",
    "action_count": "perception/videos",
    "moving_count": "clevrer/video_validation",
    "moving_attribute": "clevrer/video_validation",
    "state_change": "perception/videos",
    "fine_grained_pose": "nturgbd",
    "character_order": "perception/videos",
    "egocentric_navigation": "vlnqa",
    "episodic_reasoning": "tvqa/frames_fps3_hq",
    "counterfactual_inference": "clevrer/video_validation",
}
FRAME_FOLDERS = {"episodic_reasoning": 3.0}  # frames per second


class MVBench(Benchmark):
    """MVBench: the accuracy, overall and by task."""

    name = "mvbench"
    splits = tuple(FOLDERS)
    part_fields = ("task",)

    def rows(self, annotations: str, split: str | None) -> Iterator[Row]:
        """One task's file, or all 20 of a folder (a split takes one), each row with its ``task``."""
        files = [annotations] if is_file(annotations) else [join(annotations, f"{task}.json") for task in FOLDERS]
        for path in files:
            task = stem(path)
            if task not in FOLDERS:
                known = ", ".join(FOLDERS)
                raise ValueError(f"{path}: {task!r} is no task of MVBench; name the file as one of {known}")
            if split in (None, task):
                try:
                    for row in rows_of_file(path):
                        yield row if row.fault else replace(row, fields={**row.fields, "task": task})
                except OSError as error:  # the other tasks can be read
                    yield Row(path, fault=error)

    def question(self, row: Row, videos: str, split: str | None) -> VideoQA:
        """One row; its letter is that of the candidate with the answer's text."""
        task, options = row.text("task"), row.texts("candidates")
        start = end = None
        if "start" in row.fields or "end" in row.fields:
            start, end = row.clip("start, end", [row.number("start"), row.number("end")])
        path = join(videos, f"{FOLDERS[task]}/{row.text('video')}")
        return VideoQA(
            id=f"{task}/{row.index}",
            video=VideoSource(path, start, end, FRAME_FOLDERS.get(task)),
            question=row.text("question"),
            answer=row.letter_of("answer", options),
            kind="letter",
            options=options,
            metadata={"task": task},
        )
