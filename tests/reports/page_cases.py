"""Runs for the page's tests: a recorded one, generated ones of any size, texts meant to break out of a page."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from appo.reports.records import ResponseRecord, RolloutRecord
from appo.reports.run_folder import LoadedRun, RunFolder
from appo.video.frame_sampling import SampledVideo
from appo.video.thumbnails import filmstrip

RECORDED = Path(__file__).parent / "recorded_run"

# Each tries to leave the place where text belongs: the JSON, the script element, an attribute, the line, the encoding.
INJECTIONS = {
    "script": "<script>window.broken = 1</script>",
    "end": "</script><script>window.broken = 2</script><!--",
    "comment": "<!--<script>",
    "cdata": "]]></script><svg onload=window.broken=3>",
    "image": "<img src=x onerror='window.broken = 4'>",
    "entity": "&lt;b&gt; &amp;amp; &#60;script&#62; &quot;",
    "attribute": '" onmouseover="window.broken=5" x=\'',
    "template": "{{ 7 * 7 }} {% raw %} ${window.broken = 6} `",
    "backslash": '\\u003c/script\\u003e \\ \\\\ \\"',
    "lines": "a\u2028b\u2029c\r\nd\x85e",
    "bidi": "\u202egnp.exe\u202c \u2066x\u2069 \u200f\u061c",
    "hidden": "zero\u200bwidth \ufeffmark \x00null \x1b[31mescape \x7f",
    "surrogate": "lone \ud800 half \udfff",
    "address": "javascript:window.broken=7",
    "style": "</style><style>body{display:none}</style>",
}


def response(rng: random.Random, tokens: int, frames: int, right: bool) -> ResponseRecord:
    """A response of random words, with attention like a model's: most of it spread out, some of it sharp."""
    words = [rng.choice(("the ", "star ", "is ", "red ", "at ", "6 ", "I ", "look ", ", ")) for _ in range(tokens)]
    attention = [[round(rng.random() ** 4 * 0.1, 6) for _ in range(frames)] for _ in range(tokens)]
    return ResponseRecord(
        text="".join(words),
        tokens=words,
        weights=[round(rng.uniform(1, 1.7), 5) for _ in range(tokens)],
        chosen=[rng.random() < 0.2 for _ in range(tokens)],
        frame_attention=attention,
        rewards={"accuracy_reward": float(right), "format_reward": 1.0},
        advantage=0.5 if right else -0.5,
    )


def group(seed: int, *, tokens: int = 12, frames: int = 4, count: int = 4, **changed: Any) -> RolloutRecord:
    """A group, half of it right."""
    rng = random.Random(seed)
    record = RolloutRecord(
        step=seed,
        id=f"q{seed}",
        video=f"clips/{seed}.mp4",
        question="What colour is the star?",
        answer="red",
        kind="word",
        timestamps=[0.25 + frame for frame in range(frames)],
        crucial_frames=[1],
        responses=[response(rng, tokens, frames, i % 2 == 0) for i in range(count)],
        event_frames=[1, 2],
        film=f"{seed}.webp",
    )
    return replace(record, **changed)


@cache
def film(seed: int, frames: int = 4, size: tuple[int, int] = (360, 480)) -> bytes:
    """A strip of frames as hard to compress as a real video's: soft shapes with some grain."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (2 * frames, 6, 8, 3))
    frames_THWC = np.kron(coarse, np.ones((1, size[0] // 6, size[1] // 8, 1))) + rng.normal(
        0, 12, (2 * frames, *size, 3)
    )
    times = tuple(float(t) for t in range(2 * frames))
    pixels = np.clip(frames_THWC, 0, 255).astype(np.uint8)
    return filmstrip([SampledVideo("a.mp4", pixels, times, 1.0, 2 * frames, tuple(range(2 * frames)))], 2)


def run(groups: list[RolloutRecord], **changed: Any) -> LoadedRun:
    """A run of these groups, with a picture for each."""
    pictures = {one.film: film(7) for one in groups[:1]}
    return LoadedRun(**{"name": "run", "groups": groups, "films": pictures, **changed})


def folder(path: Path, groups: list[RolloutRecord]) -> RunFolder:
    """A run folder of these groups, with two steps of metrics."""
    made = RunFolder.create(path, {"training": {"method": "appo", "max_weight": 1.7}})
    for step in (1, 2):
        made.append_metrics(
            {"step": step, "reward": step / 4, "entropy": 0.3, "time/generate": 2.0, "time/update": 1.0}
        )
    for one in groups:
        made.append_rollout(replace(one, film=made.save_film(film(one.step))))
    return made
