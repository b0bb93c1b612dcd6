"""Perceivers at work: each video in words, in batches fixed by position, so that a killed study says the same again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from appo.evaluation.inference import InferenceSettings, answer
from appo.evaluation.predictions import Reply, batches
from appo.experiments.study.folder import Line
from appo.experiments.study.members import TRUTH, Perceiver
from appo.experiments.study.scenes import blurred, scene_in_words
from appo.experiments.study.words import describing_prompt, description_of
from appo.models.loading import load_model, usual_dtype, usual_place
from appo.models.names import checkpoint_of
from appo.types import VideoQA
from appo.video.frame_cache import cache_in
from appo.video.reader import FrameSampling
from appo.world.measure import MAX_NEW_TOKENS
from appo.world.processor import vocabulary


@dataclass(frozen=True)
class DescribeSettings:
    """How perceivers are asked."""

    sampling: FrameSampling  # how frames are sampled
    batch_size: int = 16  # questions at once
    max_new_tokens: int = 512  # longest response
    dtype: str | None = None  # of the weights; None: as fits the machine
    frame_cache: str | None = None  # folder in which sampled frames are kept


def describe(
    perceiver: Perceiver, questions: Sequence[VideoQA], missing: set[str], describing: DescribeSettings
) -> Iterator[list[Line]]:
    """Lines of a description file for the missing questions, batch after batch.

    A line has ``id`` and ``text``, of a checkpoint also the whole ``response``; where the video cannot be read ``id``
    and ``error``. A batch with anything missing is asked as a whole: the words of a batch may depend on what stands
    beside them, in the last digit of a number.

    Raises:
        ValueError, OSError: the checkpoint cannot be loaded, or memory does not hold a batch.
    """
    left = [
        (index, batch)
        for index, batch in batches(questions, describing.batch_size)
        if any(question.id in missing for question in batch)
    ]
    for batch, replies in _replies(perceiver, left, describing):
        pairs = zip(batch, replies, strict=True)
        yield [_line(perceiver, question, reply) for question, reply in pairs if question.id in missing]


def _replies(
    perceiver: Perceiver, left: Sequence[tuple[int, list[VideoQA]]], describing: DescribeSettings
) -> Iterator[tuple[list[VideoQA], list[Reply | None]]]:
    if not perceiver.is_model:
        for _, batch in left:
            yield batch, [None] * len(batch)
        return
    dtype = describing.dtype or usual_dtype()
    model, processor = load_model(checkpoint_of(perceiver.source), dtype=dtype, **usual_place())
    tiny = _is_tiny(processor)
    asked = [(index, [question if tiny else _described(question) for question in batch]) for index, batch in left]
    longest = min(describing.max_new_tokens, MAX_NEW_TOKENS) if tiny else describing.max_new_tokens
    inference = InferenceSettings(describing.sampling, longest, instruction="")
    found = answer(model, processor, asked, inference, cache_in(describing.frame_cache))
    for (_, batch), answered in zip(left, found, strict=True):
        yield batch, list(answered.replies)


def _is_tiny(processor: Any) -> bool:
    """Whether this is a policy of the embedded world, which understands its questions and nothing else."""
    known: dict[str, int] = processor.tokenizer.get_vocab()
    return known == vocabulary()


def _described(question: VideoQA) -> VideoQA:
    return replace(question, question=describing_prompt(question), options=())


def _line(perceiver: Perceiver, question: VideoQA, reply: Reply | None) -> Line:
    if reply is None:
        text = scene_in_words(question.metadata) if perceiver.source == TRUTH else ""
        return {"id": question.id, "text": _blurred(text, perceiver, question)}
    if reply.error:
        return {"id": question.id, "error": reply.error}
    text = _blurred(description_of(reply.texts[0]), perceiver, question)
    return {"id": question.id, "text": text, "response": reply.texts[0]}


def _blurred(text: str, perceiver: Perceiver, question: VideoQA) -> str:
    if not perceiver.noise:
        return text
    return blurred(text, perceiver.noise, question.id, int(question.metadata["seconds"]))
