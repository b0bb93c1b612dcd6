"""What the warm start learns from: cached clips, and batches of questions with teacher responses about them.

Clips go through a real H.264 file in memory and the real video processor, then through the vision tower once; the
language model's lessons reuse the cached features. Vision attends within one frame only, so a lesson may also take
any subset of a clip's frames: that is the curriculum's «fewer frames, fewer events».

Shape suffixes: B rows, L tokens, S seconds = frames, C = 4 cells, H hidden.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from appo.models.prefix_packing import IGNORED
from appo.world.drawing import FPS, decode, encode, render
from appo.world.teacher import COMMITTING, Style, respond
from appo.world.world import (
    CELLS,
    COLOURS,
    DISTRACTORS,
    HELD_OUT_PAIRS,
    MAX_SECONDS,
    SHAPES,
    Dials,
    Distractor,
    Event,
    Scene,
    make_question,
    make_scene,
)

EMPTY_SHAPE, EMPTY_COLOUR = "background", "none"
SHAPE_WORDS = (*SHAPES, *DISTRACTORS, EMPTY_SHAPE)
COLOUR_WORDS = (*COLOURS, EMPTY_COLOUR)
CLOCK_WORDS = tuple(str(second) for second in range(MAX_SECONDS))
FACTS = (*SHAPES, *COLOURS, *CLOCK_WORDS)


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum for the language model.

    Attributes:
        name: for the log.
        frames: seconds of a clip shown; one of these a batch, all rows of a batch alike.
        events: at most this many events among them.
        steps: at most this many optimiser steps.
        goal: stop early when this share of factual words (running mean) is predicted right.
        tasks: kinds of questions.
        full: whole responses rather than dictated facts.
        lazy: probability that the teacher looks at another event than the one asked for.
        batch: rows.
        rate: learning rate at the start.
        final_rate: learning rate at the end, linear in between.
    """

    name: str
    frames: tuple[int, ...]
    events: int
    steps: int
    goal: float = 1.0
    tasks: tuple[str, ...] = ("colour", "shape", "first", "when")
    full: bool = True
    lazy: float = 0.0
    batch: int = 32
    rate: float = 1e-3
    final_rate: float = 1e-3


@dataclass(frozen=True)
class Pool:
    """Clips of one length: their scenes and merged vision tokens, float32 (clips, S, C, H)."""

    scenes: list[Scene]
    features_KSCH: Tensor


@dataclass(frozen=True)
class Batch:
    """Rows ready for the language model; labels are `IGNORED` outside the response."""

    ids_BL: Tensor
    labels_BL: Tensor
    features_BSCH: Tensor


def pixels(scenes: Sequence[Scene], processor: Qwen2_5_VLProcessor) -> tuple[Tensor, Tensor]:
    """Clips as the vision tower takes them, through real encoded video: pixel values and (t, h, w) grids."""
    videos = [torch.from_numpy(decode(encode(render(scene)), every=FPS // 2)) for scene in scenes]
    videos = [video.permute(0, 3, 1, 2) for video in videos]
    out = processor.video_processor(videos=videos, do_sample_frames=False, return_tensors="pt")
    return out["pixel_values_videos"], out["video_grid_thw"]


@torch.no_grad()
def build_pool(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: Qwen2_5_VLProcessor,
    dials: Sequence[Dials],
    count: int,
    seed: int,
) -> Pool:
    """`count` clips, dials in turn (all of one length), and their merged vision tokens."""
    rng = random.Random(f"pool/{seed}")
    scenes = [make_scene(dials[index % len(dials)], rng) for index in range(count)]
    chunks = []
    for start in range(0, count, 16):
        chunk = scenes[start : start + 16]
        values, grids = pixels(chunk, processor)
        merged = model.model.visual(values, grid_thw=grids).pooler_output
        chunks.append(merged.view(len(chunk), chunk[0].seconds, CELLS, -1).float())
    return Pool(scenes, torch.cat(chunks))


def drill_scene(dials: Dials, rng: random.Random) -> Scene:
    """A scene for the vision tower alone: up to three glyphs in every second, to see many in few clips."""
    scene = make_scene(replace(dials, events=(1, 1)), rng)
    events = []
    for second in range(scene.seconds):
        for cell in rng.sample(range(CELLS), rng.randint(1, 3)):
            shape, colour = rng.choice(SHAPES), rng.choice(COLOURS)
            if (shape, colour) not in HELD_OUT_PAIRS:
                place = [rng.uniform(-1, 1), rng.uniform(-1, 1), rng.random()]
                events.append(Event(shape, colour, second, cell, *place))
    return replace(scene, events=tuple(events))


def cell_targets(scene: Scene) -> Tensor:
    """What each merged token should say: int64 (S * C, 3) indices of shape, colour and clock words.

    A distractor counts where its centre stays for both sampled frames of the second; cells where several meet, or
    that one is just leaving, are `IGNORED` in shape and colour.
    """
    rows = []
    for second in range(scene.seconds):
        for cell in range(CELLS):
            glyphs = [e for e in scene.events if e.second == second and e.cell == cell]
            visits = [_visits(wanderer, second, cell) for wanderer in scene.distractors]
            if glyphs:
                what = SHAPE_WORDS.index(glyphs[0].shape), COLOUR_WORDS.index(glyphs[0].colour)
            elif not any(visits):
                what = SHAPE_WORDS.index(EMPTY_SHAPE), COLOUR_WORDS.index(EMPTY_COLOUR)
            elif sorted(visits)[-2:] in ([2], [0, 2]):
                wanderer = scene.distractors[visits.index(2)]
                what = SHAPE_WORDS.index(wanderer.shape), COLOUR_WORDS.index(wanderer.colour)
            else:
                what = IGNORED, IGNORED
            rows.append((*what, second))
    return torch.tensor(rows)


def _visits(wanderer: Distractor, second: int, cell: int) -> int:
    """In how many of a second's two sampled frames the distractor's centre lies in the cell."""
    places = [wanderer.position(second), wanderer.position(second + 0.5)]
    return sum(int(y >= 0.5) * 2 + int(x >= 0.5) == cell for x, y in places)


class Lessons:
    """Draws batches from pools of clips."""

    def __init__(
        self, processor: Qwen2_5_VLProcessor, pools: dict[int, Pool], seed: int, style: Style = COMMITTING
    ) -> None:
        self.pools = pools
        self.style = style
        self.rng = random.Random(f"lessons/{seed}")
        self.words = processor.tokenizer.get_vocab()
        self.processor = processor

    def draw(self, stage: Stage) -> Batch:
        """One batch of a stage: clips cut to the stage's frames, each with a question and a response."""
        frames = self.rng.choice(stage.frames)
        pool = self.pools[min(seconds for seconds in self.pools if seconds >= frames)]
        rows, labels, features = [], [], []
        for index in range(stage.batch):
            number = self.rng.randrange(len(pool.scenes))
            task = stage.tasks[index % len(stage.tasks)]
            needed = 2 if task == "first" else 1
            seconds, scene = self._cut(pool.scenes[number], frames, max(needed, stage.events))
            prompt, response = self._dialogue(scene, task, stage, len(seconds))
            rows.append(prompt + response)
            labels.append([IGNORED] * len(prompt) + response)
            features.append(pool.features_KSCH[number, seconds])
        length = max(map(len, rows))
        pad = self.words["<|endoftext|>"]
        return Batch(
            torch.tensor([row + [pad] * (length - len(row)) for row in rows]),
            torch.tensor([row + [IGNORED] * (length - len(row)) for row in labels]),
            torch.stack(features),
        )

    def _cut(self, scene: Scene, frames: int, most: int) -> tuple[list[int], Scene]:
        """Keep `frames` seconds with as many events as fit, at most `most` (exactly, when others can be left out)."""
        times = [event.second for event in scene.events]
        kept = set(self.rng.sample(times, min(most, frames, len(times))))
        rest = [second for second in range(scene.seconds) if second not in times]
        spare = [second for second in times if second not in kept]
        self.rng.shuffle(rest)
        kept.update((rest + spare)[: frames - len(kept)])
        events = tuple(event for event in scene.events if event.second in kept)
        return sorted(kept), replace(scene, events=events)

    def _dialogue(self, scene: Scene, task: str, stage: Stage, frames: int) -> tuple[list[int], list[int]]:
        """Token ids of prompt and response; the prompt is what the chat template gives (a test compares)."""
        question = make_question(scene, task, self.rng)
        focus = question.target
        if len(scene.events) > 1 and self.rng.random() < stage.lazy:
            focus = self.rng.choice([index for index in range(len(scene.events)) if index != focus])
        response = respond(scene, question, focus, self.rng, self.style) if stage.full else drill(scene, self.rng)
        pads = " <|video_pad|>" * (frames * CELLS)
        prompt = (
            f"<|im_start|> user <|vision_start|>{pads} <|vision_end|> {question.text} <|im_end|> <|im_start|> assistant"
        )
        return self._ids(prompt), self._ids(f"{response} <|im_end|>")

    def _ids(self, text: str) -> list[int]:
        return [self.words[word] for word in text.split()]


def drill(scene: Scene, rng: random.Random) -> str:
    """Text for the first lessons: one attribute of every event, followed by another of the same event.

    One attention step from word to cell is enough. From whole responses alone the model first finds the frame by the
    second just written, and for hundreds of steps not by the name (measured; not in the paper). One pair an event,
    because a second one could be copied from the first.
    """
    patterns = (
        "{shape} {colour}",
        "{colour} {shape}",
        "{shape} {second}",
        "{shape} at {second}",
        "{colour} one at {second}",
    )
    events = rng.sample(scene.events, len(scene.events))
    pairs = [rng.choice(patterns).format(**asdict(event)) for event in events]
    return f"<think> {' , '.join(pairs)} </think>"
