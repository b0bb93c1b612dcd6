"""Model x questions -> answers -> accuracy: greedy, batched, scored by the function that also rewards training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from appo.prompts import INSTRUCTION, build_messages, parse_response
from appo.rewards import score_answer
from appo.rollout import VideoCache, encode_prompt, generate, video_sources
from appo.types import VideoQA
from appo.video import FrameSampling


@dataclass(frozen=True)
class Prediction:
    """One answered question. ``right`` is 1.0 or 0.0; ``parsed``: whether the response has the asked-for format."""

    id: str
    text: str
    right: float
    parsed: bool


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers with its 95 % Wilson interval, and the share of responses that could be parsed."""

    mean: float
    low: float
    high: float
    parsed: float
    questions: int


def predict(
    model: Any,
    processor: Any,
    questions: Sequence[VideoQA],
    sampling: FrameSampling,
    *,
    max_new_tokens: int,
    batch_size: int = 50,
    instruction: str = INSTRUCTION,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Prediction]:
    """Answer questions greedily.

    Args:
        model: a Hugging Face video language model; its train/eval mode is left as it was.
        processor: its processor.
        questions: what to ask; each video is decoded once per batch.
        sampling: how frames are sampled.
        max_new_tokens: longest response.
        batch_size: questions answered at once.
        instruction: appended to every question (see :func:`appo.prompts.build_messages`).
        on_progress: called with the number of questions answered after each batch.

    Raises:
        appo.video.VideoError: a clip cannot be decoded.
    """
    was_training = model.training
    model.eval()
    predictions: list[Prediction] = []
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        videos = VideoCache(processor.video_processor, sampling)
        prompts = []
        for question in batch:
            messages = build_messages(question, instruction=instruction)
            prompts.append(encode_prompt(processor, messages, [videos.read(s) for s in video_sources(messages)]))
        groups = generate(model, processor, prompts, max_new_tokens=max_new_tokens, temperature=0.0)
        texts = processor.batch_decode([group[0] for group in groups], skip_special_tokens=True)
        for question, text in zip(batch, texts, strict=True):
            right = score_answer(text, question.answer, question.kind, question.options)
            predictions.append(Prediction(question.id, text, right, parse_response(text) is not None))
        on_progress(len(predictions))
    model.train(was_training)
    return predictions


def accuracy(predictions: Sequence[Prediction]) -> Accuracy:
    """Mean and Wilson interval of the predictions' rightness. Raises ValueError when there are none."""
    if not predictions:
        raise ValueError("there are no predictions to average: give at least one question")
    n = len(predictions)
    mean = sum(prediction.right for prediction in predictions) / n
    low, high = wilson_interval(mean, n)
    return Accuracy(mean, low, high, sum(prediction.parsed for prediction in predictions) / n, n)


def wilson_interval(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % confidence interval of a share of ``n`` independent trials (Wilson 1927)."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
