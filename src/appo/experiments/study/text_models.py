"""Reasoners that are Hugging Face text models: prompts -> greedy answers, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from appo.models.loading import usual_dtype, usual_place


@dataclass(frozen=True)
class ChatAnswer:
    """An answer, and the tokens read and written for it (None: not known)."""

    text: str
    tokens: tuple[int, int] | None = None


class TextModel:
    """A causal language model with a chat template, loaded when it is first asked."""

    def __init__(self, source: str, max_new_tokens: int, dtype: str | None = None) -> None:
        self._source, self._max_new_tokens, self._dtype = source, max_new_tokens, dtype
        self._loaded: tuple[Any, Any] | None = None

    def __call__(self, prompts: Sequence[str]) -> list[ChatAnswer]:
        """Greedy answers to prompts, as one batch; each prompt is one user turn.

        Raises:
            OSError, ValueError: there is no such checkpoint, it has no chat template, or memory does not hold a batch.
        """
        model, tokenizer = self._loaded = self._loaded or self._load()
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        ).to(model.device)
        try:
            with torch.inference_mode():
                ids_BL = model.generate(**inputs, do_sample=False, max_new_tokens=self._max_new_tokens)
        except torch.OutOfMemoryError as error:
            raise ValueError(f"{len(prompts)} prompts do not fit into the memory: set a smaller batch size") from error
        start = inputs["input_ids"].shape[1]
        read_B = inputs["attention_mask"].sum(dim=1).tolist()
        return [
            ChatAnswer(tokenizer.decode(ids_L, skip_special_tokens=True), (read, _written(ids_L.tolist(), model)))
            for ids_L, read in zip(ids_BL[:, start:], read_B, strict=True)
        ]

    def _load(self) -> tuple[Any, Any]:
        dtype = self._dtype or usual_dtype()
        model = AutoModelForCausalLM.from_pretrained(
            self._source, dtype=dtype, use_safetensors=True, **usual_place()
        ).eval()
        tokenizer = AutoTokenizer.from_pretrained(self._source, padding_side="left")
        if not tokenizer.chat_template:
            raise ValueError(f"{self._source}: has no chat template; choose a model that was tuned to answer")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        config = model.generation_config  # settings of sampling would only be warned about
        config.temperature = config.top_p = config.top_k = None
        config.pad_token_id = tokenizer.pad_token_id
        return model, tokenizer


def _written(ids: Sequence[int], model: Any) -> int:
    """How many tokens there are up to the end of the sequence, which counts."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
