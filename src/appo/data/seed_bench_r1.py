"""SEED-Bench-R1: what to do next, from a video of the progress and an image of now. HF: TencentARC/SEED-Bench-R1.

Training rows have many wrong answers of which 3 are drawn; validation rows (L1 in distribution, L2 new environments,
L3 new environments and tasks) have four choices. Score: accuracy of the letter. A row without task progress has no
video and becomes a question about the image alone, as in the official evaluation.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from appo.data.benchmark import Benchmark
from appo.data.files import is_file, join, rows_of_file
from appo.data.row import LETTERS, OUT_OF_RANGE, Row
from appo.types import VideoQA, VideoSource

DRAWN = 3  # wrong answers in a training prompt


class SeedBenchR1(Benchmark):
    """SEED-Bench-R1: the accuracy, overall and by level where the split is named."""

    name = "seed-bench-r1"
    splits = ("train", "L1", "L2", "L3")
    part_fields = ("split",)

    def rows(self, annotations: str, split: str | None) -> Iterator[Row]:
        """JSON lines; `annotations` is the file itself, because its name differs from release to release."""
        if not is_file(annotations):
            raise ValueError(f"{annotations}: give the annotation file itself, e.g. annotations/training.jsonl")
        return rows_of_file(annotations)

    def question(self, row: Row, videos: str, split: str | None) -> VideoQA:
        """One row, of either form."""
        is_validation = "golden_choice_idx" in row.fields
        if split and (split == "train") == is_validation:
            kind = "a validation" if is_validation else "a training"
            raise row.error(f"this is {kind} row, but split is {split!r}", "give the file of that split")
        if is_validation:
            options = tuple(row.text(f"choice_{letter}") for letter in "abcd")
            answer = row.text("golden_choice_idx").strip().upper()
            if answer not in LETTERS[:4] or len(answer) != 1:
                raise row.error(f"`golden_choice_idx` is {answer!r}", "write A, B, C or D", OUT_OF_RANGE)
        else:
            options, answer = draw_options(row)
        source = row.text("video_source")
        progress = row.fields.get("task_progress_metadata")
        if not isinstance(progress, list):
            raise row.error(f"`task_progress_metadata` is {progress!r}", "write a list, [] where there is no video")
        more = row.metadata("video_id", "task_goal", "video_source", "task_progress_metadata")
        return VideoQA(
            id=row.text("sample_id"),
            video=VideoSource(join(videos, f"videos/{source}/{row.text('video_basename')}")) if progress else None,
            image=join(videos, f"images/{source}/{row.text('current_observation_basename')}"),
            question=row.text("question"),
            answer=answer,
            kind="letter",
            options=options,
            metadata=more | ({"split": split} if split else {}),
        )


def draw_options(row: Row) -> tuple[tuple[str, ...], str]:
    """The right answer among 3 drawn wrong ones, and its letter.

    Source: not in the paper. SEED-Bench-R1 draws anew at each start; here the sample is the seed, so runs compare.
    """
    right = row.text("answer")
    wrong = [text for text in dict.fromkeys(row.texts("negative_answers")) if text != right]
    if len(wrong) < DRAWN:
        raise row.error(f"`negative_answers` has {len(wrong)} different wrong answers", f"give at least {DRAWN}")
    rng = random.Random(f"seed-bench-r1/{row.text('sample_id')}")  # text seeds: the same in every Python version
    options = [*rng.sample(wrong, DRAWN), right]
    rng.shuffle(options)
    return tuple(options), LETTERS[options.index(right)]
