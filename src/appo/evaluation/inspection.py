"""One video and question, any checkpoint: sample a group, see what it attended to, without training.

Shape suffixes: G responses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from appo.evaluation.evaluate import LONGEST_RESPONSE
from appo.models.loading import load_model, usual_dtype
from appo.models.log_probs import score_group
from appo.models.names import SPOTLIGHT, checkpoint_of
from appo.reports.run_folder import RolloutRecord
from appo.reports.seen_run import SeenRun
from appo.rewards.functions import score_answer
from appo.rewards.templates import INSTRUCTION, build_messages
from appo.rollout.generation import VideoCache, encode_prompt, generate, video_sources
from appo.rollout.token_weights import weigh
from appo.training.rollout_logger import film_of, group_record
from appo.types import Group, Sample, VideoQA, VideoSource
from appo.video.reader import FrameSampling
from appo.world.measure import MAX_NEW_TOKENS, SAMPLING, WORLD_WEIGHTS


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
    names = ["accuracy_reward"] if question.answer else []
    prompt_ids = prompt.ids_1P[0].tolist()
    samples = [
        Sample(ids.tolist(), text, reward[None][: len(names)])
        for ids, text, reward in zip(ids_G, texts, rewards_G, strict=True)
    ]
    with torch.no_grad():
        scores = score_group(model, prompt, ids_G)
    if not question.answer:
        weight_settings["strategy"] = "all"
    weights = weigh(model, scores, rewards_G, **weight_settings)
    advantages_G = (rewards_G - rewards_G.mean()) / (rewards_G.std() + 1e-4) if responses > 1 else rewards_G * 0
    times, row = videos.timestamps(messages), {"prompt": messages}
    group = Group(row, question, prompt, prompt_ids, samples, times, advantages_G, scores, weights)
    return group_record(step, group, processor.tokenizer, names, keep_film(film_of(videos, messages, processor)))


def _reward(text: str, question: VideoQA) -> float:
    return score_answer(text, question.answer, question.kind, question.options) if question.answer else 0.0


@dataclass(frozen=True)
class Asked:
    """What the flags of `appo spotlight --model` set; None: a default that depends on model or machine.

    Attributes:
        model: a Hugging Face folder or hub id, of a whole model or of an adapter, or ``spotlight``: the tiny policy.
        video: path of the video file.
        question: as asked, options not included.
        answer: the gold answer, which splits winners from losers; "": unknown.
        options: the choices; with them the answer is a letter, else words.
        group: G, responses to sample.
        fps: frames sampled a second.
        max_frames: frames sampled at most.
        max_new_tokens: longest response.
        instruction: closes the prompt; None: asks for the format (the tiny policy: nothing).
        seed: of the sampling.
        dtype: of the weights; None: bfloat16 on a GPU, else float32.
        trust_remote_code: run the code that a checkpoint brings.
    """

    model: str
    video: str
    question: str
    answer: str = ""
    options: tuple[str, ...] = ()
    group: int = 8
    fps: float | None = None
    max_frames: int | None = None
    max_new_tokens: int | None = None
    instruction: str | None = None
    seed: int = 0
    dtype: str | None = None
    trust_remote_code: bool = False


def inspect_video(asked: Asked) -> SeenRun:
    """Sample a group about the video and see what it looked at.

    Raises:
        ValueError, OSError: an impossible setting, checkpoint or video; one line each.
    """
    tiny = asked.model == SPOTLIGHT
    usual = SAMPLING if tiny else FrameSampling()
    most = asked.max_frames or usual.max_frames
    sampling = FrameSampling(asked.fps or usual.fps, most, min(usual.min_frames, most))
    kind = "letter" if asked.options else "word"
    video = VideoSource(asked.video)
    question = VideoQA(Path(asked.video).stem, video, asked.question, asked.answer, kind, asked.options)
    gpu = torch.cuda.is_available()
    model, processor = load_model(
        checkpoint_of(asked.model),
        dtype=asked.dtype or usual_dtype(),
        trust_remote_code=asked.trust_remote_code,
    )
    model = model.to("cuda" if gpu else "cpu").eval()
    torch.manual_seed(asked.seed)
    weights: dict[str, Any] = WORLD_WEIGHTS if tiny else {}
    films: dict[str, bytes] = {}
    record = inspect_question(
        model,
        processor,
        question,
        sampling,
        max_new_tokens=asked.max_new_tokens or (MAX_NEW_TOKENS if tiny else LONGEST_RESPONSE),
        responses=asked.group,
        instruction=("" if tiny else INSTRUCTION) if asked.instruction is None else asked.instruction,
        keep_film=partial(_keep, films),
        **weights,
    )
    settings = {field.name: getattr(asked, field.name) for field in fields(asked)}
    settings |= {"num_generations": asked.group, "video_fps": sampling.fps, "video_max_frames": most, **weights}
    return SeenRun(Path(asked.video).name, settings=settings, groups=[record], films=films)


def _keep(films: dict[str, bytes], picture: bytes) -> str:
    films["film"] = picture
    return "film"
