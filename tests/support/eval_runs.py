"""`appo eval` in tests: a tiny model that reads any text, models whose answers are scripted, small datasets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from recipes.tiny_policy.build import _config, _generation, build_policy, initialise
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from appo.cli.main import main
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.data_fixtures import put_lines, put_media


def save_reader(folder: Path) -> str:
    """An untrained policy that reads and writes bytes, saved as any checkpoint is."""
    words = build_policy(0)[1]
    processor = Qwen2_5_VLProcessor(
        words.image_processor, byte_tokenizer(), words.video_processor, chat_template=words.chat_template
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(_config(processor)).float()
    initialise(model)
    model.generation_config = _generation(processor)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def script(monkeypatch: Any, texts: Sequence[str | Sequence[str]]) -> None:
    """Let the model say these texts (or groups of texts), one a question, in the order they are asked."""
    rest: Iterator[str | Sequence[str]] = iter(texts)

    def say(model: Any, processor: Any, prompts: Sequence[Any], **settings: Any) -> list[list[torch.Tensor]]:
        said = [next(rest) for _ in prompts]
        groups = [[one] if isinstance(one, str) else one for one in said]
        return [[torch.tensor(processor.tokenizer(text)["input_ids"]) for text in group] for group in groups]

    monkeypatch.setattr("appo.evaluation.inference.generate", say)


def tagged(answer: str) -> str:
    return f"<think>I saw it.</think><answer>{answer}</answer>"


def evaluate(output: Path, *arguments: str) -> int:
    return main(["eval", "--output", str(output), *arguments])


def scores(output: Path) -> dict[str, Any]:
    """scores.json with its two lists of scores by name."""
    card = json.loads((output / "scores.json").read_text())
    return card | {how: {score["name"]: score for score in card[how]} for how in ("strict", "lenient")}


def lettered_questions(folder: Path, count: int) -> list[str]:
    """Questions of one's own, each about a video of its own, all answered by B; the arguments that name them."""
    rows = [
        {
            "video": f"{number}.mp4",
            "question": f"Which, {number}?",
            "options": ["red", "blue"],
            "answer": "B",
            "id": str(number),
        }
        for number in range(count)
    ]
    put_media(folder, *(f"{number}.mp4" for number in range(count)))
    return ["--dataset", "jsonl", "--annotations", str(put_lines(folder / "mine.jsonl", rows))]
