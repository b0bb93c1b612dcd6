"""Model x questions -> replies -> accuracy, in batches; the next batch is decoded while the model generates."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from appo.evaluation.predictions import Reply, batches
from appo.evaluation.statistics import wilson_interval
from appo.models.prompt import Prompt
from appo.rewards.functions import score_answer
from appo.rewards.templates import INSTRUCTION, build_messages, parse_response
from appo.rollout.generation import (
    PromptError,
    VideoCache,
    encode_messages,
    evaluation_mode,
    generate,
)
from appo.types import VideoQA
from appo.video.frame_cache import FrameCache
from appo.video.reader import FrameSampling, VideoError

Batch = list[VideoQA]
Prompts = list[Prompt | str]  # a text: why a question's video or image cannot be read


@dataclass(frozen=True)
class InferenceSettings:
    """How frames and responses are sampled."""

    sampling: FrameSampling
    max_new_tokens: int  # longest response
    instruction: str = INSTRUCTION  # appended to every question (see :func:`appo.rewards.templates.build_messages`)
    samples: int = 1  # K, responses per question
    temperature: float = 0.0  # 0: greedy; else sampled from softmax(logits / temperature), nothing cut off
    seed: int = 0  # of the sampling; each batch has its own random numbers, independent of the batches before


@dataclass(frozen=True)
class AnsweredBatch:
    """The replies to one batch of questions, in order, and the seconds from the end of the batch before it."""

    index: int
    replies: list[Reply]
    seconds: float


def answer(
    model: Any,
    processor: Any,
    questions: Iterable[tuple[int, list[VideoQA]]],
    settings: InferenceSettings,
    cache: FrameCache | None = None,
) -> Iterator[AnsweredBatch]:
    """Answer batches of questions. While the model generates, a thread decodes and encodes the next batch.

    A question whose video or image cannot be read gets a `Reply` with the error; nothing else is caught. The model is
    in evaluation mode until the iterator ends, and then as it was before. `questions`: as `batches` makes them.

    Raises:
        OSError: the cache cannot be read or written.
        ValueError: the accelerator's memory does not hold a batch.
    """
    pool = ThreadPoolExecutor(1, "encode")
    try:
        with evaluation_mode(model):
            start = time.perf_counter()
            encode = partial(_encode, processor, settings, cache)
            for index, batch, prompts in _encoded_ahead(pool, encode, questions):
                replies = _reply(model, processor, index, batch, prompts, settings)
                yield AnsweredBatch(index, replies, time.perf_counter() - start)
                start = time.perf_counter()
    finally:
        pool.shutdown(cancel_futures=True)


def _encoded_ahead(
    pool: ThreadPoolExecutor, encode: Callable[[Batch], Prompts], batches: Iterable[tuple[int, Batch]]
) -> Iterator[tuple[int, Batch, Prompts]]:
    """The batches in order with their prompts, each encoded while the one before is in use."""
    waiting = None
    for index, batch in batches:
        ahead = index, batch, pool.submit(encode, batch)
        if waiting is not None:
            yield *waiting[:2], waiting[2].result()
        waiting = ahead
    if waiting is not None:
        yield *waiting[:2], waiting[2].result()


def _encode(processor: Any, settings: InferenceSettings, cache: FrameCache | None, questions: Batch) -> Prompts:
    videos = VideoCache(processor.video_processor, settings.sampling, cache)
    return [_prompt(processor, videos, question, settings.instruction) for question in questions]


def _prompt(processor: Any, videos: VideoCache, question: VideoQA, instruction: str) -> Prompt | str:
    """A question as a prompt, or why its video, image or text cannot be used."""
    messages = build_messages(question, instruction=instruction)
    try:
        return encode_messages(processor, messages, videos)
    except (VideoError, PromptError) as error:
        return " ".join(str(error).split())


def _reply(
    model: Any, processor: Any, index: int, questions: Batch, prompts: Prompts, settings: InferenceSettings
) -> list[Reply]:
    good = [prompt for prompt in prompts if not isinstance(prompt, str)]
    groups = iter(_generate(model, processor, good, index, settings) if good else ())
    replies = []
    for question, prompt in zip(questions, prompts, strict=True):
        if isinstance(prompt, str):
            replies.append(Reply(question.id, error=prompt))
            continue
        group = next(groups)
        texts = processor.batch_decode(group, skip_special_tokens=True)
        replies.append(Reply(question.id, tuple(texts), tuple(len(ids) for ids in group)))
    return replies


def _generate(
    model: Any, processor: Any, prompts: Sequence[Prompt], index: int, settings: InferenceSettings
) -> list[list[torch.Tensor]]:
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(_seed(settings.seed, index))
        try:
            return generate(
                model,
                processor,
                prompts,
                max_new_tokens=settings.max_new_tokens,
                responses=settings.samples,
                temperature=settings.temperature,
            )
        except torch.OutOfMemoryError as error:
            count = f"{len(prompts)} questions with {settings.samples} responses each"
            raise ValueError(f"{count} do not fit into the memory of {device}: set a smaller batch size") from error


def _seed(seed: int, batch: int) -> int:
    """One seed per batch, so that a resumed evaluation samples the same responses."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{batch}".encode()).digest()[:7], "big")


@dataclass(frozen=True)
class Prediction:
    """One answered question. ``right`` is 1.0 or 0.0; ``parsed``: whether the response has the requested format."""

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
    """Answer questions greedily and score the answers.

    `on_progress` is called after each batch with the number of answered questions. A batch decodes each video once.

    Raises:
        ValueError: a video or image cannot be read; one line that names it.
    """
    settings = InferenceSettings(sampling, max_new_tokens, instruction)
    predictions: list[Prediction] = []
    for answered in answer(model, processor, batches(questions, batch_size), settings):
        for reply in answered.replies:
            if reply.error:
                raise ValueError(reply.error)
            predictions.append(prediction_of(questions[len(predictions)], reply.texts[0]))
        on_progress(len(predictions))
    return predictions


def prediction_of(question: VideoQA, text: str) -> Prediction:
    """A response to a question, scored."""
    right = score_answer(text, question.answer, question.kind, question.options)
    return Prediction(question.id, text, right, parse_response(text) is not None)


def accuracy(predictions: Sequence[Prediction]) -> Accuracy:
    """Mean and Wilson interval of the predictions' rightness. Raises ValueError when there are none."""
    if not predictions:
        raise ValueError("there are no predictions to average: give at least one question")
    n = len(predictions)
    mean = sum(prediction.right for prediction in predictions) / n
    low, high = wilson_interval(mean, n)
    return Accuracy(mean, low, high, sum(prediction.parsed for prediction in predictions) / n, n)
