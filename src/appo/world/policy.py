"""The shipped tiny policy: a real Qwen2.5-VL of 1.3 million parameters, and how it is prompted.

How it was made is in recipes/tiny_policy.
"""

from __future__ import annotations

import json
from typing import Any

from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from appo.models.loading import load_model
from appo.models.names import policy_path as policy_path
from appo.models.prompt import Prompt
from appo.rewards.templates import build_messages
from appo.rollout.generation import VideoCache, encode_messages
from appo.types import VideoQA
from appo.video.reader import FrameSampling
from appo.world.world import MAX_SECONDS

# Two frames a second make one frame of the language model, at every length of clip.
SAMPLING = FrameSampling(fps=2.0, max_frames=2 * MAX_SECONDS, min_frames=4)
MAX_NEW_TOKENS = 128  # 99 % of responses have at most 83; DAPO's soft punishment begins at 103
# K1, K2, K3 in proportion to the response length and the number of frames (docs/world.md).
WORLD_WEIGHTS: dict[str, Any] = {"score_tokens": 8, "top_frames": 2, "frame_tokens": 8}


def load_policy() -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """The shipped lazy policy in float32, and its processor."""
    return load_model(policy_path())


def vocabulary() -> dict[str, int]:
    """The words of the tiny policy's tokenizer, and their ids."""
    words: dict[str, int] = json.loads((policy_path() / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    return words


def prompt_of(processor: Qwen2_5_VLProcessor, question: VideoQA) -> Prompt:
    """A question of the embedded world as a prompt, its clip read from the file."""
    messages = build_messages(question, instruction="")
    videos = VideoCache(processor.video_processor, SAMPLING)
    return encode_messages(processor, messages, videos)
