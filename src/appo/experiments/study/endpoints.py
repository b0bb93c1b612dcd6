"""Reasoners behind an OpenAI-compatible endpoint: many requests at a time, never too many, within a budget.

The `openai` package retries what may pass (429 and its Retry-After, 5xx, timeouts); every request it sends, retries
included, waits for its turn here. What fails after that is reported by question and can be asked again; what would
fail for every question (a wrong key, model or address) stops at once.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from appo.experiments.study.members import Reasoner
from appo.experiments.study.text_models import Said

FAILURES_IN_A_ROW = 10
# What some servers refuse, and what they are told instead; None: nothing.
INSTEAD = {"temperature": None, "max_completion_tokens": "max_tokens"}
TEMPLATE_TOKENS = 256  # what a chat template may put around a prompt
_LONGEST_ERROR = 300


@dataclass(frozen=True)
class Calling:
    """How endpoints are asked.

    Attributes:
        key_variable: environment variable that holds the key.
        requests_per_minute: of one endpoint, retries included; None: as fast as it answers.
        at_once: requests on the way at the same time.
        retries: of one request.
        timeout: seconds without an answer after which a request is tried again.
        max_tokens: longest answer.
        prices: dollars a million tokens read and written; None: not known.
    """

    key_variable: str = "OPENAI_API_KEY"
    requests_per_minute: float | None = None
    at_once: int = 8
    retries: int = 5
    timeout: float = 120.0
    max_tokens: int = 1024
    prices: tuple[float, float] | None = None


@dataclass
class Purse:
    """Dollars that may be spent in all; what is on its way is set aside at the most that it can cost."""

    budget: float = float("inf")
    spent: float = 0.0
    aside: float = 0.0

    def covers(self, most: float) -> bool:
        """Whether a request that costs so much at most may be sent."""
        return self.spent + self.aside + most <= self.budget


class BudgetError(ValueError):
    """The next request could cost more than is left."""


Tell = Callable[[str, "Said | str"], None]


@dataclass
class Pace:
    """Requests evenly spaced in time: the next one may go when it is its turn."""

    per_minute: float | None
    count: int = 0
    _next: float = 0.0

    async def turn(self, *_: Any) -> None:
        """Wait for it."""
        self.count += 1
        if self.per_minute is None:
            return
        now = asyncio.get_running_loop().time()
        start = max(now, self._next)
        self._next = start + 60 / self.per_minute
        await asyncio.sleep(start - now)


class Endpoint:
    """One model behind one address; remembers over calls what its server refuses, and how many requests were sent."""

    def __init__(self, reasoner: Reasoner, calling: Calling, purse: Purse) -> None:
        self.reasoner, self.calling, self.purse = reasoner, calling, purse
        self.requests = 0
        self._refused: set[str] = set()

    def check(self) -> None:
        """Raise ValueError for what can be known to be missing before anything is asked: the package, the key."""
        _openai()
        self._key()

    def ask(self, prompts: Sequence[tuple[str, str]], tell: Tell) -> None:
        """Ask all prompts; what was told is kept however it ends.

        Args:
            prompts: (key, prompt), each key once.
            tell: called with key and answer as they come, or with key and why there is none, one line.

        Raises:
            BudgetError: the purse covers no further request; those on their way were waited for and told.
            ValueError: key, model or address are wrong, or `FAILURES_IN_A_ROW` requests failed one after the other.
        """
        if prompts:
            asyncio.run(self._ask(prompts, tell))

    async def _ask(self, prompts: Sequence[tuple[str, str]], tell: Tell) -> None:
        openai, pace = _openai(), Pace(self.calling.requests_per_minute)
        client = openai.AsyncOpenAI(
            api_key=self._key(),
            base_url=self.reasoner.url or None,
            max_retries=self.calling.retries,
            timeout=self.calling.timeout,
            http_client=openai.DefaultAsyncHttpxClient(event_hooks={"request": [pace.turn]}),
        )
        try:
            async with client:
                await _Round(self, client, prompts, tell).run()
        finally:
            self.requests += pace.count

    async def one(self, client: Any, prompt: str) -> Said | str:
        """An answer, or why there is none. Raises ValueError where every other prompt would fail as well."""
        openai, name = _openai(), self.reasoner.name
        settings = self._settings()
        message = {"role": "user", "content": prompt}
        try:
            reply = await client.chat.completions.create(model=self.reasoner.source, messages=[message], **settings)
            return _said(reply)
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


class _Round:
    """Workers take prompts until none is left or one of them finds a reason to stop."""

    def __init__(self, endpoint: Endpoint, client: Any, prompts: Sequence[tuple[str, str]], tell: Tell) -> None:
        self._endpoint, self._client, self._tell = endpoint, client, tell
        self._waiting = list(reversed(prompts))
        self._changed = asyncio.Condition()
        self._stop: ValueError | None = None
        self._on_their_way = self._failed = 0

    async def run(self) -> None:
        """Ask all. Raises what stopped the workers, after all have come home."""
        workers = min(self._endpoint.calling.at_once, len(self._waiting))
        await asyncio.gather(*(self._work() for _ in range(workers)))
        if self._stop is not None:
            raise self._stop

    async def _work(self) -> None:
        while self._waiting and self._stop is None:
            key, prompt = self._waiting.pop()
            most = self._endpoint.most(prompt)
            if not await self._may_send(most):
                return
            try:
                answer = await self._endpoint.one(self._client, prompt)
                self._take(key, prompt, answer)
            except ValueError as error:
                self._stop = self._stop or error
            finally:
                await self._come_home(most)

    async def _may_send(self, most: float) -> bool:
        """Whether a prompt may go, and if so what it can cost set aside; waits while money may still come back."""
        purse = self._endpoint.purse
        async with self._changed:
            await self._changed.wait_for(lambda: self._stop or purse.covers(most) or not self._on_their_way)
            if self._stop is None and not purse.covers(most):
                self._stop = BudgetError(f"{self._endpoint.reasoner.name}: the next answer may cost up to ${most:.6f}")
            if self._stop is not None:
                self._changed.notify_all()
                return False
            purse.aside += most
            self._on_their_way += 1
            return True

    def _take(self, key: str, prompt: str, answer: Said | str) -> None:
        self._tell(key, answer)
        if isinstance(answer, Said):
            self._endpoint.purse.spent += self._endpoint.cost(answer.tokens, prompt)
            self._failed = 0
            return
        self._failed += 1
        if self._failed >= FAILURES_IN_A_ROW:
            name = self._endpoint.reasoner.name
            raise ValueError(f"{name}: {self._failed} requests failed one after the other, the last: {answer}")

    async def _come_home(self, most: float) -> None:
        async with self._changed:
            self._on_their_way -= 1
            self._endpoint.purse.aside = self._endpoint.purse.aside - most if self._on_their_way else 0.0
            self._changed.notify_all()


def _said(reply: Any) -> Said:
    """An answer and its tokens. Raises ValueError, AttributeError or the like for what is no reply."""
    if isinstance(reply, str) or not reply.choices:
        raise ValueError("the reply is no chat completion")
    usage = reply.usage
    tokens = (int(usage.prompt_tokens), int(usage.completion_tokens)) if usage else None
    return Said(reply.choices[0].message.content or "", tokens)


def _openai() -> Any:
    try:
        import openai
    except ImportError:
        raise ValueError("reasoners behind an endpoint need a package: pip install 'appo[study]'") from None
    return openai
