"""The same short run by TRL's GRPOTrainer and by APPOTrainer, on text alone: for what both must do alike."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from recipes.tiny_policy.build import build_policy
from recipes.tiny_policy.processor import CHAT_TEMPLATE, build_tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from appo import APPOConfig, APPOTrainer
from appo.models.families import family_of
from tests.support.runs import FAST, accuracy_reward

WORDS = [
    "what colour is the star ?",
    "what shape is the red one ?",
    "which came first ?",
    "when ?",
    "how many ?",
    "why ?",
]
# What makes method dapo the loss of TRL and nothing else; GRPOConfig needs its epsilon_high.
PLAIN = {"method": "dapo", "max_resampling_rounds": 0, "overlong_cache": 0}


def questions(words: list[str] = WORDS) -> Dataset:
    return Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in words])


def small(tokenizer: Any, **more: Any) -> Qwen2Config:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, initializer_range=0.2, **sizes, **ids, **more)


def policy(kind: str) -> tuple[Any, Any, list[int]]:
    """A policy, what reads its prompts, and the tokens it must not sample: a language model, or one that sees."""
    if kind == "vision-language":
        model, processor = build_policy(0)
        return model, processor, family_of(model).banned_ids
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    return Qwen2ForCausalLM(small(tokenizer)), tokenizer, []


def stock_trainer(folder: Any, kind: str = "language", rewards: Any = accuracy_reward, **kwargs: Any) -> GRPOTrainer:
    """TRL's own trainer, set as method dapo of `same_trainer`."""
    model, processing_class, banned = policy(kind)
    settings = {**FAST, "epsilon_high": 0.28, **kwargs.pop("settings", {})}
    args = GRPOConfig(
        str(folder / "trl"), generation_kwargs={"suppress_tokens": banned} if banned else None, **settings
    )
    return GRPOTrainer(model, rewards, args, train_dataset=questions(), processing_class=processing_class, **kwargs)


def same_trainer(folder: Any, kind: str = "language", rewards: Any = accuracy_reward, **kwargs: Any) -> APPOTrainer:
    """The project's, with nothing on that TRL does not have."""
    model, processing_class, _ = policy(kind)
    args = APPOConfig(str(folder / "appo"), **{**FAST, **PLAIN, **kwargs.pop("settings", {})})
    return APPOTrainer(model, rewards, args, train_dataset=questions(), processing_class=processing_class, **kwargs)
