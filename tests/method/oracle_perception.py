"""The method once more, in float64 and plain loops: slow, obvious, sharing no line with `appo.method.perception`.

Everything is a nested list or a NumPy array indexed by name: attn[i][j][f], mask[i][j], rewards[i],
log_probs[i][j][v]. Places that are padded are never read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

FLOOR = -70.0  # log-probability below which k3 reads no further
TOLERANCE = 1e-6  # spread of a frame's divergences that still counts as all equal


@dataclass
class Reference:
    """Every intermediate result, so that a test can say at which step two versions part."""

    scores: list[list[float]] = field(default_factory=list)  # [i][f]
    looked_at: list[set[int]] = field(default_factory=list)  # [i]
    crucial: list[int] = field(default_factory=list)  # ascending frames
    tokens: dict[int, list[list[int]]] = field(default_factory=dict)  # [f][i] -> positions
    divergence: dict[int, list[float]] = field(default_factory=dict)  # [f][k]
    level: dict[int, list[float]] = field(default_factory=dict)  # [f][k], after min-max
    weights: list[list[float]] = field(default_factory=list)  # [i][j]
    chosen: list[list[bool]] = field(default_factory=list)  # [i][j]


def highest(values: dict[int, float], count: int) -> list[int]:
    """The keys of the `count` largest values, best first; of equal ones the lower key first."""
    return sorted(values, key=lambda key: (-values[key], key))[:count]


def kl(rows: Sequence[Sequence[float]]) -> float:
    """Mean over the rows of KL(row || arithmetic mean of the rows), with 0 log 0 = 0."""
    total = 0.0
    for v in range(len(rows[0])):
        p = [math.exp(row[v]) for row in rows]
        m = math.fsum(p) / len(p)
        total += math.fsum(q * math.log(q / m) for q in p if q > 0)
    return max(total / len(rows), 0.0)


def k3(rows: Sequence[Sequence[float]]) -> float:
    """Mean over the rows of the sum over the vocabulary of exp(d) - d - 1, d = mean log p - log p."""
    total = 0.0
    for v in range(len(rows[0])):
        x = [max(row[v], FLOOR) for row in rows]
        m = math.fsum(x) / len(x)
        total += math.fsum(math.expm1(m - y) - (m - y) for y in x)
    return total / len(rows)


def minmax(values: list[float]) -> list[float]:
    if not values:
        return []
    low, high = min(values), max(values)
    if high - low <= TOLERANCE * max(1.0, high):
        return [0.0] * len(values)
    return [(value - low) / (high - low) for value in values]


def frames_of(looked_at: list[set[int]], rewards: Any, threshold: float, strategy: str) -> list[int]:
    winners: set[int] = set()
    losers: set[int] = set()
    for i, frames in enumerate(looked_at):
        if rewards[i] >= threshold:
            winners |= frames
        else:
            losers |= frames
    return sorted({"soft": winners, "hard": winners - losers, "all": winners | losers}[strategy])


def reference(
    attn: Any,
    mask: Any,
    rewards: Any,
    log_probs: Any,
    *,
    threshold: float = 0.5,
    strategy: str = "soft",
    score_tokens: int = 15,
    top_frames: int = 3,
    frame_tokens: int = 64,
    max_weight: float = 1.7,
    divergence: str = "kl",
) -> Reference:
    G, N, F = len(mask), len(mask[0]), len(attn[0][0])
    valid = [[j for j in range(N) if mask[i][j]] for i in range(G)]
    out = Reference()

    for i in range(G):
        scores = []
        for f in range(F):
            best = sorted((float(attn[i][j][f]) for j in valid[i]), reverse=True)[:score_tokens]
            scores.append(math.fsum(best) / len(best) if best else 0.0)
        out.scores.append(scores)
        out.looked_at.append(set(highest(dict(enumerate(scores)), top_frames)) if valid[i] else set())
    out.crucial = frames_of(out.looked_at, rewards, threshold, strategy)

    received: dict[tuple[int, int], list[float]] = {}
    for f in out.crucial:
        tokens = [sorted(highest({j: float(attn[i][j][f]) for j in valid[i]}, frame_tokens)) for i in range(G)]
        values = []
        for k in range(max(len(t) for t in tokens)):
            rows = [log_probs[i][tokens[i][k]] for i in range(G) if k < len(tokens[i])]
            values.append({"kl": kl, "k3": k3}[divergence](rows) if len(rows) > 1 else 0.0)
        level = minmax(values)
        for i in range(G):
            for k, j in enumerate(tokens[i]):
                received.setdefault((i, j), []).append(level[k])
        out.tokens[f], out.divergence[f], out.level[f] = tokens, values, level

    for i in range(G):
        means = [math.fsum(received.get((i, j), [])) / max(len(received.get((i, j), [])), 1) for j in range(N)]
        out.weights.append([1 + (max_weight - 1) * mean for mean in means])
        out.chosen.append([(i, j) in received for j in range(N)])
    return out
