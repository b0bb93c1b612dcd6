"""APPO as one flat loop: video files in, a policy that looks more closely out. No Trainer, no TRL, no accelerate.

    python examples/loop.py --steps 30

It trains the tiny policy that ships with appo on clips it draws itself; nothing is downloaded. Read `train` from top
to bottom: it is the whole method, its comments carry the step numbers of docs/method.md, and what it calls from appo
are short functions of tensors and files. To train another model, replace `load_policy` and `generate_clips` in `main`.

One step of the loop:

    questions about videos -> G responses each -> rewards -> (groups that can teach something)
      -> attention of every token to every frame -> crucial frames -> one weight per token
      -> advantage x weight -> DAPO's clipped loss -> AdamW

Shape suffixes: G responses to one question, N response tokens (padded), F frames as the language model sees them
(two sampled frames make one).
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from appo.method.perception import token_weights
from appo.models import Prompt, freeze_vision_tower, log_probs_at, score_group
from appo.rewards.functions import format_reward, score_answer
from appo.rewards.templates import build_messages
from appo.rollout.generation import encode_prompt, generate
from appo.types import GroupScores, PerceptionWeights, VideoQA
from appo.video.reader import FrameSampling, read_video
from appo.world import generate as generate_clips
from appo.world import load_policy
from appo.world.world import MAX_SECONDS

SAMPLING = FrameSampling(fps=2.0, max_frames=2 * MAX_SECONDS)


@dataclass(frozen=True)
class Settings:
    """The paper's settings, scaled from responses of 384 tokens and 3 billion parameters to 96 and 1.3 million."""

    steps: int = 30
    prompts: int = 16
    group: int = 8
    max_new_tokens: int = 96
    learning_rate: float = 1e-4
    updates: int = 1  # optimiser steps per rollout; from the second on, the ratio leaves 1 and the clip can bind
    resampling_rounds: int = 2
    attention_layers: int = 3
    score_tokens: int = 8  # K1
    top_frames: int = 2  # K2
    frame_tokens: int = 8  # K3
    max_weight: float = 1.7  # 1: plain DAPO
    clip_low: float = 0.2
    clip_high: float = 0.28


@dataclass(frozen=True)
class Group:
    """One question and its G responses: the unit in which everything is sampled, scored, weighted and trained."""

    question: VideoQA
    prompt: Prompt
    responses: list[Tensor]
    old_log_probs_GN: Tensor
    mask_GN: Tensor
    advantages_GN: Tensor
    perception: PerceptionWeights


@dataclass(frozen=True)
class Step:
    """What one step of the loop did; ``reward`` and ``right`` are over all responses, skipped groups included."""

    number: int
    loss: float
    reward: float
    right: float
    skipped: int
    groups: list[Group]

    def __str__(self) -> str:
        line = f"step {self.number:3d}  reward {self.reward:.3f}  right {self.right:.3f}  loss {self.loss:+.4f}"
        if not self.groups:
            return f"{line}  no group had unequal rewards: nothing to learn from"
        weights = torch.cat([group.perception.weights_GN[group.mask_GN] for group in self.groups])
        crucial = [group.perception.crucial_F.nonzero().flatten().tolist() for group in self.groups]
        events = [list(group.question.event_frames or ()) for group in self.groups]
        found = sum(set(event) <= set(frames) for frames, event in zip(crucial, events, strict=True))
        example = f"e.g. frames {crucial[0]}, event {events[0]}"
        line = f"{line}  weight {weights.mean():.3f}  skipped {self.skipped}"
        return f"{line}  event among the crucial frames {found}/{len(crucial)}, {example}"


IsRight = Callable[[VideoQA, str], float]


def is_right(question: VideoQA, text: str) -> float:
    """1.0 if the response answers the question, else 0.0: the only supervision there is."""
    return score_answer(text, question.answer, question.kind, question.options)


def train(
    model: Any, processor: Any, questions: Sequence[VideoQA], settings: Settings, is_right: IsRight = is_right
) -> Iterator[Step]:
    """The method, one optimiser step after another; the model is changed in place."""
    freeze_vision_tower(model)  # the paper freezes it: what is learned is where to look
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
    stream = itertools.cycle(questions)
    for number in range(1, settings.steps + 1):
        groups: list[Group] = []
        rewards, accuracies = [], []
        # DAPO's dynamic sampling: draw questions until there are enough groups that can teach something.
        for _ in range(1 + settings.resampling_rounds):
            drawn = [next(stream) for _ in range(settings.prompts - len(groups))]
            if not drawn:
                break
            # The old policy answers every question G times, at temperature 1.
            prompts = [encode(processor, question) for question in drawn]
            limits = {"responses": settings.group, "max_new_tokens": settings.max_new_tokens}
            sampled = generate(model, processor, prompts, **limits)
            for question, prompt, responses in zip(drawn, prompts, sampled, strict=True):
                texts = processor.batch_decode(responses, skip_special_tokens=True)
                accuracy_G = torch.tensor([is_right(question, text) for text in texts])
                rewards_G = 0.9 * accuracy_G + 0.1 * torch.tensor(format_reward(texts)) + overlong(responses, settings)
                rewards.append(rewards_G)
                accuracies.append(accuracy_G)
                if rewards_G.max() - rewards_G.min() < 1e-6:
                    continue  # every advantage would be 0
                # Steps 1 to 8: attention to frames becomes one weight per token (see `look`, below).
                scores, perception = look(model, prompt, responses, accuracy_G, settings)
                # GRPO's advantage compares an answer with its group; the weights say where in it that was decided.
                advantages_G = (rewards_G - rewards_G.mean()) / (rewards_G.std() + 1e-4)
                advantages_GN = advantages_G[:, None].to(scores.mask_GN.device) * perception.weights_GN
                old_log_probs_GN, mask_GN = scores.log_probs_GN, scores.mask_GN
                groups.append(Group(question, prompt, responses, old_log_probs_GN, mask_GN, advantages_GN, perception))
        # Step 9. Every token of the batch counts the same, however long its response. Gradients add up group by group,
        # so that only one group's activations exist at a time.
        tokens = sum(int(group.mask_GN.sum()) for group in groups)
        for _ in range(settings.updates):
            loss = 0.0
            for group in groups:
                new_log_probs_GN = score_group(model, group.prompt, group.responses, capture_layers=0).log_probs_GN
                share = dapo_loss(new_log_probs_GN, group, settings) / tokens
                share.backward()
                loss += share.item()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        reward, right = torch.cat(rewards).mean().item(), torch.cat(accuracies).mean().item()
        yield Step(number, loss, reward, right, len(rewards) - len(groups), groups)


def encode(processor: Any, question: VideoQA) -> Prompt:
    """A question as a prompt: the mp4 file is decoded once, its pixels exist once for the whole group."""
    video = read_video(question.video, processor.video_processor, SAMPLING)
    return encode_prompt(processor, build_messages(question, instruction=""), [video])


def overlong(responses: Sequence[Tensor], settings: Settings) -> Tensor:
    """DAPO's soft punishment, (G,): from 0 to -1 over the last fifth of the length allowed."""
    cache = max(1, settings.max_new_tokens // 5)
    length_G = torch.tensor([len(response) for response in responses])
    return ((settings.max_new_tokens - cache - length_G) / cache).clamp(max=0.0)


@torch.no_grad()
def look(
    model: Any, prompt: Prompt, responses: Sequence[Tensor], accuracy_G: Tensor, settings: Settings
) -> tuple[GroupScores, PerceptionWeights]:
    """Steps 1 to 8: which frames did the answers look at, and at which tokens do they part from each other?"""
    # Step 1. One forward pass of the old policy: log-probabilities, and how much attention each token paid to each
    # frame, averaged over the heads and the last layers. A token's query is the position that emits it.
    scores = score_group(model, prompt, responses, capture_layers=settings.attention_layers)
    assert scores.frame_attention_GNF is not None
    # Steps 2 to 8. A response is scored by its K1 most attentive tokens (2) and looked at its K2 best frames (3). The
    # frames that right answers looked at are crucial (4). To each of them every response, right or wrong, gives its K3
    # most attentive tokens, in order (5). Where the k-th tokens disagree about what follows (6), something was seen
    # differently: that rank's level is high (7), and so is the weight of its tokens (8), from 1 to max_weight.
    perception = token_weights(
        scores.frame_attention_GNF,
        scores.mask_GN,
        accuracy_G,
        log_probs_at(model, scores),
        score_tokens=settings.score_tokens,
        top_frames=settings.top_frames,
        frame_tokens=settings.frame_tokens,
        max_weight=settings.max_weight,
    )
    return scores, perception


def dapo_loss(new_log_probs_GN: Tensor, group: Group, settings: Settings) -> Tensor:
    """Step 9: the clipped surrogate, summed over the group's tokens; no KL term, and more room upwards."""
    ratio_GN = (new_log_probs_GN - group.old_log_probs_GN).exp()
    clipped_GN = ratio_GN.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    surrogate_GN = torch.minimum(ratio_GN * group.advantages_GN, clipped_GN * group.advantages_GN)
    return -(surrogate_GN * group.mask_GN).sum()


def main(argv: Sequence[str] | None = None) -> None:
    """Draw clips, load the shipped policy, train it and print every step."""
    parser = argparse.ArgumentParser(description="APPO on the embedded world, as one flat loop.")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="optimiser steps")
    parser.add_argument("--seed", type=int, default=0, help="of clips and sampling")
    parser.add_argument("--prompts", type=int, default=Settings.prompts, help="questions a step")
    parser.add_argument("--group", type=int, default=Settings.group, help="G, responses to a question")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1 or arguments.prompts < 1 or arguments.group < 2:
        parser.error("at least 1 step, 1 prompt and a group of 2 are needed")
    settings = Settings(steps=arguments.steps, prompts=arguments.prompts, group=arguments.group)
    torch.manual_seed(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        questions = generate_clips(folder, "L1", settings.steps * settings.prompts, arguments.seed)
        model, processor = load_policy()
        for step in train(model, processor, questions, settings):
            print(step, flush=True)


if __name__ == "__main__":
    main()
