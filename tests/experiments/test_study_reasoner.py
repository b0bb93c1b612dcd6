"""The tiny text reasoner: what it reads of a prompt, what it is taught, and text models in batches."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from recipes.tiny_policy.reasoner import batch_of, build_reasoner, lesson, train

from appo.experiments.study.reasoners import TextModel
from appo.experiments.study.words import reasoning_prompt, rule_answer
from appo.models.prefix_packing import IGNORED
from appo.types import VideoQA

DESCRIPTION = "there is the pink star at 3 . there is the red heart at 5 ."
QUESTION = VideoQA("q", None, "when does the star appear ?", "3")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("reasoner"), stages=(10,))[0]


def prompt_words(tokenizer: Any, messages: list[dict[str, str]]) -> list[str]:
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    return list(tokenizer.convert_ids_to_tokens(ids))


def test_of_a_prompt_it_reads_description_and_question() -> None:
    _, tokenizer = build_reasoner()
    prompt = reasoning_prompt(QUESTION, DESCRIPTION)
    words = f"<|im_start|> user {DESCRIPTION} {QUESTION.question} <|im_end|> <|im_start|> assistant"
    assert prompt_words(tokenizer, [{"role": "user", "content": prompt}]) == words.split()
    assert prompt_words(tokenizer, [{"role": "user", "content": "red ?"}]) == (
        ["<|im_start|>", "user", "red", "?", "<|im_end|>", "<|im_start|>", "assistant"]
    )


def test_lessons_are_the_prompts_of_a_study_with_the_right_answers() -> None:
    rng = random.Random(0)
    for _ in range(500):
        (prompt, answer), *more = lesson(rng)
        described = prompt.partition(":\n")[2].partition("\n\n")[0]
        question = prompt.partition("\n\n")[2].partition("\n\n")[0]
        assert prompt == reasoning_prompt(VideoQA("", None, question, "x"), described)
        for asked, said in [(question, answer), *more]:
            assert said == f"<answer> {rule_answer(asked, described)} </answer>"


def test_only_answers_have_labels_and_every_answer_ends() -> None:
    _, tokenizer = build_reasoner()
    rng = random.Random(1)
    lessons = [lesson(rng) for _ in range(8)]
    batch = batch_of(tokenizer, lessons)
    for row, turns in enumerate(lessons):
        labels = batch["labels"][row]
        assert (labels[labels != IGNORED] == batch["input_ids"][row][labels != IGNORED]).all()
        said = tokenizer.decode(labels[labels != IGNORED])
        assert said.split() == " ".join(f"{answer} <|im_end|>" for _, answer in turns).split()
        assert not (batch["attention_mask"][row] == 0)[labels != IGNORED].any()


def test_stages_are_points_of_one_training(checkpoint: Path, tmp_path: Path) -> None:
    again = train(tmp_path, stages=(5, 10))[1]
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert (again / name).read_bytes() == (checkpoint / name).read_bytes()
    assert (again / "model.safetensors").read_bytes() != (tmp_path / "step-5" / "model.safetensors").read_bytes()
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 1_000_000


def test_a_batch_has_the_answers_of_each_prompt_alone(checkpoint: Path) -> None:
    model = TextModel(str(checkpoint), max_new_tokens=6)
    rng = random.Random(2)
    prompts = [lesson(rng)[0][0] for _ in range(12)]
    alone = [model([prompt])[0] for prompt in prompts]
    assert model(prompts) == alone
    assert len({said.text for said in alone}) > 1
    _, tokenizer = build_reasoner()
    for prompt, said in zip(prompts, alone, strict=True):
        assert said.tokens is not None
        read, written = said.tokens
        assert read == len(prompt_words(tokenizer, [{"role": "user", "content": prompt}]))
        assert 1 <= written <= 6


def test_a_model_without_a_chat_template_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    for file in checkpoint.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="has no chat template"):
        TextModel(str(tmp_path), 4)(["a"])
