"""How long annotations of full size take to `read` and to `load`, and how much memory.

Files are generated in the datasets' own schemas. Each measurement is a fresh process. Media files are empty: neither
call opens them. Example:

    python benchmarks/load_speed.py
    python benchmarks/load_speed.py --sets video-r1 --rows 1000 --output /tmp/load_speed.json
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
WORDS = ["the", "person", "red", "ball", "moves", "left", "right", "before", "after", "door", "opens", "two", "hands"]
LETTERS = "ABCDE"


def sentence(rng: random.Random, words: int) -> str:
    """A sentence of that many words."""
    return " ".join(rng.choices(WORDS, k=words)).capitalize() + "."


# --- the files -------------------------------------------------------------------------------------------------------


def video_r1_rows(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Rows of Video-R1-260k's schema and share of types; two or three questions a file."""
    number = 0
    while True:
        kind = rng.choices(["multiple choice", "numerical", "OCR", "free-form", "regression"], [62, 17, 6, 11, 4])[0]
        video = rng.random() < 0.45
        options = [f"{letter}. {sentence(rng, 6)}" for letter in LETTERS[:4]] if kind == "multiple choice" else []
        answer = {"multiple choice": rng.choice("ABCD"), "OCR": "Gate 42", "free-form": sentence(rng, 12)}.get(
            kind, f"{rng.uniform(0, 100):.2f}"
        )
        yield {
            "problem_id": number, "problem": sentence(rng, 30), "data_type": "video" if video else "image",
            "problem_type": kind, "options": options, "process": "", "solution": f"<answer>{answer}</answer>",
            "path": f"./{'LLaVA-Video-178K' if video else 'Knowledge'}/{rng.randrange(200)}/"
                    f"{rng.randrange(500)}.{'mp4' if video else 'jpg'}",
            "data_source": "LLaVA-Video-178K" if video else "Knowledge",
        }  # fmt: skip
        number += 1


def seed_rows(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Training rows of SEED-Bench-R1's schema; a video and an image each."""
    number = 0
    while True:
        narrations = [
            {"narration_text": sentence(rng, 5), "start_frame": 100 * step, "stop_frame": 100 * step + 80}
            for step in range(8)
        ]
        yield {
            "sample_id": number, "video_id": f"P{number % 40:02d}_01", "task_goal": sentence(rng, 6),
            "question": sentence(rng, 20), "answer": sentence(rng, 5), "video_source": "EpicKitchens",
            "video_basename": f"{number}.mp4", "current_observation_basename": f"{number}.png",
            "negative_answers": [sentence(rng, 5) for _ in range(12)], "task_progress_metadata": narrations,
        }  # fmt: skip
        number += 1


def nextqa_rows(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Rows of NExT-QA's csv; eight questions a video."""
    number = 0
    while True:
        yield {
            "video": str(4_000_000_000 + number // 8), "frame_count": 900, "width": 640, "height": 480,
            "question": sentence(rng, 10), "answer": rng.randrange(5), "qid": number % 8, "type": "CW",
            **{f"a{index}": f"{sentence(rng, 3)[:-1]} {index}" for index in range(5)},
        }  # fmt: skip
        number += 1


def write_json(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One JSON list, as Video-R1 comes."""
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """csv with a header."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


# name -> (rows at full size, file name, rows, writer)
SETS: dict[str, tuple[int, str, Callable[[random.Random], Iterator[dict[str, Any]]], Callable[..., None]]] = {
    "video-r1": (260_000, "Video-R1-260k.json", video_r1_rows, write_json),
    "seed-bench-r1": (50_000, "training.jsonl", seed_rows, write_lines),
    "nextqa": (50_000, "train.csv", nextqa_rows, write_csv),
}


def generate(folder: Path, name: str, rows: int | None) -> Path:
    """Annotations of a dataset in the folder, with all media files that they name (empty ones)."""
    full, file_name, make, write = SETS[name]
    written = list(islice(make(random.Random(0)), rows or full))
    write(folder / file_name, written)
    media = {path for row in written for path in media_of(name, row)}
    for parent in {Path(path).parent for path in media}:
        (folder / parent).mkdir(parents=True, exist_ok=True)
    for path in media:
        (folder / path).touch()
    return folder / file_name


def media_of(name: str, row: dict[str, Any]) -> list[str]:
    """The paths that a row's video and image have in their folder."""
    if name == "video-r1":
        return [row["path"]]
    if name == "nextqa":
        return [f"{row['video']}.mp4"]
    source = row["video_source"]
    return [f"videos/{source}/{row['video_basename']}", f"images/{source}/{row['current_observation_basename']}"]


# --- the measurements ------------------------------------------------------------------------------------------------


def measure(call: str, name: str, annotations: str) -> dict[str, Any]:
    """Seconds by both clocks, and the peak memory of this process before and after one call."""
    import datasets  # noqa: F401  (a second that belongs to no dataset)

    from appo.data import load, read

    before = peak_gb()
    wall, own = time.perf_counter(), time.process_time()
    rows = len(load(name, annotations)) if call == "load" else sum(1 for _ in read(name, annotations))
    return {
        "set": name, "call": call, "rows": rows, "file_mb": round(Path(annotations).stat().st_size / 1e6, 1),
        "seconds": round(time.perf_counter() - wall, 2), "processor_seconds": round(time.process_time() - own, 2),
        "peak_gb": peak_gb(), "libraries_gb": before,
    }  # fmt: skip


def peak_gb() -> float:
    """The largest resident memory of this process so far, in GB (Linux; `getrusage` would count its parent's too)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return round(int(line.split()[1]) * 1024 / 1e9, 3)


def measure_apart(call: str, name: str, annotations: Path, repeats: int) -> dict[str, Any]:
    """The quickest of several fresh processes by its own clock; all of their times are kept."""
    command = [sys.executable, __file__, "--measure", call, name, str(annotations)]
    runs = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(repeats)]
    best: dict[str, Any] = min(runs, key=lambda run: run["processor_seconds"])
    return best | {"all_seconds": [run["seconds"] for run in runs]}


def main(argv: Sequence[str] | None = None) -> int:
    """Generate, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--rows", type=int, help="rows a file (default: full size)")
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes a number (default 3)")
    parser.add_argument("--output", type=Path, default=RESULTS / "load_speed.json", help="the JSON to write")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return 0
    found = []
    print(f"{'set':<16}{'rows':>8}{'MB':>7}{'call':>6}{'seconds':>9}{'own':>7}{'peak GB':>9}{'libraries':>11}")
    for name in args.sets:
        with tempfile.TemporaryDirectory() as folder:
            annotations = generate(Path(folder), name, args.rows)
            for call in ("read", "load"):
                run = measure_apart(call, name, annotations, args.repeats)
                found.append(run)
                memory = f"{run['peak_gb']:>9.2f}{run['libraries_gb']:>11.2f}"
                spent = f"{run['seconds']:>9.1f}{run['processor_seconds']:>7.1f}"
                print(f"{name:<16}{run['rows']:>8}{run['file_mb']:>7.0f}{call:>6}{spent}{memory}")
    import harness  # not before: what is measured in fresh processes is this file alone

    about = argparse.Namespace(script="load_speed", device="cpu")
    where = harness.provenance(about, sys.argv[1:] if argv is None else argv)
    harness.write_json(args.output, where | {"runs": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
