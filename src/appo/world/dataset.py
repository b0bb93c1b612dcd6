"""Clips and questions on disk: `annotations.jsonl` beside the mp4 files it names."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from appo.data import DATASETS, Row, read
from appo.rewards.templates import parse_response
from appo.types import VideoQA
from appo.world.drawing import encode, render
from appo.world.teacher import respond
from appo.world.world import TASKS, Dials, Question, Scene, dials_of, make_question, make_scene

ANNOTATIONS = "annotations.jsonl"
HELD_OUT_SEED = 10_000  # far from any training seed: no evaluated clip is trained on


def samples(dials: Dials, count: int, seed: int | str) -> Iterator[tuple[Scene, Question]]:
    """Scenes with one question each, the tasks in turn. Sample i does not depend on `count`."""
    for index in range(count):
        rng = random.Random(f"{seed}/{index}")  # text seeds: the same numbers in every Python version
        scene = make_scene(dials, rng)
        yield scene, make_question(scene, TASKS[index % len(TASKS)], rng)


def generate(folder: str | Path, level: str, count: int, seed: int, *, workers: int = 1) -> list[VideoQA]:
    """Write `count` clips of a level and their questions; the same arguments give the same bytes.

    Args:
        folder: for mp4 files and `annotations.jsonl`; made if missing, files of the same name are replaced.
        level: "L1" (in distribution), "L2" or "L3" (see `world.LEVELS`).
        count: clips, one question each.
        seed: another seed gives other clips.
        workers: threads. A clip takes 7 to 15 ms on one core, so more than one rarely pays.

    Raises:
        ValueError: an unknown level or a negative count.
    """
    drawn = _drawn(level, count, seed)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(folder / f"{name}.mp4", scene) for name, scene, _ in drawn]
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda job: job[0].write_bytes(encode(render(job[1]))), jobs))
    rows = [_row(name, level, scene, question) for name, scene, question in drawn]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / ANNOTATIONS).write_text(lines, encoding="utf-8", newline="\n")
    return load_annotations(folder / ANNOTATIONS)


def planned(folder: str | Path, level: str, count: int, seed: int) -> list[VideoQA]:
    """What `generate` returns for the same arguments, without files: for setting up a run."""
    rows = [_row(name, level, scene, question) for name, scene, question in _drawn(level, count, seed)]
    fields = [json.loads(json.dumps(row)) for row in rows]  # as the file would hold them
    places = [Row(str(Path(folder) / ANNOTATIONS), row, index) for index, row in enumerate(fields)]
    return [DATASETS["spotlight"].question(place, str(folder), None) for place in places]


def _drawn(level: str, count: int, seed: int) -> list[tuple[str, Scene, Question]]:
    """The name, scene and question of each clip. Raises ValueError as `generate`."""
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    drawn = samples(dials_of(level), count, f"{level}/{seed}")
    return [(f"{level.lower()}-{seed}-{index:05d}", *sample) for index, sample in enumerate(drawn)]


def load_annotations(path: str | Path) -> list[VideoQA]:
    """Read an annotations file, or the one in a folder; its video paths are relative to it. Raises as `read`."""
    return list(read("spotlight", path))


def _row(name: str, level: str, scene: Scene, question: Question) -> dict[str, Any]:
    """One line of the annotations. Seconds and the language model's frames are the same numbers here."""
    evidence = sorted(scene.events[index].second for index in question.evidence)
    events = [{"shape": e.shape, "colour": e.colour, "second": e.second, "cell": e.cell} for e in scene.events]
    return {
        "id": name,
        "video": f"{name}.mp4",
        "question": question.text,
        "answer": question.answer,
        "event_spans": [[second, second + 1] for second in evidence],
        "metadata": {
            "level": level,
            "task": question.task,
            "seconds": scene.seconds,
            "event_frames": evidence,
            "events": events,
            "asked": question.target,
            "texture": scene.texture,
            "reasoning": _reasoning(name, scene, question),
        },
    }


def _reasoning(name: str, scene: Scene, question: Question) -> str:
    """The reasoning of an honest teacher, for supervised training."""
    response = parse_response(respond(scene, question, question.target, random.Random(f"{name}/reasoning")))
    assert response is not None
    return response.think
