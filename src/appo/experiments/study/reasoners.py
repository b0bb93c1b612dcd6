"""Reasoners that are models: Hugging Face text models, and models behind an OpenAI-compatible endpoint.

The `openai` package retries what may pass (429 and its Retry-After, 5xx, timeouts); `aiolimiter` limits the rate,
retries included. What fails after that is reported by question and can be repeated; what would fail for every question
(a wrong key, model or address) stops at once.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from appo.experiments.study.settings import Calling, Reasoner
from appo.models.loading import usual_dtype, usual_place

# --- text models -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChatAnswer:
    """An answer, and the tokens read and written for it (None: unknown)."""

    text: str
    tokens: tuple[int, int] | None = None


class TextModel:
    """A causal language model with a chat template, loaded at the first prompt."""

    def __init__(self, source: str, max_new_tokens: int, dtype: str | None = None) -> None:
        self._source, self._max_new_tokens, self._dtype = source, max_new_tokens, dtype

    def __call__(self, prompts: Sequence[str]) -> list[ChatAnswer]:
        """Greedy answers to prompts, as one batch; each prompt is one user turn.

        Raises:
            OSError, ValueError: there is no such checkpoint, it has no chat template, or memory does not hold a batch.
        """
        model, tokenizer = self._loaded
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

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
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
    """The number of tokens up to the end of the sequence, which counts."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))


# --- endpoints -------------------------------------------------------------------------------------------------------


FAILURES_IN_A_ROW = 10
# Settings that some servers refuse, and what is sent instead; None: nothing.
INSTEAD = {"temperature": None, "max_completion_tokens": "max_tokens"}
TEMPLATE_TOKENS = 256  # what a chat template may put around a prompt
_LONGEST_ERROR = 300


@dataclass
class Budget:
    """Dollars that may be spent; a request on its way reserves the most that it can cost."""

    limit: float = float("inf")
    spent: float = 0.0
    reserved: float = 0.0


class BudgetError(ValueError):
    """The next request could cost more than is left."""


OnAnswer = Callable[[str, "ChatAnswer | str"], None]


class Endpoint:
    """One model at one URL; counts its requests, and remembers which settings the server refuses.

    `max_tokens`: of the longest answer.
    """

    def __init__(self, reasoner: Reasoner, calling: Calling, budget: Budget, max_tokens: int = 1024) -> None:
        self.reasoner, self.calling, self.budget, self.max_tokens = reasoner, calling, budget, max_tokens
        self.requests = 0
        self._refused: set[str] = set()

    def check(self) -> None:
        """Raise ValueError if a package or the key is missing."""
        _packages()
        self._key()

    def ask(self, prompts: Sequence[tuple[str, str]], on_answer: OnAnswer) -> None:
        """Send all prompts and report every answer or failure.

        Args:
            prompts: (key, prompt), each key once.
            on_answer: called with key and answer as they come; for a failure with key and the reason, one line.

        Raises:
            BudgetError: the budget covers no further request; those on their way are reported first.
            ValueError: key, model or address are wrong, or `FAILURES_IN_A_ROW` requests failed one after the other.
        """
        if prompts:
            asyncio.run(self._ask(prompts, on_answer))

    async def _ask(self, prompts: Sequence[tuple[str, str]], on_answer: OnAnswer) -> None:
        openai, AsyncLimiter = _packages()
        per_minute = self.calling.requests_per_minute
        turn = AsyncLimiter(1, 60 / per_minute) if per_minute else nullcontext()

        async def take_turn(_: Any) -> None:
            self.requests += 1
            async with turn:
                pass

        client = openai.AsyncOpenAI(
            api_key=self._key(),
            base_url=self.reasoner.url or None,
            max_retries=self.calling.retries,
            timeout=self.calling.timeout,
            http_client=openai.DefaultAsyncHttpxClient(event_hooks={"request": [take_turn]}),
        )
        async with client:
            await self._ask_all(client, prompts, on_answer)

    async def _ask_all(self, client: Any, prompts: Sequence[tuple[str, str]], on_answer: OnAnswer) -> None:
        """Send within `at_once` and the budget; on an error, wait for the requests on their way, then raise."""
        waiting, sent = deque(prompts), dict[asyncio.Task[ChatAnswer | str], tuple[str, str]]()
        stop: ValueError | None = None
        failed = 0
        while True:
            while waiting and stop is None and len(sent) < self.calling.at_once:
                most = self.most(waiting[0][1])
                if self.budget.spent + self.budget.reserved + most > self.budget.limit:
                    if not sent:  # no reservation can come back
                        stop = BudgetError(f"{self.reasoner.name}: the next answer may cost up to ${most:.6f}")
                    break
                self.budget.reserved += most
                key, prompt = waiting.popleft()
                sent[asyncio.create_task(self._one(client, prompt))] = key, prompt
            if not sent:
                break
            done, _ = await asyncio.wait(sent, return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in sent if task in done]:
                key, prompt = sent.pop(task)
                self.budget.reserved = self.budget.reserved - self.most(prompt) if sent else 0.0
                try:
                    answer = task.result()
                    on_answer(key, answer)
                    failed = self._settle(prompt, answer, failed)
                except ValueError as error:
                    stop = stop or error
        if stop is not None:
            raise stop

    def _settle(self, prompt: str, answer: ChatAnswer | str, failed: int) -> int:
        """Pay for an answer; returns the failures in a row. Raises ValueError for too many."""
        if isinstance(answer, ChatAnswer):
            self.budget.spent += self.cost(answer.tokens, prompt)
            return 0
        if failed + 1 >= FAILURES_IN_A_ROW:
            name = self.reasoner.name
            raise ValueError(f"{name}: {failed + 1} requests failed one after the other, the last: {answer}")
        return failed + 1

    async def _one(self, client: Any, prompt: str) -> ChatAnswer | str:
        """An answer, or the reason for a failure. Raises ValueError if every prompt would fail."""
        (openai, _), name = _packages(), self.reasoner.name
        settings = self._settings()
        message = {"role": "user", "content": prompt}
        try:
            reply = await client.chat.completions.create(model=self.reasoner.source, messages=[message], **settings)
            return _chat_answer(reply)
        except openai.BadRequestError as error:
            if refused := [word for word in INSTEAD if word in settings and word in str(error.body)]:
                self._refused.update(refused)
                return await self._one(client, prompt)
            return self._line(error)
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            problem = f"{name}: {self._line(error)}"
            raise ValueError(f"{problem}; check model, URL and ${self.calling.key_variable}") from None
        except (openai.OpenAIError, ValueError, TypeError, AttributeError, LookupError) as error:
            return self._line(error)

    def most(self, prompt: str) -> float:
        """The most dollars that a prompt can cost: a token has at least one byte."""
        return self._dollars(len(prompt.encode()) + TEMPLATE_TOKENS, self.max_tokens)

    def cost(self, tokens: Sequence[int] | None, prompt: str) -> float:
        """Dollars of an answer by its tokens read and written; the most it can cost if they are unknown."""
        return self.most(prompt) if tokens is None else self._dollars(*tokens)

    def _dollars(self, read: int, written: int) -> float:
        per_read, per_written = self.calling.prices or (0.0, 0.0)
        return (read * per_read + written * per_written) / 1e6

    def _settings(self) -> dict[str, Any]:
        wanted = {"temperature": 0.0, "max_completion_tokens": self.max_tokens}
        named = {INSTEAD[name] if name in self._refused else name: value for name, value in wanted.items()}
        return {name: value for name, value in named.items() if name}

    def _key(self) -> str:
        """The key; a private server may need none."""
        variable = self.calling.key_variable
        if key := os.environ.get(variable):
            return key
        if not self.reasoner.url:
            raise ValueError(f"{self.reasoner.name}: ${variable} is not set; set it, or name another by --key")
        return "none"

    def _line(self, error: Exception) -> str:
        """The error on one line, without the key."""
        text = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_ERROR]
        return text.replace(self._key(), "***") if os.environ.get(self.calling.key_variable) else text


def _chat_answer(reply: Any) -> ChatAnswer:
    """An answer and its tokens. Raises ValueError, AttributeError or the like if it is no reply."""
    if isinstance(reply, str) or not reply.choices:
        raise ValueError("the reply is no chat completion")
    usage = reply.usage
    tokens = (int(usage.prompt_tokens), int(usage.completion_tokens)) if usage else None
    return ChatAnswer(reply.choices[0].message.content or "", tokens)


def _packages() -> tuple[Any, Any]:
    """`openai`, and the limiter of `aiolimiter`."""
    try:
        import openai
        from aiolimiter import AsyncLimiter
    except ImportError:
        raise ValueError("reasoners behind an endpoint need two packages: pip install 'appo[study]'") from None
    return openai, AsyncLimiter
