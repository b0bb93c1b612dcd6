"""What a comparison measures of a policy: what its responses describe, and whether it attends to the true frames.

Held-out questions are encoded once: the vision tower is frozen in every cell, so its features of a clip are the same
before and after training. The true event frames are known to the world alone, not to training.

Shape suffixes: G responses of one group, N response tokens (padded), F frames.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from appo.files import atomic_write
from appo.method.attention_baseline import FrameShares, relative_attention, video_shares
from appo.method.perception import crucial_frames, looked_at_frames, response_frame_scores
from appo.models.families import family_of
from appo.models.log_probs import score_group
from appo.models.prompt import Features, Prompt
from appo.rewards.functions import score_answer
from appo.rollout.generation import generate
from appo.types import Group, GroupScores, VideoQA
from appo.world.policy import MAX_NEW_TOKENS, prompt_of
from appo.world.world import COLOURS, DISTRACTORS, MAX_SECONDS, SHAPES

# --- descriptions, by the grammar of the tiny policy (`appo.world.teacher`) -------------------------------------------


SECONDS = tuple(str(second) for second in range(MAX_SECONDS))
NAMES = frozenset((*SHAPES, *COLOURS, *SECONDS))
# How the teacher's sentences about other events go on.
ASIDES = ("is not it", "beside the point", "leave out")


@dataclass(frozen=True)
class Description:
    """All shapes, colours and seconds that a response describes, as words."""

    shapes: frozenset[str]
    colours: frozenset[str]
    seconds: frozenset[str]


def describe(text: str) -> Description:
    """What is named between <think> and the conclusion; nothing where there is no <think>."""
    thought = text.partition("<think>")[2].partition("</think>")[0]
    sentences = [sentence.split() for sentence in thought.split(".") if sentence.strip()]
    named = {word for sentence in sentences[:-1] if _is_claim(sentence) for word in sentence}
    return Description(*(frozenset(named.intersection(names)) for names in (SHAPES, COLOURS, SECONDS)))


def described_rightly(metadata: Mapping[str, Any], text: str) -> tuple[bool, bool]:
    """Whether a response describes rightly *what* the event of the question looks like, and *when* it is.

    Right means: its true shape and colour (its second) are named, and no other. In this world an event lasts one
    second, so a right *when* is a temporal IoU of 1, and any other one of at most 1/2.
    """
    event, found = metadata["events"][metadata["asked"]], describe(text)
    what = found.shapes == {event["shape"]} and found.colours == {event["colour"]}
    return what, found.seconds == {str(event["second"])}


def decisive_words(words: Sequence[str]) -> list[bool]:
    """Which words of a response decide its answer: the oracle of credit.

    They are the shapes, colours and seconds of the first sentence that claims an event and of the next one, and the
    word in <answer>. Everything else is paraphrase, or repeats them.
    """
    decisive, committed = [False] * len(words), -1
    for number, sentence in enumerate(_sentences(words)):
        claims = _is_claim([words[place] for place in sentence])
        named = [place for place in sentence if claims and words[place] in NAMES]
        if committed < 0 and named:
            committed = number
        for place in named if number <= committed + 1 else ():
            decisive[place] = True
    opened = words.index("<answer>") + 1 if "<answer>" in words else len(words)
    closed = words.index("</answer>", opened) if "</answer>" in words[opened:] else len(words)
    decisive[opened:closed] = [True] * (closed - opened)
    return decisive


def _sentences(words: Sequence[str]) -> list[list[int]]:
    """The places of each sentence's words, up to the full stop or the end of the thought."""
    sentences: list[list[int]] = [[]]
    for place, word in enumerate(words):
        sentences[-1].append(place)
        if word in (".", "</think>"):
            sentences.append([])
    return sentences


def _is_claim(sentence: Sequence[str]) -> bool:
    """Whether a sentence is about the event of the question, not about a wanderer or another event."""
    wanders = any(a in COLOURS and b in DISTRACTORS for a, b in itertools.pairwise(sentence))
    return not wanders and not any(aside in " ".join(sentence) for aside in ASIDES)


# --- held-out questions ----------------------------------------------------------------------------------------------


BATCH = 128  # responses generated at once


@dataclass(frozen=True)
class HeldOut:
    """Questions and their prompts, with the vision tower's features instead of pixels."""

    questions: Sequence[VideoQA]
    prompts: Sequence[Prompt]


def encoded(file: Path, questions: Sequence[VideoQA], model: Any, processor: Any) -> HeldOut:
    """The questions as prompts of this model's vision tower, read from `file`, which is written first if absent.

    Raises:
        ValueError: this transformers cannot take features instead of pixels.
    """
    family = family_of(model)
    if not family.reuses_vision:
        raise ValueError("appo compare needs transformers 5.18 or later: older ones take pixels only")
    if not file.exists():
        prompts = [_features_apart(family.encode_vision(prompt_of(processor, question))) for question in questions]
        torch.save(prompts, content := io.BytesIO())
        atomic_write(file, content.getvalue())
    return HeldOut(questions, [_together(*parts) for parts in torch.load(file, weights_only=True)])


def sampled(
    model: Any, processor: Any, prompts: Sequence[Prompt], *, responses: int = 1, temperature: float = 0.0
) -> list[list[Tensor]]:
    """Each prompt's responses as int64 tensors; greedy at temperature 0."""
    step = max(1, BATCH // responses)
    settings: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "responses": responses, "temperature": temperature}
    batches = [prompts[start : start + step] for start in range(0, len(prompts), step)]
    return [group for batch in batches for group in generate(model, processor, batch, **settings)]


def _features_apart(prompt: Prompt) -> tuple[dict[str, Any], list[Tensor]]:
    """What plain tensors can hold: the prompt without features, and the features of its videos."""
    assert prompt.video_features is not None
    return replace(prompt, video_features=None).mapping(), list(prompt.video_features.tokens)


def _together(mapping: dict[str, Any], features: Sequence[Tensor]) -> Prompt:
    return Prompt.of(mapping).with_features(None, Features(tuple(features)))


# --- attention -------------------------------------------------------------------------------------------------------


def attention_on_events(scores: GroupScores, is_winner_G: torch.Tensor, events: Sequence[int]) -> dict[str, float]:
    """``winners`` and ``losers``: mean share of the attention to the video that is on the true frames.

    A group without winners (losers) has no such entry. Chance gives len(events) / F.
    """
    assert scores.frame_attention_GNF is not None
    shares_GNF = video_shares(scores.frame_attention_GNF, scores.mask_GN)
    on_events_GN = shares_GNF[..., list(events)].sum(dim=-1)
    mean_G = on_events_GN.sum(dim=1) / scores.mask_GN.sum(dim=1).clamp(min=1)
    is_winner_G = is_winner_G.to(mean_G.device)
    sides = {"winners": mean_G[is_winner_G], "losers": mean_G[~is_winner_G]}
    return {name: float(side.mean()) for name, side in sides.items() if len(side)}


def recall(crucial_F: torch.Tensor, events: Sequence[int]) -> float:
    """Share of the true frames that are among the crucial ones."""
    return float(crucial_F[list(events)].float().mean())


def averaged(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every name over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: sum(values) / len(values) for name, values in columns.items()}


def group_perception(group: Group, accuracy_column: int, threshold: float) -> dict[str, float]:
    """Attention of a group with weights; {} if its row has no true frames.

    `accuracy_column`: of the reward that splits winners from losers; `threshold`: least reward of a winner.

    Returns:
        ``recall`` of the true frames, ``crucial``: the share of frames that are crucial (what chance would recall), and
        :func:`attention_on_events`.
    """
    events = group.question.event_frames
    if group.scores is None or group.weights is None or not events:
        return {}
    is_winner_G = group.rewards_GR[:, accuracy_column] >= threshold
    found = {
        "recall": recall(group.weights.crucial_F, events),
        "crucial": float(group.weights.crucial_F.float().mean()),
    }
    return {**found, **attention_on_events(group.scores, is_winner_G, events)}


@torch.no_grad()
def measure_attention(
    model: Any, processor: Any, held_out: HeldOut, responses: int, seed: int, settings: Mapping[str, Any]
) -> dict[str, float]:
    """Frame attention of a policy on one sampled group per question; the global random state is unchanged.

    Args:
        model: the policy.
        processor: its processor.
        held_out: the questions.
        responses: G.
        seed: of the sampling.
        settings: ``score_tokens``, ``top_frames``, ``strategy`` and ``threshold`` of the crucial frames.

    Returns:
        means over the questions of :func:`attention_on_events`; and over groups with a winner, for raw and for relative
        attention, of :func:`recall` (``recall_raw``, ``recall_relative``) and of the share of frames that are crucial
        (``crucial_raw``, ``crucial_relative``), which is what chance would recall.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        groups = sampled(model, processor, held_out.prompts, responses=responses, temperature=1.0)
    rows, shares = [], FrameShares()
    scored = [score_group(model, prompt, ids_G) for prompt, ids_G in zip(held_out.prompts, groups, strict=True)]
    shares.update((s.frame_attention_GNF, s.mask_GN) for s in scored if s.frame_attention_GNF is not None)
    for question, ids_G, scores in zip(held_out.questions, groups, scored, strict=True):
        texts = processor.batch_decode(ids_G, skip_special_tokens=True)
        accuracy_G = torch.tensor([score_answer(text, question.answer, question.kind) for text in texts])
        rows.append(_group_attention(scores, accuracy_G, question.event_frames or (), shares, settings))
    return averaged(rows)


def _group_attention(
    scores: GroupScores,
    accuracy_G: torch.Tensor,
    events: Sequence[int],
    shares: FrameShares,
    settings: Mapping[str, Any],
) -> dict[str, float]:
    """What `measure_attention` averages, of one group."""
    attn_GNF, is_winner_G = scores.frame_attention_GNF, accuracy_G >= settings["threshold"]
    assert attn_GNF is not None
    row = attention_on_events(scores, is_winner_G, events)
    usual_F = shares.mean(attn_GNF.shape[2])
    attentions = {"raw": attn_GNF, "relative": relative_attention(attn_GNF, scores.mask_GN, usual_F)}
    for name, own_GNF in attentions.items() if bool(is_winner_G.any()) else ():
        scores_GF = response_frame_scores(own_GNF, scores.mask_GN, settings["score_tokens"])
        looked_at_GF = looked_at_frames(scores_GF, scores.mask_GN, settings["top_frames"])
        crucial_F = crucial_frames(looked_at_GF, accuracy_G, settings["threshold"], settings["strategy"])
        row |= {f"recall_{name}": recall(crucial_F, events), f"crucial_{name}": float(crucial_F.float().mean())}
    return row
