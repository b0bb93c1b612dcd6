"""One video and question, any checkpoint: sample a group and measure its frame attention, without training.

Shape suffixes: G responses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from appo.evaluation.run import LONGEST_RESPONSE, frame_sampling
from appo.models.loading import load_model, usual_dtype
from appo.models.log_probs import score_group
from appo.models.names import SPOTLIGHT, checkpoint_of
from appo.reports.records import RolloutRecord
from appo.reports.run_folder import LoadedRun
from appo.rewards.functions import score_answer
from appo.rewards.templates import INSTRUCTION, build_messages
from appo.rollout.generation import VideoCache, encode_messages, generate
from appo.rollout.token_weights import weigh
from appo.training.rollout_logger import film_of, group_record
from appo.types import Group, Sample, VideoQA, VideoSource
from appo.video.reader import FrameSampling
from appo.world.policy import MAX_NEW_TOKENS, WORLD_WEIGHTS


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
    save_film: Callable[[bytes], str] = lambda _: "",
    **weight_settings: Any,
) -> RolloutRecord:
    """Sample a group of responses and make its frame attention, crucial frames and token weights (method steps 1-8).

    Args:
        question: video, question and gold answer, which splits winners from losers. Without one (""), no response is
            rewarded, and the frames that any response attends to are crucial.
        responses: G.
        step: recorded as the training step the model is at.
        save_film: stores the picture of the frames and returns its name.
        weight_settings: passed to :func:`appo.method.perception.token_weights`.

    Returns:
        The group as a run folder records it.
    """
    videos = VideoCache(processor.video_processor, sampling)
    messages = build_messages(question, instruction=instruction)
    prompt = encode_messages(processor, messages, videos)
    ids_G = generate(model, processor, [prompt], max_new_tokens=max_new_tokens, responses=responses)[0]
    texts = processor.batch_decode(ids_G, skip_special_tokens=True)
    gold = question.answer, question.kind, question.options
    rewards_G = torch.tensor([score_answer(text, *gold) if question.answer else 0.0 for text in texts])
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
    return group_record(step, group, processor.tokenizer, names, save_film(film_of(videos, messages, processor)))


@dataclass(frozen=True)
class InspectionSettings:
    """What the flags of `appo spotlight --model` set; None: a default that depends on model or machine."""

    model: str  # a Hugging Face folder or hub id, of a whole model or of an adapter, or ``spotlight``: the tiny policy
    video: str  # path of the video file
    question: str  # without its options
    answer: str = ""  # the gold answer, which splits winners from losers; "": unknown
    options: tuple[str, ...] = ()  # the choices; with them the answer is a letter, else words
    num_generations: int = 8  # G, the number of responses
    video_fps: float | None = None  # frames sampled per second
    video_max_frames: int | None = None  # most frames sampled
    max_completion_length: int | None = None  # longest response
    instruction: str | None = None  # closes the prompt; None: `INSTRUCTION` (the tiny policy: nothing)
    seed: int = 0  # of the sampling
    dtype: str | None = None  # of the weights; None: bfloat16 on a GPU, else float32
    trust_remote_code: bool = False  # run the code that a checkpoint brings


def inspect_video(settings: InspectionSettings) -> LoadedRun:
    """Sample a group about the video; what `appo spotlight --model` renders.

    Raises:
        ValueError, OSError: an impossible setting, checkpoint or video; one line each.
    """
    tiny = settings.model == SPOTLIGHT
    sampling = frame_sampling(tiny, settings.video_fps, settings.video_max_frames)
    kind = "letter" if settings.options else "word"
    video = VideoSource(settings.video)
    question = VideoQA(Path(settings.video).stem, video, settings.question, settings.answer, kind, settings.options)
    gpu = torch.cuda.is_available()
    model, processor = load_model(
        checkpoint_of(settings.model),
        dtype=settings.dtype or usual_dtype(),
        trust_remote_code=settings.trust_remote_code,
    )
    model = model.to("cuda" if gpu else "cpu").eval()
    torch.manual_seed(settings.seed)
    weights: dict[str, Any] = WORLD_WEIGHTS if tiny else {}
    longest = settings.max_completion_length or (MAX_NEW_TOKENS if tiny else LONGEST_RESPONSE)
    films: dict[str, bytes] = {}

    def save_film(picture: bytes) -> str:
        films["film"] = picture
        return "film"

    record = inspect_question(
        model,
        processor,
        question,
        sampling,
        max_new_tokens=longest,
        responses=settings.num_generations,
        instruction=("" if tiny else INSTRUCTION) if settings.instruction is None else settings.instruction,
        save_film=save_film,
        **weights,
    )
    reported = vars(settings) | {
        "max_completion_length": longest,
        "video_fps": sampling.fps,
        "video_max_frames": sampling.max_frames,
        **weights,
    }
    return LoadedRun(Path(settings.video).name, settings=reported, groups=[record], films=films)
