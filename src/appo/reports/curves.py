"""A run's metrics and settings -> the curves, tables and facts of its page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from appo.reports.group_view import NAME_LENGTH, clean, is_number, rounded
from appo.types import STEP_PARTS

MOST_POINTS = 400  # of a curve (not in the paper: more than a screen has pixels for)


@dataclass(frozen=True)
class Curve:
    """A curve of the page: the first of `sources` that a run's metrics have, under a readable name."""

    name: str
    sources: tuple[str, ...]
    meaning: str


CURVES = (
    Curve("reward", ("resampling/first_round_reward", "reward"), "mean total reward, before groups are replaced"),
    Curve("accuracy", ("rewards/accuracy_reward/mean",), "share of right answers among the groups trained on"),
    Curve("loss", ("loss",), "what the optimiser minimises"),
    Curve("token accuracy", ("mean_token_accuracy",), "share of tokens the policy would have chosen itself"),
    Curve("entropy", ("entropy",), "nats a token: how open the policy still is"),
    Curve("gradient norm", ("grad_norm",), "before clipping"),
    Curve("mean token weight", ("appo/mean_weight",), "1 is DAPO"),
    Curve("crucial frames a group", ("appo/crucial_frames",), "frames that winners attend to"),
    Curve("response length", ("completions/mean_length",), "tokens"),
    Curve("flat groups", ("resampling/flat_groups",), "share of groups with equal rewards, which train nothing"),
)
HIDDEN_FOR_RL = {"loss"}  # meaningless for a policy gradient

# The paper's settings (recipes/seed-bench-r1-7b.yaml has where each is from).
PAPER: dict[str, Any] = {
    "method": "appo",
    "num_generations": 8,
    "learning_rate": 1e-6,
    "temperature": 1.0,
    "max_completion_length": 384,
    "video_fps": 1.0,
    "video_max_frames": 16,
    "strategy": "soft",
    "threshold": 0.5,
    "score_tokens": 15,
    "top_frames": 3,
    "frame_tokens": 64,
    "max_weight": 1.7,
    "divergence": "kl",
    "attention_layers": 3,
    "epsilon": 0.2,
    "epsilon_high": 0.28,
    "beta": 0.0,
    "reward_weights": [0.9, 0.1],
    "freeze_vision_tower": True,
}
# Other settings of the page.
OWN = ("model", "dataset", "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "seed")


def curve_points(metrics: Sequence[Mapping[str, Any]], sources: Sequence[str]) -> dict[str, Any] | None:
    """The points of a curve: ``steps`` and ``values`` of equal length, ascending; None if there are none.

    Of a step measured twice (a resumed run) the later line counts. Long curves are means of neighbours: ``each`` says
    of how many.
    """
    for source in sources:
        points: dict[float, float] = {}
        for line in metrics:
            step, value = line.get("step"), line.get(source)
            if is_number(step) and is_number(value):
                points[step] = value
        if points:
            return _thinned(sorted(points.items()))
    return None


def _thinned(points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    each = -(-len(points) // MOST_POINTS)
    parts = [points[start : start + each] for start in range(0, len(points), each)]
    return {
        "steps": [rounded(part[-1][0], 9) for part in parts],
        "values": [rounded(sum(value for _, value in part) / len(part), 4) for part in parts],
        "each": each,
    }


def run_curves(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All curves of a run by name, one for each accuracy measured during training (``eval_...``)."""
    supervised = any("mean_token_accuracy" in line for line in metrics)
    found: dict[str, Any] = {}
    for curve in (*CURVES, *_evaluated(metrics)):
        points = curve_points(metrics, curve.sources)
        if points and (supervised or curve.name not in HIDDEN_FOR_RL):
            found[curve.name] = {"meaning": curve.meaning, **points, "says": _summary(curve.name, points)}
    return found


def _evaluated(metrics: Sequence[Mapping[str, Any]]) -> Iterator[Curve]:
    names = {name for line in metrics for name in line if name.startswith("eval_") and "accuracy" in name}
    for name in sorted(names)[:8]:
        yield Curve(clean(name, NAME_LENGTH), (name,), "measured during training")


def _summary(name: str, points: Mapping[str, Any]) -> str:
    values, steps = points["values"], points["steps"]
    return f"{name}: {values[0]:.3g} at step {steps[0]:g}, {values[-1]:.3g} at step {steps[-1]:g}"


def run_times(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Where the seconds of a step went: mean of each part over the run, largest first, with its share."""
    means = {}
    for part in STEP_PARTS:
        values = [line[f"time/{part}"] for line in metrics if is_number(line.get(f"time/{part}"))]
        if values:
            means[part] = max(0.0, sum(values) / len(values))
    whole = sum(means.values()) or 1.0
    ordered = sorted(means.items(), key=lambda item: -item[1])
    return [
        {"part": part, "seconds": rounded(seconds, 3), "share": rounded(100 * seconds / whole, 3)}
        for part, seconds in ordered
    ]


def run_levels(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Accuracy of each level before and after training, in per cent with its interval, as the demo measures it."""
    before, after = (evaluation.get(when) for when in ("before", "after"))
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return []
    pairs = {clean(level, NAME_LENGTH): (_accuracy(before[level]), _accuracy(after.get(level))) for level in before}
    return [{"level": level, "before": old, "after": new} for level, (old, new) in pairs.items() if old and new]


def _accuracy(summary: Any) -> dict[str, Any] | None:
    if not isinstance(summary, dict):
        return None
    numbers: list[Any] = [summary.get(name) for name in ("mean", "low", "high", "questions")]
    if not all(is_number(number) and number >= 0 for number in numbers) or not max(numbers[:3]) <= 1:
        return None
    mean, low, high = (round(100 * float(number), 1) for number in numbers[:3])
    return {"mean": mean, "low": low, "high": high, "questions": int(numbers[3])}


def run_settings(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The settings beside the paper's: ``name, value, paper`` (None: the paper has no such setting), ``same``."""
    return [
        {
            "name": name,
            "value": clean(_text(settings[name]), NAME_LENGTH),
            "paper": None if (paper := PAPER.get(name)) is None else _text(paper),
            "same": paper is None or settings[name] == paper,
        }
        for name in (*PAPER, *OWN)
        if settings.get(name) is not None
    ]


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "not set"}[value]
    if isinstance(value, float) and is_number(value):
        return f"{value:g}"
    return " : ".join(map(_text, value)) if isinstance(value, list) else str(value)


def run_facts(about: Mapping[str, Any], settings: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> list[Any]:
    """What a run is, as pairs of name and text: method, steps, command, start, versions."""
    steps = [line["step"] for line in metrics if is_number(line.get("step"))]
    versions, argv = about.get("versions"), about.get("argv")
    known = versions.items() if isinstance(versions, dict) else ()
    facts = {
        "method": settings.get("method"),
        "steps": f"{max(steps):g}" if steps else None,
        "started": about.get("started"),
        "command": " ".join(map(str, argv)) if isinstance(argv, list) else None,
        "commit": about.get("git_commit"),
        "versions": ", ".join(f"{name} {version}" for name, version in known if version),
        "machine": about.get("platform"),
    }
    return [[name, clean(str(value), 2 * NAME_LENGTH)] for name, value in facts.items() if value]
