"""Reasoners behind an OpenAI-compatible endpoint: many requests at a time, never too many, within a budget.

The `openai` package retries what may pass (429 and its Retry-After, 5xx, timeouts); `aiolimiter` gives every request
its turn, retries included. What fails after that is reported by question and can be asked again; what would fail for
every question (a wrong key, model or address) stops at once.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from appo.experiments.study.members import Reasoner
from appo.experiments.study.text_models import ChatAnswer

FAILURES_IN_A_ROW = 10
# What some servers refuse, and what they are told instead; None: nothing.
INSTEAD = {"temperature": None, "max_completion_tokens": "max_tokens"}
TEMPLATE_TOKENS = 256  # what a chat template may put around a prompt
_LONGEST_ERROR = 300


@dataclass(frozen=True)
class Calling:
    """How endpoints are asked."""

    key_variable: str = "OPENAI_API_KEY"  # environment variable that holds the key
    requests_per_minute: float | None = None  # of one endpoint, retries included; None: as fast as it answers
    at_once: int = 8  # requests on the way at the same time
    retries: int = 5  # of one request
    timeout: float = 120.0  # seconds without an answer after which a request is tried again
    max_tokens: int = 1024  # longest answer
    prices: tuple[float, float] | None = None  # dollars a million tokens read and written; None: not known


@dataclass
class Budget:
    """Dollars that may be spent in all; what is on its way is reserved at the most that it can cost."""

    limit: float = float("inf")
    spent: float = 0.0
    reserved: float = 0.0

    def covers(self, most: float) -> bool:
        """Whether a request that costs so much at most may be sent."""
        return self.spent + self.reserved + most <= self.limit


class BudgetError(ValueError):
    """The next request could cost more than is left."""


OnAnswer = Callable[[str, "ChatAnswer | str"], None]


class Endpoint:
    """One model behind one address; remembers over calls what its server refuses, and how many requests were sent."""

    def __init__(self, reasoner: Reasoner, calling: Calling, budget: Budget) -> None:
        self.reasoner, self.calling, self.budget = reasoner, calling, budget
        self.requests = 0
        self._refused: set[str] = set()

    def check(self) -> None:
        """Raise ValueError for what can be known to be missing before anything is asked: the package, the key."""
        _packages()
        self._key()

    def ask(self, prompts: Sequence[tuple[str, str]], on_answer: OnAnswer) -> None:
        """Ask all prompts; every answer is reported, however it ends.

        Args:
            prompts: (key, prompt), each key once.
            on_answer: called with key and answer as they come, or with key and why there is none, one line.

        Raises:
            BudgetError: the budget covers no further request; those on their way were waited for and reported.
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
        """Send while there is room and money; raise what stopped it once nothing is on its way any more."""
        waiting, sent = deque(prompts), dict[asyncio.Task[ChatAnswer | str], tuple[str, str]]()
        stop: ValueError | None = None
        failed = 0
        while True:
            while waiting and stop is None and len(sent) < self.calling.at_once:
                most = self.most(waiting[0][1])
                if not self.budget.covers(most):
                    if not sent:  # nothing that is reserved can come back
                        stop = BudgetError(f"{self.reasoner.name}: the next answer may cost up to ${most:.6f}")
                    break
                self.budget.reserved += most
                key, prompt = waiting.popleft()
                sent[asyncio.create_task(self.one(client, prompt))] = key, prompt
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
        """Pay for an answer; how many requests have failed one after the other. Raises ValueError for too many."""
        if isinstance(answer, ChatAnswer):
            self.budget.spent += self.cost(answer.tokens, prompt)
            return 0
        if failed + 1 >= FAILURES_IN_A_ROW:
            name = self.reasoner.name
            raise ValueError(f"{name}: {failed + 1} requests failed one after the other, the last: {answer}")
        return failed + 1

    async def one(self, client: Any, prompt: str) -> ChatAnswer | str:
        """An answer, or why there is none. Raises ValueError where every other prompt would fail as well."""
        (openai, _), name = _packages(), self.reasoner.name
        settings = self._settings()
        message = {"role": "user", "content": prompt}
        try:
            reply = await client.chat.completions.create(model=self.reasoner.source, messages=[message], **settings)
            return _chat_answer(reply)
        except openai.BadRequestError as error:
            if refused := [word for word in INSTEAD if word in settings and word in str(error.body)]:
                self._refused.update(refused)
                return await self.one(client, prompt)
            return self._line(error)
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            problem = f"{name}: {self._line(error)}"
            raise ValueError(f"{problem}; check model, URL and ${self.calling.key_variable}") from None
        except (openai.OpenAIError, ValueError, TypeError, AttributeError, LookupError) as error:
            return self._line(error)

    def most(self, prompt: str) -> float:
        """Dollars that a prompt can cost at most: a token has at least one byte."""
        return self._dollars(len(prompt.encode()) + TEMPLATE_TOKENS, self.calling.max_tokens)

    def cost(self, tokens: Sequence[int] | None, prompt: str) -> float:
        """Dollars that an answer cost, by its tokens read and written; the most it can, where they are not known."""
        return self.most(prompt) if tokens is None else self._dollars(*tokens)

    def _dollars(self, read: int, written: int) -> float:
        per_read, per_written = self.calling.prices or (0.0, 0.0)
        return (read * per_read + written * per_written) / 1e6

    def _settings(self) -> dict[str, Any]:
        wanted = {"temperature": 0.0, "max_completion_tokens": self.calling.max_tokens}
        named = {INSTEAD[name] if name in self._refused else name: value for name, value in wanted.items()}
        return {name: value for name, value in named.items() if name}

    def _key(self) -> str:
        """The key; a server of one's own may need none."""
        variable = self.calling.key_variable
        if key := os.environ.get(variable):
            return key
        if not self.reasoner.url:
            raise ValueError(f"{self.reasoner.name}: ${variable} is not set; set it, or name another by --key")
        return "none"

    def _line(self, error: Exception) -> str:
        """What went wrong, on one line, without the key."""
        text = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_ERROR]
        return text.replace(self._key(), "***") if os.environ.get(self.calling.key_variable) else text


def _chat_answer(reply: Any) -> ChatAnswer:
    """An answer and its tokens. Raises ValueError, AttributeError or the like for what is no reply."""
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
