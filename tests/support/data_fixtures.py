"""Small annotation files of every dataset's own schema, written by hand, beside real video files.

Each case says what must come out. Facts of the schemas: the datasets' own repositories and papers.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
from PIL import Image

from tests.support.clips import counted_frames, write_clip


@dataclass(frozen=True)
class Gold:
    """What one row must become."""

    id: str
    answer: str
    video: str
    kind: str = "letter"
    options: int = 0
    image: str = ""
    spans: tuple[tuple[float, float], ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A dataset in a folder: `write` returns what `read` takes for annotations and videos."""

    name: str
    write: Callable[[Path], tuple[Path, Path]]
    golds: Sequence[Gold]
    split: str | None = None
    label: str = ""

    def __str__(self) -> str:
        return "-".join(filter(None, (self.name, self.split, self.label)))


@cache
def clip() -> Path:
    """One real clip: 3 seconds at 4 frames a second."""
    return write_clip(Path(mkdtemp()) / "clip.mp4", counted_frames(12), fps=4)


def put_media(folder: Path, *names: str) -> Path:
    """Real files of these names: videos, pictures, and folders of pictures (names that end with a slash)."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            put_media(path, *(f"{number:05d}.jpg" for number in range(1, 7)))
        elif path.suffix in (".jpg", ".png"):
            Image.fromarray(np.full((48, 64, 3), 90, dtype=np.uint8)).save(path)
        else:
            shutil.copyfile(clip(), path)
    return folder


def put_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
    return path


def put_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def put_csv(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


# --- SEED-Bench-R1 -----------------------------------------------------------------------------------------------

SEED_TRAIN = {
    "sample_id": 17, "video_id": "P01_13", "task_goal": "store cereal", "video_source": "EpicKitchens",
    "question": "Considering the progress shown in the video, what should I do next to store cereal?",
    "answer": "put cereal box into cupboard", "video_basename": "P01_13_17.mp4",
    "negative_answers": ["take bag", "open cupboard", "fold bag", "take bag", "wash cup", "open tap"],
    "current_observation_basename": "P01_13_760.png",
    "task_progress_metadata": [{"narration_text": "take cereal bag", "start_frame": 36, "stop_frame": 105}],
}  # fmt: skip
SEED_VAL = {key: value for key, value in SEED_TRAIN.items() if key != "negative_answers"} | {
    "sample_id": "ego_5", "video_source": "Ego4D", "answer": "take bag", "golden_choice_idx": "C",
    "choice_a": "wash cup", "choice_b": "open tap", "choice_c": "take bag", "choice_d": "fold bag",
}  # fmt: skip


def seed_train(folder: Path) -> tuple[Path, Path]:
    media = "videos/EpicKitchens/P01_13_17.mp4", "images/EpicKitchens/P01_13_760.png"
    return put_lines(folder / "training.jsonl", [SEED_TRAIN]), put_media(folder / "data", *media)


def seed_val(folder: Path) -> tuple[Path, Path]:
    media = "videos/Ego4D/P01_13_17.mp4", "images/Ego4D/P01_13_760.png"
    rows = [SEED_VAL, SEED_VAL | {"sample_id": "ego_6", "task_progress_metadata": [], "golden_choice_idx": "a"}]
    return put_lines(folder / "validation_L2.jsonl", rows), put_media(folder / "data", *media)


# --- Video-R1 ----------------------------------------------------------------------------------------------------


def r1_row(problem_id: int, problem_type: str, solution: str, **change: Any) -> dict[str, Any]:
    return {
        "problem_id": problem_id, "problem": "How far does it move?", "data_type": "video",
        "problem_type": problem_type, "options": [], "solution": f"<answer>{solution}</answer>",
        "path": "./LLaVA-Video-178K/x.mp4", "data_source": "LLaVA-Video-178K",
    } | change  # fmt: skip


def video_r1(folder: Path) -> tuple[Path, Path]:
    rows = [
        r1_row(7, "multiple choice", "B", options=["A. one step", "B. two steps", "C. It stays"]),
        r1_row(7, "numerical", "12.50"),
        r1_row(8, "OCR", "Gate 42", data_type="image", path="./OCR/sign.jpg"),
        r1_row(9, "free-form", "It rolls\nto the left."),
        r1_row(10, "regression", " 3.7 "),
    ]
    media = put_media(folder / "data", "LLaVA-Video-178K/x.mp4", "OCR/sign.jpg")
    return put_json(folder / "Video-R1-260k.json", rows), media


_R1_GOLDS = [
    Gold("0", "B", "LLaVA-Video-178K/x.mp4", options=3, metadata={"problem_id": 7, "data_type": "video"}),
    Gold("1", "12.50", "LLaVA-Video-178K/x.mp4", "number", metadata={"problem_type": "numerical"}),
    Gold("2", "Gate 42", "", "ocr", image="OCR/sign.jpg"),
    Gold("3", "It rolls\nto the left.", "LLaVA-Video-178K/x.mp4", "text"),
    Gold("4", "3.7", "LLaVA-Video-178K/x.mp4", "regression"),
]

# --- NExT-QA and NExT-GQA ----------------------------------------------------------------------------------------

CHOICES = {"a0": "to eat", "a1": "to sleep, quietly", "a2": "to play", "a3": "to drink", "a4": "to run"}
NEXT_ROW = {
    "video": "4010069381", "frame_count": 369, "width": 640, "height": 480, "question": "why does the dog lie down",
    "answer": 1, "qid": 6, "type": "CW", **CHOICES,
}  # fmt: skip


def nextqa(folder: Path) -> tuple[Path, Path]:
    rows = [
        NEXT_ROW,
        NEXT_ROW | {"qid": 7, "answer": 0, "type": "TP"},
        NEXT_ROW | {"qid": 8, "answer": 4, "type": "DL"},
    ]
    put_csv(folder / "val.csv", rows)
    put_json(folder / "map_vid_vidorID.json", {"4010069381": "1164/4010069381"})
    return folder, put_media(folder / "NExTVideo", "1164/4010069381.mp4")


def gqa_row(**change: Any) -> dict[str, Any]:
    row = {"video_id" if key == "video" else key: value for key, value in NEXT_ROW.items()}
    return row | {"answer": "to sleep, quietly"} | change


def nextgqa(folder: Path) -> tuple[Path, Path]:
    location = {"6": [[-0.1, 2.4], [5, 7.5]], "7": [[1.0, 2.0]]}
    put_json(folder / "gsub_test.json", {"4010069381": {"duration": 12, "location": location, "fps": 29.97}})
    annotations = put_csv(folder / "test.csv", [gqa_row(), gqa_row(qid=7, answer="to run", type="TN")])
    return annotations, put_media(folder / "videos", "4010069381.mp4")


def nextgqa_list(folder: Path) -> tuple[Path, Path]:
    row = {
        "qid": "6", "question": "why does the dog lie down", "video_path": "NExTVideo/1164/4010069381.mp4",
        "options": list(CHOICES.values()), "answer": "1", "qtype": "CW", "duration": 12, "time_clues": [[0.5, 2.4]],
    }  # fmt: skip
    return put_json(folder / "nextgqa_val.json", [row]), put_media(folder, "NExTVideo/1164/4010069381.mp4")


# --- Perception Test, VSI-Bench, MVBench -------------------------------------------------------------------------


def perception_question(number: int, answer_id: int) -> dict[str, Any]:
    return {
        "id": number, "question": "Is the object under a cup?", "options": ["left", "middle", "right"],
        "answer_id": answer_id, "area": "memory", "reasoning": "descriptive", "tag": ["object permanence"],
    }  # fmt: skip


def perception_test(folder: Path, cut: int = -1) -> tuple[Path, Path]:
    metadata = {"split": "valid", "video_id": "video_42", "frame_rate": 30.0, "num_frames": 361, "is_cup_game": 1}
    asked = [perception_question(0, 2), perception_question(1, 0)]
    put_json(folder / "mc_question_valid.json", {"video_42": {"metadata": metadata, "mc_question": asked}})
    put_json(folder / "cut_frame_mapping_valid.json", {"video_42": cut})
    return folder, put_media(folder / "videos", "video_42.mp4")


def vsi_bench(folder: Path) -> tuple[Path, Path]:
    row = {"dataset": "arkitscenes", "scene_name": "41069025", "question": "How long is the longest side of the bed?"}
    rows = [
        row | {"id": 0, "question_type": "object_size_estimation", "ground_truth": "205", "options": None},
        row | {"id": 1, "question_type": "object_rel_direction_hard", "ground_truth": "D",
               "options": ["A. back-left", "B. front-left", "C. back-right", "D. front-right"]},
    ]  # fmt: skip
    return put_lines(folder / "test.jsonl", rows), put_media(folder, "arkitscenes/41069025.mp4")


MV_ROW = {"video": "v 1.mp4", "question": "What moves?", "candidates": ["the cup", "the ball"], "answer": "the ball"}


def mvbench(folder: Path, **change: Any) -> tuple[Path, Path]:
    path = put_json(folder / "json" / "moving_count.json", [MV_ROW, MV_ROW | {"answer": "the cup"} | change])
    return path, put_media(folder / "video", "clevrer/video_validation/v 1.mp4")


# --- the user's own ----------------------------------------------------------------------------------------------


def jsonl(folder: Path) -> tuple[Path, Path]:
    rows = [
        {"video": "a/x.mp4", "question": "Which?", "options": ["red", "blue"], "answer": "blue", "spans": [[0, 1.5]]},
        {"image": "y.png", "question": "What colour?", "answer": "grey", "id": "mine", "metadata": {"by": ["me"]}},
        {"video": "a/x.mp4", "question": "How many?", "answer": 3, "kind": "number"},
    ]
    return put_lines(folder / "mine.jsonl", rows), put_media(folder, "a/x.mp4", "y.png")


_NEXT_VIDEO = "1164/4010069381.mp4"
CASES = [
    Case("seed-bench-r1", seed_train, [
        Gold("17", "D", "videos/EpicKitchens/P01_13_17.mp4", options=4, image="images/EpicKitchens/P01_13_760.png",
             metadata={"split": "train", "task_goal": "store cereal"}),
    ], "train"),
    Case("seed-bench-r1", seed_val, [
        Gold("ego_5", "C", "videos/Ego4D/P01_13_17.mp4", options=4, image="images/Ego4D/P01_13_760.png"),
        Gold("ego_6", "A", "", options=4, image="images/Ego4D/P01_13_760.png"),
    ], "L2"),
    Case("video-r1", video_r1, _R1_GOLDS),
    Case("video-r1", video_r1, [gold for gold in _R1_GOLDS if gold.video], "video"),
    Case("video-r1", video_r1, [gold for gold in _R1_GOLDS if gold.image], "image"),
    Case("nextqa", nextqa, [
        Gold("4010069381_6", "B", _NEXT_VIDEO, options=5, metadata={"type": "CW", "group": "causal"}),
        Gold("4010069381_7", "A", _NEXT_VIDEO, options=5, metadata={"type": "TP", "group": "temporal"}),
        Gold("4010069381_8", "E", _NEXT_VIDEO, options=5, metadata={"type": "DL", "group": "descriptive"}),
    ], "val"),
    Case("nextgqa", nextgqa, [
        Gold("4010069381_6", "B", "4010069381.mp4", options=5, spans=((0.0, 2.4), (5.0, 7.5)),
             metadata={"duration": 12}),
        Gold("4010069381_7", "E", "4010069381.mp4", options=5, spans=((1.0, 2.0),), metadata={"group": "temporal"}),
    ]),
    Case("nextgqa", nextgqa_list, [
        Gold("4010069381_6", "B", f"NExTVideo/{_NEXT_VIDEO}", options=5, spans=((0.5, 2.4),)),
    ], label="list"),
    Case("perception-test", perception_test, [
        Gold("video_42/0", "C", "video_42.mp4", options=3, metadata={"area": "memory", "reasoning": "descriptive"}),
        Gold("video_42/1", "A", "video_42.mp4", options=3, metadata={"tag": ["object permanence"]}),
    ], "valid"),
    Case("vsi-bench", vsi_bench, [
        Gold("0", "205", "arkitscenes/41069025.mp4", "mra", metadata={"task": "object_size_estimation"}),
        Gold("1", "D", "arkitscenes/41069025.mp4", options=4,
             metadata={"task": "object_rel_direction", "question_type": "object_rel_direction_hard"}),
    ]),
    Case("mvbench", mvbench, [
        Gold("moving_count/0", "B", "clevrer/video_validation/v 1.mp4", options=2, metadata={"task": "moving_count"}),
        Gold("moving_count/1", "A", "clevrer/video_validation/v 1.mp4", options=2),
    ]),
    Case("jsonl", jsonl, [
        Gold("0", "B", "a/x.mp4", options=2, spans=((0.0, 1.5),)),
        Gold("mine", "grey", "", "word", image="y.png", metadata={"by": ["me"]}),
        Gold("2", "3", "a/x.mp4", "number"),
    ]),
]  # fmt: skip
