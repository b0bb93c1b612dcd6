"""Reasoners behind an endpoint, against a server that fails in all the ways servers do."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from typing import Any

import pytest

from appo.experiments.study.reasoners import FAILURES_IN_A_ROW, Budget, BudgetError, ChatAnswer, Endpoint
from appo.experiments.study.settings import Calling, Reasoner
from tests.experiments.chat_server import Behaviour, Reply, chat_server, completion, failure

pytest.importorskip("openai")

KEY = "sk-never-to-be-written-down"
QUICK = Calling(retries=2, timeout=10)


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def echo(prompt: str, before: int, request: dict[str, Any]) -> Reply:
    return completion(f"to {prompt}")


def endpoint_at(url: str, calling: Calling = QUICK, budget: Budget | None = None) -> Endpoint:
    return Endpoint(Reasoner("mine", "my-model", url=url), calling, budget or Budget(), max_tokens=32)


def ask(behave: Behaviour, prompts: list[str], calling: Calling = QUICK) -> tuple[dict[str, ChatAnswer | str], Any]:
    """What was reported about each prompt (which is its own key), and what the server received."""
    reported: dict[str, ChatAnswer | str] = {}
    with chat_server(behave) as seen:
        endpoint = endpoint_at(seen.url, calling)
        endpoint.ask([(prompt, prompt) for prompt in prompts], reported.__setitem__)
        assert endpoint.requests == len(seen.times)
    return reported, seen


def test_every_prompt_is_answered_once_with_model_key_and_limits() -> None:
    prompts = [f"prompt {n}" for n in range(20)]
    reported, seen = ask(echo, prompts)
    assert reported == {prompt: ChatAnswer(f"to {prompt}", (10, 2)) for prompt in prompts}
    assert set(seen.prompts.values()) == {1}
    assert seen.keys == {f"Bearer {KEY}"}
    assert seen.requests[0] == {
        "model": "my-model",
        "messages": [{"role": "user", "content": seen.requests[0]["messages"][0]["content"]}],
        "temperature": 0.0,
        "max_completion_tokens": 32,
    }


def test_a_server_that_requests_a_pause_gets_it() -> None:
    def behave(prompt: str, before: int, request: dict[str, Any]) -> Reply:
        return completion("late") if before else failure(429, "slow down", retry_after="1.5")

    reported, seen = ask(behave, ["a"])
    assert reported == {"a": ChatAnswer("late", (10, 2))}
    assert len(seen.times) == 2
    assert seen.times[1] - seen.times[0] >= 1.5


def test_what_may_pass_is_retried_and_what_does_not_is_reported() -> None:
    def behave(prompt: str, before: int, request: dict[str, Any]) -> Reply:
        return completion("up again") if prompt == "a" and before == 2 else failure(500, "down")

    reported, seen = ask(behave, ["a", "b"])
    assert reported["a"] == ChatAnswer("up again", (10, 2))
    assert reported["b"].startswith("InternalServerError")
    assert "down" in reported["b"]
    assert seen.prompts == {"a": 3, "b": 3}


@pytest.mark.parametrize(
    "reply",
    [
        Reply(body=b'{"choices": [{"mess'),
        Reply(body=b"{}"),
        Reply(body=b'{"choices": []}'),
        Reply(body=b'{"choices": [{"index": 0}]}'),
        Reply(body=b"[1]"),
        Reply(body=b"<html>busy</html>", headers={"content-type": "text/html"}),
        Reply(body=b""),
    ],
)
def test_nonsense_is_a_failure_of_its_question_and_stops_nothing(reply: Reply) -> None:
    reported, _ = ask(lambda prompt, *_: reply if prompt == "bad" else completion("fine"), ["a", "bad", "c"])
    assert reported["a"] == reported["c"] == ChatAnswer("fine", (10, 2))
    assert isinstance(reported["bad"], str)
    assert "\n" not in reported["bad"]
    assert len(reported["bad"]) > 5


def test_a_silent_server_is_given_up_after_its_retries() -> None:
    calling = replace(QUICK, timeout=0.3, retries=1)
    start = time.monotonic()
    reported, seen = ask(lambda prompt, *_: Reply(after=1.5) if prompt == "a" else completion("b"), ["a", "b"], calling)
    assert reported["a"].startswith("APITimeoutError")
    assert reported["b"] == ChatAnswer("b", (10, 2))
    assert seen.prompts["a"] == 2
    assert time.monotonic() - start < 5


def test_an_answer_without_words_or_count_is_an_answer() -> None:
    reported, _ = ask(lambda *_: completion(None, tokens=None), ["a"])
    assert reported == {"a": ChatAnswer("", None)}


@pytest.mark.parametrize(
    ("refused", "left"),
    [
        ("temperature", {"max_completion_tokens": 32}),
        ("max_completion_tokens", {"temperature": 0.0, "max_tokens": 32}),
    ],
)
def test_a_setting_that_a_server_refuses_is_left_out_from_then_on(refused: str, left: dict[str, Any]) -> None:
    def behave(prompt: str, before: int, request: dict[str, Any]) -> Reply:
        return failure(400, f"Unsupported value: '{refused}'") if refused in request else completion("fine")

    reported, seen = ask(behave, ["a", "b", "c"], replace(QUICK, at_once=1))
    assert set(reported.values()) == {ChatAnswer("fine", (10, 2))}
    assert len(seen.requests) == 4
    settings = [{n: v for n, v in request.items() if n not in ("model", "messages")} for request in seen.requests]
    assert settings[1:] == [left] * 3


def test_a_refusal_of_one_prompt_is_its_own_failure() -> None:
    reported, seen = ask(lambda p, *_: failure(400, "content policy") if p == "b" else completion("a"), ["a", "b"])
    assert reported["a"] == ChatAnswer("a", (10, 2))
    assert "content policy" in reported["b"]
    assert seen.prompts["b"] == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_would_fail_every_prompt_stops_at_once_and_never_prints_the_key(status: int) -> None:
    def behave(prompt: str, before: int, request: dict[str, Any]) -> Reply:
        return failure(status, f"no access with {KEY}")

    with pytest.raises(ValueError, match=r"mine: .* check model, URL and \$OPENAI_API_KEY") as caught:
        ask(behave, [f"{n}" for n in range(50)], replace(QUICK, at_once=2))
    assert KEY not in str(caught.value)
    assert "***" in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_a_server_that_is_down_for_good_gets_few_requests() -> None:
    reported: dict[str, Any] = {}
    with chat_server(lambda *_: failure(500, f"down, {KEY}")) as seen:
        endpoint = endpoint_at(seen.url, replace(QUICK, retries=0, at_once=2))
        with pytest.raises(ValueError, match=f"{FAILURES_IN_A_ROW} requests failed one after the other"):
            endpoint.ask([(str(n), str(n)) for n in range(1000)], reported.__setitem__)
    assert FAILURES_IN_A_ROW <= len(reported) == len(seen.times) <= FAILURES_IN_A_ROW + 1
    assert all(KEY not in line for line in reported.values())


def test_no_more_requests_a_minute_than_allowed_retries_included() -> None:
    def behave(prompt: str, before: int, request: dict[str, Any]) -> Reply:
        return completion("a") if before else failure(429, "wait", retry_after="0.01")

    _, seen = ask(behave, [str(n) for n in range(6)], replace(QUICK, requests_per_minute=600))
    times = sorted(seen.times)
    assert len(times) == 12
    assert times[-1] - times[0] >= 11 * 0.1 - 0.05
    assert min(b - a for a, b in itertools.pairwise(times)) > 0.05


def test_no_more_requests_at_once_than_allowed() -> None:
    prompts = [str(n) for n in range(12)]
    _, seen = ask(lambda *_: replace(completion("a"), after=0.1), prompts, replace(QUICK, at_once=3))
    assert seen.busiest == 3


def test_a_budget_is_never_exceeded_and_more_of_it_goes_on() -> None:
    """An answer costs 14 millionths (ten tokens in at $1, two out at $2) and at most 330 (266 bytes in, 32 out)."""
    calling, reported = replace(QUICK, prices=(1.0, 2.0), at_once=4), {}
    prompts = [(f"prompt {n:03d}", f"prompt {n:03d}") for n in range(60)]
    with chat_server(echo) as seen:
        budget = Budget(limit=800e-6)
        endpoint = endpoint_at(seen.url, calling, budget)
        assert endpoint.most("prompt 001") == pytest.approx((10 + 256 + 64) * 1e-6)
        with pytest.raises(BudgetError, match=r"mine: the next answer may cost up to \$0.000330"):
            endpoint.ask(prompts, reported.__setitem__)
        assert budget.spent == pytest.approx(14e-6 * len(reported))
        assert budget.reserved == 0
        assert 800e-6 - 330e-6 - 14e-6 < budget.spent <= 800e-6, "as near to the budget as may be, and not beyond"
        assert len(seen.times) == len(reported) == 34
        budget.limit = 1.0
        endpoint.ask([pair for pair in prompts if pair[0] not in reported], reported.__setitem__)
        assert len(reported) == 60
        assert set(seen.prompts.values()) == {1}
    assert budget.spent == pytest.approx(60 * 14e-6)


def test_an_answer_of_unknown_length_costs_the_most_it_can() -> None:
    endpoint = endpoint_at("http://nowhere", replace(QUICK, prices=(1.0, 2.0)))
    assert endpoint.cost(None, "four") == endpoint.most("four") == pytest.approx((4 + 256 + 64) * 1e-6)
    assert endpoint.cost((10, 2), "four") == pytest.approx(14e-6)


def test_a_server_of_ones_own_needs_no_key_and_the_public_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    _, seen = ask(echo, ["a"])
    assert seen.keys == {"Bearer none"}
    with pytest.raises(ValueError, match=r"\$OPENAI_API_KEY is not set"):
        endpoint_at("").ask([("a", "a")], print)


def test_the_key_comes_from_the_variable_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER_KEY", "sk-other")
    _, seen = ask(echo, ["a"], replace(QUICK, key_variable="OTHER_KEY"))
    assert seen.keys == {"Bearer sk-other"}
