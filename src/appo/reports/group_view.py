"""One recorded group -> the data of its page: attention of each response and token to each frame, weights, rewards.

G responses, N response tokens, F frames of the language model.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, TypeGuard

from appo.reports.records import ResponseRecord, RolloutRecord

# One character per number: attention in 64 levels of its square root, so that small values are visible (not in the
# paper).
LEVELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
# Longer ones are shortened, with a note (not in the paper).
MOST_FRAMES, MOST_TOKENS, MOST_RESPONSES = 256, 4000, 64
TOKEN_LENGTH, TEXT_LENGTH, QUESTION_LENGTH, NAME_LENGTH = 200, 20_000, 4000, 300
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]"
)


@dataclass(frozen=True)
class ViewSettings:
    """The settings of a run that its groups' views need."""

    accuracy: str = "accuracy_reward"  # name of the reward that splits winners from losers
    threshold: float = 0.5  # a response with at least this much of it is a winner
    score_tokens: int = 15  # K1 of method step 2
    reward_weights: tuple[float, ...] = ()  # of the rewards, in their order; those without one count once

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> ViewSettings:
        """Of a run's settings; the paper's where they are missing or invalid."""
        weights = settings.get("reward_weights")
        weights = weights if isinstance(weights, list) and all(is_number(weight) for weight in weights) else []
        accuracy, threshold, tokens = (settings.get(name) for name in ("accuracy_reward", "threshold", "score_tokens"))
        return cls(
            accuracy if isinstance(accuracy, str) and accuracy else cls.accuracy,
            threshold if is_number(threshold) else cls.threshold,
            tokens if isinstance(tokens, int) and tokens > 0 else cls.score_tokens,
            tuple(weights),
        )


def group_view(record: RolloutRecord, settings: ViewSettings) -> dict[str, Any]:
    """A group as the page's JSON holds it; every text cleaned and bounded, every number finite or None.

    Returns:
        the record's fields, and of each response, winners first, ``scores`` ((F,), method step 2), ``heat`` ((F,), 0 to
        100: the score between the smallest and the largest of the group) and ``looks`` (N texts of F characters of
        `LEVELS`, the attention of each token: the largest of the group is ``peak``, the median ``floor``).
    """
    frames, notes = _frame_count(record)
    responses = record.responses[:MOST_RESPONSES]
    if len(responses) < len(record.responses):
        notes.append(f"{len(record.responses) - len(responses)} more responses are left out.")
    attention_GNF = [_attention(response, frames) for response in responses]
    values = sorted(value for rows in attention_GNF for row in rows for value in row)
    peak, floor = (values[-1], values[len(values) // 2]) if values else (0.0, 0.0)
    scores_GF = [_scores(rows, frames, settings.score_tokens) for rows in attention_GNF]
    heat_GF = _heat(scores_GF)
    views = [
        {"number": i + 1, "scores": [rounded(score, 4) for score in scores_GF[i]], "heat": heat_GF[i],
         **_response(one, attention_GNF[i], peak, settings)}
        for i, one in enumerate(responses)
    ]  # fmt: skip
    views.sort(key=lambda view: {True: 0, None: 1, False: 2}[view["right"]])
    rights = [view["right"] for view in views if view["right"] is not None]
    totals = [view["total"] for view in views if view["total"] is not None]
    event = None if record.event_frames is None else _inside(record.event_frames, frames)
    return {
        "step": record.step,
        "id": clean(record.id, NAME_LENGTH),
        "video": clean(PurePath(record.video).name, NAME_LENGTH),
        "question": clean(record.question, QUESTION_LENGTH),
        "answer": clean(record.answer, QUESTION_LENGTH),
        "times": [rounded(time, 4) for time in record.timestamps[:frames]] or [None] * frames,
        "crucial": _inside(record.crucial_frames, frames),
        "event": event,
        "film": record.film,
        "peak": rounded(peak, 4),
        "floor": rounded(floor, 4),
        "right": sum(rights),
        "judged": len(rights),
        "spread": rounded(max(totals) - min(totals), 4) if totals else None,
        "meanHeat": {name: _mean_heat(views, right) for name, right in (("right", True), ("wrong", False))},
        "says": _description(views, record.timestamps[:frames], event),
        "responses": views,
        "notes": notes,
    }


def lean(group: Mapping[str, Any], most_text: int = 600) -> dict[str, Any]:
    """The group without its tokens, for pages that would be too large: heat map, rewards and shortened texts."""
    responses = []
    for view in group["responses"]:
        text = view["text"] or view["gap"].join(view["tokens"])
        nothing: dict[str, list[Any]] = {"tokens": [], "looks": [], "weights": [], "chosen": []}
        responses.append({**view, **nothing, "text": clean(text, most_text)})
    note = "Tokens and their attention are left out here to keep the page small."
    return {**group, "responses": responses, "notes": [*group["notes"], note]}


def clean(text: str, longest: int) -> str:
    """A text for the page: hidden controls (bidirectional marks among them) by their number, shortened."""
    cut = f"{text[:longest]} … [{len(text) - longest} more characters]" if len(text) > longest else text
    cut = cut.replace("\r\n", "\n")
    return _HIDDEN.sub(lambda found: f"[U+{ord(found.group()):04X}]", cut).encode("utf-8", "replace").decode()


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a number for the page."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e30 < value < 1e30


def rounded(value: Any, digits: int) -> float | None:
    """The number with that many significant digits; None unless `is_number`."""
    return float(f"{value:.{digits}g}") if is_number(value) else None


def _frame_count(record: RolloutRecord) -> tuple[int, list[str]]:
    """F, and notes: damaged records disagree about the number of frames."""
    widths = {len(row) for response in record.responses for row in response.frame_attention}
    frames = len(record.timestamps) or max(widths, default=0)
    notes = []
    if widths - {frames}:
        notes.append(f"The record has {frames} frames, but attention to {', '.join(map(str, sorted(widths)[:5]))}.")
    if frames > MOST_FRAMES:
        notes.append(f"The first {MOST_FRAMES} of {frames} frames are shown.")
    return min(frames, MOST_FRAMES), notes


def _attention(response: ResponseRecord, frames: int) -> list[list[float]]:
    """(N, F), each a share of 1; anything else (damaged, not finite) counts as 0."""
    rows = response.frame_attention[:MOST_TOKENS]
    padded = ([*row[:frames], *[0.0] * (frames - len(row))] for row in rows)
    return [[value if 0.0 <= value <= 1.0 else 0.0 for value in row] for row in padded]


def _scores(attention_NF: Sequence[Sequence[float]], frames: int, score_tokens: int) -> list[float | None]:
    """(F,): the mean of the K1 largest attentions to each frame; None without attention.

    Method step 2, equal to `appo.method.perception.response_frame_scores` but without torch, which takes longer to load
    than a page takes to write.
    """
    if not attention_NF:
        return [None] * frames
    largest = [heapq.nlargest(score_tokens, column) for column in zip(*attention_NF, strict=True)]
    return [math.fsum(values) / len(values) for values in largest]


def _heat(scores_GF: Sequence[Sequence[float | None]]) -> list[list[int | None]]:
    """Scores as brightness from 0 to 100 over the group; an outlier does not dim the rest (not in the paper)."""
    known = [score for row in scores_GF for score in row if score is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    span = high - low or 1.0
    return [
        [None if score is None else round(100 * ((score - low) / span) ** 0.7) for score in row] for row in scores_GF
    ]


def _response(
    response: ResponseRecord, attention_NF: Sequence[Sequence[float]], peak: float, settings: ViewSettings
) -> dict[str, Any]:
    count = len(response.tokens)
    tokens = [clean(token, TOKEN_LENGTH) for token in response.tokens[:MOST_TOKENS]]
    gap = " " if response.text.strip() and response.text.strip() in " ".join(response.tokens) else ""
    total = _total(response.rewards, settings)
    return {
        "right": _is_right(response, settings),
        "rewards": {clean(name, NAME_LENGTH): rounded(value, 4) for name, value in response.rewards.items()},
        "total": rounded(total, 4),
        "advantage": rounded(response.advantage, 4),
        "length": count,
        "more": count - len(tokens),
        "text": "" if tokens else clean(response.text, TEXT_LENGTH),
        "gap": gap,
        "tokens": tokens,
        "weights": [_hundredths(weight) for weight in response.weights[:MOST_TOKENS]],
        "chosen": [j for j, chosen in enumerate(response.chosen[:MOST_TOKENS]) if chosen],
        "looks": ["".join(_level(value, peak) for value in row) for row in attention_NF],
    }


def _level(value: float, peak: float) -> str:
    return LEVELS[round((len(LEVELS) - 1) * math.sqrt(value / peak))] if peak else LEVELS[0]


def _hundredths(weight: float) -> int:
    """A token weight in hundredths, which are shorter to write; 100 if it is no number."""
    return round(100 * weight) if is_number(weight) and abs(weight) < 1e4 else 100


def _is_right(response: ResponseRecord, settings: ViewSettings) -> bool | None:
    reward = response.rewards.get(settings.accuracy)
    return None if reward is None else not math.isnan(reward) and reward >= settings.threshold


def _total(rewards: Mapping[str, float], settings: ViewSettings) -> float | None:
    weights = [*settings.reward_weights, *[1.0] * len(rewards)]
    known = [w * value for w, value in zip(weights, rewards.values(), strict=False) if is_number(value)]
    return math.fsum(known) if known else None


def _inside(numbers: Sequence[int], frames: int) -> list[int]:
    return sorted({number for number in numbers if 0 <= number < frames})


def _mean_heat(views: Sequence[Mapping[str, Any]], right: bool) -> list[int] | None:
    """(F,): mean brightness of the winners, or of the losers; None without any, or without attention."""
    rows = [view["heat"] for view in views if view["right"] is right and None not in view["heat"]]
    return [round(sum(column) / len(column)) for column in zip(*rows, strict=True)] if rows else None


def _description(views: Sequence[Mapping[str, Any]], times: Sequence[float], event: Sequence[int] | None) -> str:
    """The heat map as text, for screen readers."""
    parts = []
    for name, right in (("Right answers", True), ("Wrong answers", False)):
        mean_F = _mean_heat(views, right)
        if mean_F and max(mean_F) > 0:
            parts.append(f"{name} looked most at {_when(mean_F.index(max(mean_F)), times)}.")
    if event:
        parts.append(f"The answer is seen at {', '.join(_when(frame, times) for frame in event)}.")
    return " ".join(parts)


def _when(frame: int, times: Sequence[float]) -> str:
    return f"{round(times[frame], 2):g} s" if frame < len(times) and is_number(times[frame]) else f"frame {frame + 1}"
