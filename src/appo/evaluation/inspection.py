"""One question, any checkpoint: sample a group, see what it looked at, without training.

Shape suffixes: G responses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from appo.models.log_probs import score_group
from appo.reports.run_folder import RolloutRecord
from appo.rewards.functions import score_answer
from appo.rewards.templates import INSTRUCTION, build_messages
from appo.rollout.generation import VideoCache, encode_prompt, generate, video_sources
from appo.rollout.groups import Sample, ScoredGroup
from appo.rollout.token_weights import weigh
from appo.training.rollout_logger import film_of, group_record
from appo.types import VideoQA
from appo.video.reader import FrameSampling


def inspect_question(
    model: Any,
    processor: Any,
    question: VideoQA,
    sampling: FrameSampling,
    *,
    max_new_tokens: int,
    responses: int = 8,
    instruction: str = INSTRUCTION,
    step: int = 0,
    keep_film: Callable[[bytes], str] = lambda _: "",
    **weight_settings: Any,
) -> RolloutRecord:
    """Sample a group of responses and make its frame attention, crucial frames and token weights (method steps 1-8).

    Args:
        model: a Hugging Face video language model.
        processor: its processor.
        question: video, question and gold answer, which splits winners from losers. Without one (""), nobody is
            rewarded, and the frames that any response looked at are crucial.
        sampling: how frames are sampled.
        max_new_tokens: longest response.
        responses: G.
        instruction: appended to the question.
        step: recorded as the training step the model is at.
        keep_film: stores the picture of the frames and returns its name (`keep_film`).
        weight_settings: passed to :func:`appo.method.perception.token_weights`.

    Returns:
        The group as a run folder records it.
    """
    videos = VideoCache(processor.video_processor, sampling)
    messages = build_messages(question, instruction=instruction)
    prompt = encode_prompt(processor, messages, [videos.read(source) for source in video_sources(messages)])
    ids_G = generate(model, processor, [prompt], max_new_tokens=max_new_tokens, responses=responses)[0]
    texts = processor.batch_decode(ids_G, skip_special_tokens=True)
    rewards_G = torch.tensor([_reward(text, question) for text in texts])
    row = {
        "prompt": messages,
        "id": question.id,
        "question": question.question,
        "answer": question.answer,
        "kind": question.kind,
        "event_frames": question.event_frames and list(question.event_frames),
    }
    names = ["accuracy_reward"] if question.answer else []
    prompt_ids = prompt["input_ids"][0].tolist()
    samples = [
        Sample(row, prompt_ids, ids.tolist(), text, None, prompt, reward[None][: len(names)])
        for ids, text, reward in zip(ids_G, texts, rewards_G, strict=True)
    ]
    with torch.no_grad():
        scores = score_group(model, prompt, ids_G)
    if not question.answer:
        weight_settings["strategy"] = "all"
    weights = weigh(model, scores, rewards_G, **weight_settings)
    advantages_G = (rewards_G - rewards_G.mean()) / (rewards_G.std() + 1e-4) if responses > 1 else rewards_G * 0
    group = ScoredGroup(samples, videos.timestamps(messages), advantages_G, scores, weights)
    return group_record(step, group, processor.tokenizer, names, keep_film(film_of(videos, messages, processor)))


def _reward(text: str, question: VideoQA) -> float:
    return score_answer(text, question.answer, question.kind, question.options) if question.answer else 0.0
