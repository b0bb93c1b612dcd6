"""A text model of the embedded world, trained from scratch in minutes: python -m recipes.tiny_policy.reasoner.

A Llama of 160,000 parameters reads a description and a question and answers; saved at several stages,
it is a row of reasoners from weak to strong. It has a chat template, so any server of chat models can serve it.

Shape suffixes: B rows of a batch, L tokens.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from recipes.tiny_policy.build import ROPE_THETA, start_as_lookup
from recipes.tiny_policy.processor import build_tokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from appo.experiments.study.words import REASON, description_of, reasoning_prompt, scene_in_words
from appo.models.prefix_packing import IGNORED
from appo.types import VideoQA
from appo.world.teacher import respond
from appo.world.world import LEVELS, TASKS, make_question, make_scene

STAGES = (50, 100, 400)
BATCH, RATE, WARM = 48, 2e-3, 20
MORE_QUESTIONS = 5  # about a scene that was described in full

# Of a prompt the model reads description and question; the instruction around them is the same in all prompts, and of
# words that it has not.
_HEAD, _TAIL = REASON.partition("{description}")[0], REASON.partition("{question}")[2][:16]
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "<|im_start|>{{ message.role }} "
    f"{{{{ message.content.split({_HEAD!r})[-1].split({_TAIL!r})[0] }}}}"
    "<|im_end|>\n"
    "{%- endfor -%}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif -%}"
)


def build_reasoner(seed: int = 0) -> tuple[Any, Any]:
    """An untrained model and its tokenizer: the embedded world's words and a chat template."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        attention_bias=True,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).float()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            half = 0.5 if name.endswith(("o_proj", "down_proj")) else 1.0
            nn.init.normal_(module.weight, std=module.in_features**-0.5 * half)
    nn.init.normal_(model.get_input_embeddings().weight, std=0.1)
    for number, layer in enumerate(model.model.layers):
        start_as_lookup(layer.self_attn, previous=number == 0)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=8, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model, tokenizer


def lesson(rng: random.Random) -> list[tuple[str, str]]:
    """A conversation: prompts with their answers, the first as a study has it.

    Half of them are about an exact description, with more questions about the same scene, so that a description once
    read teaches six times; half about what an honest policy would say, which answers its own question only.
    """
    scene = make_scene(LEVELS[rng.choice(("L1", "L3"))], rng)
    question = make_question(scene, rng.choice(TASKS), rng)
    more = []
    if rng.random() < 0.5:
        description = scene_in_words({"events": [asdict(event) for event in scene.events]})
        more = [make_question(scene, rng.choice(TASKS), rng) for _ in range(MORE_QUESTIONS)]
    else:
        description = description_of(respond(scene, question, question.target, rng))
    prompt = reasoning_prompt(VideoQA("", None, question.text, question.answer), description)
    turns = [(prompt, question.answer), *((other.text, other.answer) for other in more)]
    return [(asked, f"<answer> {answer} </answer>") for asked, answer in turns]


def batch_of(tokenizer: Any, lessons: Sequence[Sequence[tuple[str, str]]]) -> dict[str, Tensor]:
    """input_ids, attention_mask and labels, int64 (B, L), padded on the right; only answers have labels."""
    rows: list[tuple[list[int], list[int]]] = []
    for turns in lessons:
        rows.append(([], []))
        for prompt, answer in turns:
            chat = [{"role": "user", "content": prompt}]
            asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            start, end = (tokenizer(text)["input_ids"] for text in (asked, f"{answer}{tokenizer.eos_token}"))
            rows[-1][0].extend(start + end)
            rows[-1][1].extend([IGNORED] * len(start) + end)

    def padded(values: list[list[int]], fill: int) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in values], batch_first=True, padding_value=fill)

    return {
        "input_ids": padded([ids for ids, _ in rows], tokenizer.pad_token_id),
        "attention_mask": padded([[1] * len(ids) for ids, _ in rows], 0),
        "labels": padded([labels for _, labels in rows], IGNORED),
    }


def train(output: Path, stages: Sequence[int] = STAGES, seed: int = 0) -> list[Path]:
    """Train and save a checkpoint at each stage; the same seed gives the same weights on one thread.

    Args:
        output: folder; ``step-N`` in it are the checkpoints.
        stages: optimiser steps after which one is saved, rising.
        seed: of weights and lessons.

    Returns:
        the checkpoints' folders.
    """
    model, tokenizer = build_reasoner(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    rng, saved, start = random.Random(f"reasoner/{seed}"), [], time.monotonic()
    for step in range(1, stages[-1] + 1):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, step / WARM)
        loss = model(**batch_of(tokenizer, [lesson(rng) for _ in range(BATCH)])).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 0 or step in stages:
            left = (time.monotonic() - start) / step * (stages[-1] - step)
            print(f"step {step}/{stages[-1]}  loss {loss.item():.3f}  {left:.0f} s left", flush=True)
        if step in stages:
            saved.append(output / f"step-{step}")
            model.save_pretrained(saved[-1])
            tokenizer.save_pretrained(saved[-1])
    return saved


def main() -> None:
    """Parse, train, print the folders."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--stages", type=int, nargs="+", default=list(STAGES), help="steps after which one is saved")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for folder in train(arguments.output, arguments.stages, arguments.seed):
        print(folder)


if __name__ == "__main__":
    main()
