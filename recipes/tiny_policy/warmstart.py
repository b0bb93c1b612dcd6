"""From nothing to the lazy policy: `python -m recipes.tiny_policy.warmstart --output DIR`, minutes on one thread.

1. The vision tower learns to make each cell's merged token score its shape, colour and clock words (tied embeddings).
2. The language model, vision frozen, learns to look up and report: one event in one frame, then two, then whole clips.
3. The same with whole, paraphrased responses: the *honest* policy.
4. The lazy phase: about half of the time the teacher looks at, reports and answers with another event than the one
   asked for. What comes out sees well and often looks at the wrong thing: reinforcement learning has a habit to
   change, not perception to build from nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from recipes.tiny_policy.build import build_policy
from recipes.tiny_policy.lessons import (
    CLOCK_WORDS,
    COLOUR_WORDS,
    FACTS,
    SHAPE_WORDS,
    Batch,
    Lessons,
    Stage,
    build_pool,
    cell_targets,
    drill_scene,
    pixels,
)
from recipes.tiny_policy.measure import measure
from recipes.tiny_policy.processor import build_processor
from torch import Tensor
from torch.nn import functional
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from appo.models.prefix_packing import IGNORED
from appo.world.dataset import generate
from appo.world.teacher import COMMITTING, Style
from appo.world.world import CELLS, LEVELS, Dials

# In distribution, with mild variants (noise, longer clips, more distractors), or unseen ones break the format first.
SHORT = (Dials(), Dials(), Dials(noise=5.0, distractors=(1, 3)))
LONG = (Dials(seconds=12, events=(2, 4), distractors=(1, 3)), Dials(seconds=12, events=(3, 4), noise=5.0))
FACT_WEIGHT = 3.0  # of words that name shapes, colours and seconds; paraphrase is noise that slows learning
RECORD = "warmstart.json"
VISION_SCALE = 8.0  # of dot products with embeddings of norm about 1: confident logits without long vectors

STAGES = (
    Stage("two events", (2,), 2, 250, full=False),
    Stage("whole clips", (8, 8, 12), 4, 100, full=False),
    Stage("honest", (8, 8, 12), 4, 600, final_rate=3e-5),
    Stage("lazy", (8, 8, 12), 4, 100, lazy=0.5, rate=4e-4, final_rate=3e-5),
)


@dataclass(frozen=True)
class Recipe:
    """Sizes of a warm start; the defaults made the shipped weights.

    Attributes:
        seed: of weights, clips, questions and samples.
        vision_clips: clips of many glyphs for the vision tower.
        vision_steps: optimiser steps of the vision tower.
        short_clips: clips of 8 seconds for the language model.
        long_clips: clips of 12 seconds.
        stages: the language model's curriculum.
        questions: for each measurement of the honest and of the lazy policy.
    """

    seed: int = 0
    vision_clips: int = 500
    vision_steps: int = 600
    short_clips: int = 800
    long_clips: int = 300
    stages: tuple[Stage, ...] = STAGES
    questions: int = 96


def warm_start(recipe: Recipe, output: Path) -> dict[str, Any]:
    """Train, measure and save a policy with its processor; the record is returned and saved as `RECORD`."""
    start = time.perf_counter()
    model, processor = build_policy(recipe.seed)
    log: dict[str, Any] = {"vision": train_vision(model, processor, recipe)}
    lessons = lessons_of(model, processor, recipe, COMMITTING)
    optimizer = torch.optim.AdamW(model.model.language_model.parameters(), lr=1e-3, weight_decay=0.01)
    command = f"python -m recipes.tiny_policy.warmstart --output DIR --seed {recipe.seed}"
    record: dict[str, Any] = {"command": command, "versions": versions(), "measured": {}}
    for stage in recipe.stages:
        log[stage.name] = train_stage(model, lessons, stage, optimizer)
        if stage.name in ("honest", "lazy"):
            pause = time.perf_counter()
            record["measured"][stage.name] = measure_levels(model, processor, recipe)
            start += time.perf_counter() - pause  # seconds of training only
    record |= {"seconds": round(time.perf_counter() - start), "recipe": asdict(recipe), "log": log}
    save(model, record, output)
    return record


def lessons_of(
    model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, recipe: Recipe, style: Style
) -> Lessons:
    """What a recipe's clips teach, as this model's vision sees them, in a teacher's style."""
    pools = {
        8: build_pool(model, processor, SHORT, recipe.short_clips, recipe.seed),
        12: build_pool(model, processor, LONG, recipe.long_clips, recipe.seed + 1),
    }
    return Lessons(processor, pools, recipe.seed, style)


def save(model: Qwen2_5_VLForConditionalGeneration, record: dict[str, Any], output: Path) -> None:
    """Write weights, processor and record into a folder."""
    model.save_pretrained(output)
    build_processor().save_pretrained(output)  # a fresh one: batches leave padding settings in a tokenizer
    (output / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def measure_levels(
    model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, recipe: Recipe
) -> dict[str, Any]:
    """Fresh clips of every level as mp4 files, through the real processor and `generate`."""
    model.eval()
    result = {}
    for level in LEVELS:
        with tempfile.TemporaryDirectory() as folder:
            questions = generate(folder, level, recipe.questions, recipe.seed + 1000)
            torch.manual_seed(recipe.seed)
            result[level] = measure(model, processor, questions)
        print("measured", level, json.dumps(result[level]), flush=True)
    model.train()
    return result


def versions() -> dict[str, str]:
    """What a repetition would have to share: interpreter, libraries, threads."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": str(torch.get_num_threads()),
    }


def train_vision(
    model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, recipe: Recipe
) -> list[dict[str, float]]:
    """Stage 1; returns loss and accuracies (shape, colour, clock) every 25 steps."""
    rng = random.Random(f"vision/{recipe.seed}")
    dials = [replace(SHORT[i % 3], seconds=12, distractors=(1, 3)) for i in range(recipe.vision_clips)]
    scenes = [drill_scene(dial, rng) for dial in dials]
    values, grids = pixels(scenes, processor)
    patches = values.view(int(grids[:, 0].sum()), -1, values.shape[-1])
    targets = torch.cat([cell_targets(scene) for scene in scenes]).view(len(patches), CELLS, 3)
    words = _vision_words(model, processor)
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(model.model.visual.parameters(), lr=2e-3, weight_decay=0.01)
    log, steps = [], recipe.vision_steps
    for step in range(steps):
        _set_rate(optimizer, 2e-3 * min(1.0, (step + 1) / 20) * (1 - 0.9 * step / steps))
        picks = torch.randint(len(patches), (128,), generator=generator)
        grid = torch.tensor([[1, 4, 4]]).expand(len(picks), 3)
        merged = model.model.visual(patches[picks].flatten(0, 1), grid_thw=grid).pooler_output
        loss, accuracies = _vision_loss(merged, targets[picks].flatten(0, 1), words)
        _step(optimizer, loss, list(model.model.visual.parameters()))
        if step % 25 == 0 or step == steps - 1:
            log.append({"step": step, "loss": round(loss.item(), 4), **accuracies})
            print("vision", log[-1], flush=True)
    return log


def train_stage(
    model: Qwen2_5_VLForConditionalGeneration,
    lessons: Lessons,
    stage: Stage,
    optimizer: torch.optim.Optimizer,
) -> list[dict[str, float]]:
    """One stage of the language model; returns loss and factual accuracy every 25 steps."""
    facts = torch.zeros(model.config.text_config.vocab_size, dtype=torch.bool)
    facts[[lessons.words[word] for word in FACTS]] = True
    parameters = list(model.model.language_model.parameters())
    log, running = [], 0.0
    for step in range(stage.steps):
        rate = stage.rate + (stage.final_rate - stage.rate) * step / stage.steps
        _set_rate(optimizer, rate * min(1.0, (step + 1) / 10))
        batch = lessons.draw(stage)
        loss, accuracy = response_loss(model, batch, facts, lessons)
        _step(optimizer, loss, parameters)
        running += (accuracy - running) * max(0.1, 1 / (step + 1))
        done = step == stage.steps - 1 or (step >= 20 and running >= stage.goal)
        if step % 25 == 0 or done:
            log.append({"step": step, "loss": round(loss.item(), 4), "facts": round(running, 4)})
            print(stage.name, log[-1], flush=True)
        if done:
            break
    return log


def response_loss(
    model: Qwen2_5_VLForConditionalGeneration, batch: Batch, facts_V: Tensor, lessons: Lessons
) -> tuple[Tensor, float]:
    """Cross-entropy of the response tokens, factual words weighted, and the share of factual words predicted."""
    hidden = model.model.language_model(
        inputs_embeds=embed(model, batch), position_ids=positions(model, batch), use_cache=False
    ).last_hidden_state
    labels = batch.labels_BL[:, 1:]
    keep = labels != IGNORED
    logits = model.lm_head(hidden[:, :-1][keep])
    gold = labels[keep]
    factual = facts_V[gold]
    weights = torch.where(factual, FACT_WEIGHT, 1.0)
    losses = functional.cross_entropy(logits, gold, reduction="none")
    accuracy = (logits.argmax(-1) == gold)[factual].float().mean().item()
    return (losses * weights).sum() / weights.sum(), accuracy


def embed(model: Qwen2_5_VLForConditionalGeneration, batch: Batch) -> Tensor:
    """Input embeddings (B, L, H) with the cached vision tokens in place of the placeholders."""
    embeddings: Tensor = model.get_input_embeddings()(batch.ids_BL)
    video = (batch.ids_BL == model.config.video_token_id)[..., None]
    return embeddings.masked_scatter(video, batch.features_BSCH.to(embeddings.dtype))


def positions(model: Qwen2_5_VLForConditionalGeneration, batch: Batch) -> Tensor:
    """The model's own 3-D positions (3, B, L). Rows start alike and differ in text only, so one row serves all."""
    row = batch.ids_BL[:1]
    seconds = batch.features_BSCH.shape[1]
    position_ids, _ = model.model.get_rope_index(
        row,
        mm_token_type_ids=(row == model.config.video_token_id).int() * 2,
        video_grid_thw=torch.tensor([[seconds, 4, 4]]),
        second_per_grid_ts=torch.tensor([1.0]),
    )
    same: Tensor = position_ids.expand(3, len(batch.ids_BL), -1)
    return same


def _vision_words(model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor) -> list[Tensor]:
    ids = processor.tokenizer.convert_tokens_to_ids
    embedding = model.get_input_embeddings().weight.detach()
    return [embedding[ids(list(words))] for words in (SHAPE_WORDS, COLOUR_WORDS, CLOCK_WORDS)]


def _vision_loss(merged: Tensor, targets: Tensor, words: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Each cell's token must score its three words, and be little more than their sum.

    Without the second term tokens grow to many times the length of a word, nearly all of it meaningless, and the
    language model takes far longer to match words with cells (ours, measured: cosine 0.36 with the sum).
    """
    losses, accuracies = [], {}
    total = torch.zeros_like(merged)
    for index, name in enumerate(("shape", "colour", "clock")):
        logits = VISION_SCALE * merged @ words[index].T
        gold = targets[:, index]
        losses.append(functional.cross_entropy(logits, gold, ignore_index=IGNORED))
        seen = (gold != IGNORED) & (gold != len(words[index]) - 1 if index < 2 else gold >= 0)
        accuracies[name] = round((logits.argmax(-1) == gold)[seen].float().mean().item(), 4)
        total = total + words[index][gold.clamp(min=0)]
    clear = (targets != IGNORED).all(dim=1)
    excess = (merged - total)[clear].pow(2).sum(dim=1).mean()
    return torch.stack(losses).sum() + excess, accuracies | {"excess": round(excess.item(), 4)}


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _step(optimizer: torch.optim.Optimizer, loss: Tensor, parameters: list[Any]) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def main(arguments: list[str] | None = None) -> None:
    """Command line: train into a folder and say what came out."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.tiny_policy.warmstart",
        description="Make the tiny lazy policy from nothing. Example: --output runs/tiny --seed 0",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for weights, processor and record")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # one thread: repeatable, and faster than two that share their cores
    record = warm_start(Recipe(seed=options.seed), options.output)
    print(f"saved in {options.output} after {record['seconds']} s")


if __name__ == "__main__":
    main()
