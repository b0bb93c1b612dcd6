"""A policy's scores on clips: real mp4 files, the real processor, `model.generate`, the rewards' scoring."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Any

from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from appo.rewards.functions import score_answer
from appo.rewards.templates import parse_response
from appo.rollout.generation import generate
from appo.types import VideoQA
from appo.world.policy import MAX_NEW_TOKENS, prompt_of

_COMMITMENT = re.compile(r" at (\d+)")


def respond(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: Qwen2_5_VLProcessor,
    questions: Sequence[VideoQA],
    *,
    samples: int = 1,
    greedy: bool = False,
    batch: int = 16,
) -> list[list[str]]:
    """`samples` responses to each question, as text without special tokens."""
    groups: list[list[str]] = []
    for start in range(0, len(questions), batch):
        prompts = [prompt_of(processor, question) for question in questions[start : start + batch]]
        temperature = 0.0 if greedy else 1.0
        sampled = generate(
            model, processor, prompts, max_new_tokens=MAX_NEW_TOKENS, responses=samples, temperature=temperature
        )
        groups += [processor.batch_decode(group, skip_special_tokens=True) for group in sampled]
    return groups


def summarize(questions: Sequence[VideoQA], groups: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Accuracy, share of right formats, tokens, and accuracy by task.

    With several responses also `mixed`, the share of groups with both right and wrong ones, and `committed_apart`, the
    share of mixed groups whose winners' most frequent committed second differs from the losers'.
    """
    rewards = [
        [score_answer(text, question.answer, "word") for text in group]
        for question, group in zip(questions, groups, strict=True)
    ]
    formats = [parse_response(text) is not None for group in groups for text in group]
    mixed = [0 < sum(row) < len(row) for row in rewards]
    groups_and_rewards = zip(groups, rewards, strict=True)
    apart = [_committed_apart(group, row) for group, row in groups_and_rewards if 0 < sum(row) < len(row)]
    summary: dict[str, Any] = {
        "accuracy": _mean([reward for row in rewards for reward in row]),
        "format": _mean(formats),
        "tokens": _mean([len(text.split()) + 1 for group in groups for text in group]),
    }
    for task in sorted({question.metadata["task"] for question in questions}):
        rows = [row for question, row in zip(questions, rewards, strict=True) if question.metadata["task"] == task]
        summary[task] = _mean([reward for row in rows for reward in row])
    if any(len(row) > 1 for row in rewards):
        summary |= {"mixed": _mean(mixed), "committed_apart": _mean(apart)}
    return summary


def measure(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: Qwen2_5_VLProcessor,
    questions: Sequence[VideoQA],
    *,
    samples: int = 8,
) -> dict[str, Any]:
    """Greedy and sampled summaries (see `summarize`), with the seconds that each took."""
    result: dict[str, Any] = {"questions": len(questions), "samples": samples}
    for name, greedy, count in (("greedy", True, 1), ("sampled", False, samples)):
        start = time.perf_counter()
        groups = respond(model, processor, questions, samples=count, greedy=greedy)
        result[name] = summarize(questions, groups) | {"seconds": round(time.perf_counter() - start, 1)}
    return result


def _committed_apart(group: Sequence[str], rewards: Sequence[float]) -> bool:
    seconds = [match[1] if (match := _COMMITMENT.search(text)) else "" for text in group]
    winners = [second for second, reward in zip(seconds, rewards, strict=True) if reward]
    losers = [second for second, reward in zip(seconds, rewards, strict=True) if not reward]
    return max(set(winners), key=winners.count) != max(set(losers), key=losers.count)


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / max(1, len(values)), 4)
