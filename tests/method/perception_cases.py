"""Random groups to weigh, from plain to degenerate: shared by the method's tests."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from appo.method.perception import token_weights
from appo.types import PerceptionWeights
from tests.method.oracle_perception import Reference, reference


@dataclass(frozen=True)
class Settings:
    threshold: float = 0.5
    strategy: str = "soft"
    score_tokens: int = 15
    top_frames: int = 3
    frame_tokens: int = 64
    max_weight: float = 1.7
    divergence: str = "kl"


@dataclass(frozen=True)
class Case:
    """One random group and the settings to weigh it with."""

    attn_GNF: Tensor
    mask_GN: Tensor
    rewards_G: Tensor
    log_probs_GNV: Tensor
    settings: Settings

    def weigh(self) -> PerceptionWeights:
        tensors = (self.attn_GNF, self.mask_GN, self.rewards_G, self.log_probs_GNV)
        return token_weights(*tensors, **asdict(self.settings))

    def reference(self) -> Reference:
        tensors = (self.attn_GNF, self.mask_GN, self.rewards_G, self.log_probs_GNV.double())
        return reference(*(t.numpy() for t in tensors), **asdict(self.settings))


def random_log_probs(rng: np.random.Generator, shape: tuple[int, ...], zeros: bool) -> np.ndarray[Any, Any]:
    """Distributions from nearly equal to nearly one-hot, some words impossible if `zeros`."""
    logits = rng.normal(size=shape) * rng.choice([0.1, 1.0, 5.0], size=(*shape[:-1], 1))
    if zeros:
        impossible = rng.random(shape) < 0.4
        impossible[..., 0] &= ~impossible[..., 1:].all(axis=-1)  # never all of them
        logits[impossible] = -np.inf
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


def random_case(rng: np.random.Generator, kind: str = "plain", vocabulary: int | None = None) -> Case:
    """A small group of some kind of difficulty, with garbage in its padded places."""
    G, N, F = int(rng.integers(1, 6)), int(rng.integers(1, 13)), int(rng.integers(1, 6))
    V = vocabulary or int(rng.integers(2, 7))
    length = rng.integers(0 if kind == "empty" else 1, N + 1, size=G)
    attn = rng.integers(0, 4, size=(G, N, F)) / 8 if kind == "ties" else rng.random((G, N, F)) * 0.1
    rewards = {"all high": np.ones(G), "all low": np.zeros(G)}.get(kind, rng.choice([0.0, 0.1, 0.5, 0.9, 1.0], size=G))
    log_probs = random_log_probs(rng, (G, N, V), zeros=kind == "zeros")
    if kind == "same":  # all responses expect the same
        log_probs[:] = log_probs[:1, :1]
    mask = np.arange(N) < length[:, None]
    if kind == "holes":
        mask = rng.random((G, N)) < 0.6
    garbage = rng.choice([np.nan, np.inf, -np.inf, 7.0])
    attn[~mask], log_probs[~mask] = garbage, garbage
    return Case(
        attn_GNF=torch.tensor(attn, dtype=torch.float32),
        mask_GN=torch.tensor(mask),
        rewards_G=torch.tensor(rewards, dtype=torch.float32),
        log_probs_GNV=torch.tensor(log_probs),
        settings=Settings(
            threshold=float(rng.choice([0.0, 0.5, 1.0])),
            strategy=str(rng.choice(["soft", "hard", "all"])),
            score_tokens=int(rng.integers(1, 16)),
            top_frames=int(rng.integers(1, 8)),
            frame_tokens=int(rng.integers(1, 16)),
            max_weight=float(rng.choice([1.0, 1.2, 1.7, 3.0])),
            divergence=str(rng.choice(["kl", "k3"])),
        ),
    )


def long_case(frame_tokens: int) -> Case:
    rng = np.random.default_rng(7)
    mask = np.arange(100) < rng.integers(30, 101, size=8)[:, None]
    log_probs = random_log_probs(rng, (8, 100, 11), zeros=True)
    log_probs[~mask] = np.nan
    return Case(
        attn_GNF=torch.tensor(rng.random((8, 100, 6)), dtype=torch.float32),
        mask_GN=torch.tensor(mask),
        rewards_G=torch.tensor([1.0, 0.0] * 4),
        log_probs_GNV=torch.tensor(log_probs),
        settings=Settings(frame_tokens=frame_tokens),
    )


KINDS = ("plain", "ties", "zeros", "same", "all high", "all low", "empty", "holes")
seeds = st.integers(0, 2**32 - 1)
kinds = st.sampled_from(KINDS)
