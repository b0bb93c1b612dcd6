"""Perceivers describe each video, in batches fixed by position, so that a resumed study has the same descriptions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from appo.evaluation.inference import InferenceSettings, answer
from appo.evaluation.predictions import Reply, batches
from appo.experiments.study.answering import Line
from appo.experiments.study.settings import TRUTH, Perceiver, StudySettings
from appo.experiments.study.words import blurred, describing_prompt, description_of, scene_in_words
from appo.models.loading import load_model, usual_dtype, usual_place
from appo.models.names import checkpoint_of
from appo.types import VideoQA
from appo.video.frame_cache import cache_in
from appo.world.policy import MAX_NEW_TOKENS, vocabulary


def describe(
    perceiver: Perceiver, questions: Sequence[VideoQA], missing: set[str], settings: StudySettings
) -> Iterator[list[Line]]:
    """Lines of a description file for the missing questions, batch after batch.

    A line has ``id`` and ``text``, of a checkpoint also the whole ``response``; if the video cannot be read ``id`` and
    ``error``. A batch with anything missing is generated as a whole: its texts may depend on each other, in the last
    digit of a number.

    Raises:
        ValueError, OSError: the checkpoint cannot be loaded, or memory does not hold a batch.
    """
    left = [
        (index, batch)
        for index, batch in batches(questions, settings.batch_size)
        if any(question.id in missing for question in batch)
    ]
    if perceiver.is_model:
        replies = _replies(perceiver, left, settings)
        for (_, batch), own in zip(left, replies, strict=True):
            pairs = zip(batch, own, strict=True)
            yield [_model_line(perceiver, question, reply) for question, reply in pairs if question.id in missing]
        return
    for _, batch in left:
        yield [_world_line(perceiver, question) for question in batch if question.id in missing]


def _replies(
    perceiver: Perceiver, left: Sequence[tuple[int, list[VideoQA]]], settings: StudySettings
) -> Iterator[list[Reply]]:
    dtype = settings.dtype or usual_dtype()
    model, processor = load_model(checkpoint_of(perceiver.source), dtype=dtype, **usual_place())
    longest = settings.max_description
    if processor.tokenizer.get_vocab() == vocabulary():  # the tiny policy understands only its own questions
        longest = min(longest, MAX_NEW_TOKENS)
    else:
        left = [(index, [_without_options(question) for question in batch]) for index, batch in left]
    inference = InferenceSettings(settings.sampling, longest, instruction="")
    for answered in answer(model, processor, left, inference, cache_in(settings.frame_cache)):
        yield answered.replies


def _without_options(question: VideoQA) -> VideoQA:
    return replace(question, question=describing_prompt(question), options=())


def _model_line(perceiver: Perceiver, question: VideoQA, reply: Reply) -> Line:
    if reply.error:
        return {"id": question.id, "error": reply.error}
    text = _blurred(description_of(reply.texts[0]), perceiver, question)
    return {"id": question.id, "text": text, "response": reply.texts[0]}


def _world_line(perceiver: Perceiver, question: VideoQA) -> Line:
    text = scene_in_words(question.metadata) if perceiver.source == TRUTH else ""
    return {"id": question.id, "text": _blurred(text, perceiver, question)}


def _blurred(text: str, perceiver: Perceiver, question: VideoQA) -> str:
    if not perceiver.noise:
        return text
    return blurred(text, perceiver.noise, question.id, int(question.metadata["seconds"]))
