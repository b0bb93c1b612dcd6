"""How good a step each way of weighting tokens makes, before anything is trained.

    python benchmarks/credit.py                              # level L1
    python benchmarks/credit.py --level L3 --output benchmarks/results/credit-L3.json

Every method of the family makes a gradient of one form, the sum over tokens of weight x advantage x gradient of the
log-probability, so all of them can be made from the same responses of the same policy. Estimated are:

R       the gradient of the expected reward: weight 1, and as advantage a response's reward minus the others' mean,
        which is unbiased
gain    what a step of Adam along a method's gradient g wins to first order, sum_k R_k E[g_k] / sqrt(E[g_k^2]), over
        the same for DAPO. Adam makes it independent of the weights' scale; noise or a wrong direction make it smaller
cosine  between E[g] and R: whether the direction is right
signal  |E[g]|^2 / E[|g|^2] of one batch: how much of a gradient is not noise
credit  the share of all weight that lies on the words that decide (the oracle's)

Products of two means are taken between different blocks of batches, so that their noise does not meet. Intervals: 95 %
by Student's t, from leaving out one block at a time. Groups whose rewards are all equal add nothing and are left out.

Shape suffixes: G responses, N response tokens (padded), M ways and last R, P parameters, B blocks.
"""

from __future__ import annotations

import harness  # first: it sets OpenMP's waiting before torch loads

# isort: split
import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from scipy.special import stdtrit
from torch import Tensor

from appo.experiments.compare.cells import setting_of
from appo.experiments.compare.measurements import decisive_words
from appo.experiments.compare.methods import Variant, World, variant_of
from appo.experiments.compare.report import ablation_curves, ablations
from appo.experiments.figures import require_matplotlib
from appo.models.loading import load_model
from appo.models.log_probs import log_probs_at, score_group
from appo.rewards.functions import score_answer
from appo.rollout.generation import generate
from appo.rollout.token_weights import Weigher
from appo.training.config import APPOConfig
from appo.types import Group, GroupScores, Sample, VideoQA
from appo.world import generate as generate_clips
from appo.world import policy_path
from appo.world.policy import MAX_NEW_TOKENS, WORLD_WEIGHTS, prompt_of

LAYERS = 3  # the paper's
STD_EPSILON = 1e-4  # TRL's, under the standard deviation of a group's rewards
METHODS = (
    "dapo", "appo", "appo-hard", "appo-all", "appo-k3", "relative-only", "appo-relative", "raw-base", "raw-select",
    "shuffled", "appo-shuffled", "random-frames", "oracle-frames", "oracle-tokens", "tw-grpo",
)  # fmt: skip
ONE_AT_A_TIME: dict[str, Sequence[Any]] = {
    "score_tokens": (1, 4, 15, 30), "top_frames": (1, 3, 4), "frame_tokens": (2, 4, 16, 32),
    "max_weight": (1.2, 2.0, 4.0), "attention_layers": (1, 2, 4),
}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """One way to weight tokens: a variant of `appo compare`, as far as its weights go."""

    name: str
    variant: Variant
    layers: int
    weigher: Weigher | None  # None: every token alike


def way_of(name: str) -> Way:
    """By name, as `appo compare` takes it.

    Raises:
        ValueError: there is no such variant, or it differs in more than its weights.
    """
    variant = variant_of(name)
    settings = {**WORLD_WEIGHTS, **variant.settings}
    layers = settings.pop("attention_layers", LAYERS)
    if name == "dapo":
        return Way(name, variant, layers, None)
    config = APPOConfig("unused", method="appo", use_cpu=True, bf16=False, report_to="none", **settings)
    others = set(settings) - {*config.weight_settings, "frame_attention", "normalize_weights"}
    if variant.method != "appo" or others:
        raise ValueError(
            f"{name}: only ways of weighting tokens are compared here, not {variant.method} {others or ''}"
        )
    return Way(name, variant, layers, Weigher(config.weight_settings, frame_attention=config.frame_attention))


def usual_ways() -> list[str]:
    """All of `METHODS`, and each setting of the published one varied alone."""
    return [*METHODS, *(f"appo+{key}={value}" for key, values in ONE_AT_A_TIME.items() for value in values)]


@dataclass
class SampledGroup:
    """A group before it is weighed, and its scores by number of captured layers."""

    group: Group
    ids_G: list[Tensor]
    accuracy_G: Tensor
    scores: dict[int, GroupScores] = field(default_factory=dict)


def mixed_groups(
    model: Any, processor: Any, questions: Iterator[VideoQA], count: int, responses: int
) -> Iterator[list[SampledGroup]]:
    """Batches of `count` groups with right and wrong responses, without end."""
    kept: list[SampledGroup] = []
    while True:
        while len(kept) < count:
            kept += [asked for asked in ask(model, processor, [next(questions) for _ in range(16)], responses)
                     if 0 < asked.accuracy_G.sum() < responses]  # fmt: skip
        yield kept[:count]
        kept = kept[count:]


@torch.no_grad()
def ask(model: Any, processor: Any, questions: Sequence[VideoQA], responses: int) -> list[SampledGroup]:
    """A group of sampled responses to each question."""
    prompts = [prompt_of(processor, question) for question in questions]
    groups = generate(model, processor, prompts, max_new_tokens=MAX_NEW_TOKENS, responses=responses)
    made = []
    for question, prompt, ids_G in zip(questions, prompts, groups, strict=True):
        texts = processor.batch_decode(ids_G, skip_special_tokens=True)
        right_G = torch.tensor([score_answer(text, question.answer, question.kind) for text in texts])
        rated = zip(ids_G, texts, right_G, strict=True)
        samples = [Sample(ids.tolist(), text, right[None]) for ids, text, right in rated]
        made.append(SampledGroup(Group({}, question, prompt, samples=samples), ids_G, right_G))
    return made


class Weighed:
    """The weights of all ways, batch after batch, as a trainer would make them: relative attention remembers."""

    def __init__(self, ways: Sequence[Way], model: Any, tokenizer: Any, seed: int) -> None:
        self.ways, self._model, self._tokenizer = ways, model, tokenizer
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def __call__(self, batch: Sequence[SampledGroup]) -> list[list[Tensor]]:
        """For each way the (G, N) weights of each group, divided by their mean over the batch where it says so."""
        for asked in batch:
            for layers in sorted({LAYERS, *(way.layers for way in self.ways)}):
                asked.scores[layers] = score_group(self._model, asked.group.prompt, asked.ids_G, capture_layers=layers)
        return [self._of(way, batch) for way in self.ways]

    def _of(self, way: Way, batch: Sequence[SampledGroup]) -> list[Tensor]:
        masks = [asked.scores[LAYERS].mask_GN for asked in batch]
        if way.weigher is None:
            return [mask_GN.float() for mask_GN in masks]
        groups = [replace(asked.group, scores=asked.scores[way.layers]) for asked in batch]
        way.weigher.remember(groups, lambda own: [own])
        made = [way.weigher(self._model, group).weights for group in groups]
        if way.variant.control is not None:
            world = World(way.weigher, lambda s: log_probs_at(self._model, s), self._tokenizer, self._generator)
            pairs = zip(groups, made, strict=True)
            made = [way.variant.control(replace(group, weights=own), world) for group, own in pairs]
        weights = [own.weights_GN * mask_GN for own, mask_GN in zip(made, masks, strict=True) if own is not None]
        mean = sum(float(own.sum()) for own in weights) / sum(int(mask_GN.sum()) for mask_GN in masks)
        return [own / mean for own in weights] if way.variant.settings.get("normalize_weights") else weights


def gradients(
    model: Any, batch: Sequence[SampledGroup], weights: Sequence[Sequence[Tensor]], parameters: Sequence[Tensor]
) -> Tensor:
    """(M, P): the gradient of this batch by each way, to ascend, and last an unbiased estimate of the reward's."""
    total_MP = torch.zeros(len(weights) + 1, sum(p.numel() for p in parameters))
    tokens = sum(int(asked.scores[LAYERS].mask_GN.sum()) for asked in batch)
    for q, asked in enumerate(batch):
        log_probs_GN = score_group(model, asked.group.prompt, asked.ids_G, capture_layers=0).log_probs_GN
        G, right_G = len(asked.ids_G), asked.accuracy_G
        advantages_G = (right_G - right_G.mean()) / (right_G.std() + STD_EPSILON)
        unbiased_G = (right_G - right_G.mean()) * G / (G - 1)
        factors = [own[q] * advantages_G[:, None] / tokens for own in weights]
        factors.append(unbiased_G[:, None] / (G * len(batch)) * asked.scores[LAYERS].mask_GN)
        for m, factor_GN in enumerate(factors):
            parts = torch.autograd.grad(log_probs_GN, parameters, factor_GN, retain_graph=m + 1 < len(factors))
            total_MP[m] += torch.cat([part.flatten() for part in parts])
    return total_MP


@dataclass
class Blocks:
    """Gradients summed over the batches of each block, and their squares over all."""

    sums_BMP: list[Tensor] = field(default_factory=list)
    squares_MP: Tensor | float = 0.0
    batches: int = 0

    def add(self, gradients_MP: Sequence[Tensor]) -> None:
        """Take a block's batches in."""
        self.sums_BMP.append(torch.stack(list(gradients_MP)).sum(dim=0))
        for gradient_MP in gradients_MP:
            self.squares_MP = self.squares_MP + gradient_MP.square()
            self.batches += 1

    def products(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """float64: (M, B, B) of blocks' Adam steps with R, of gradients with R, with one another; (M,) mean squares."""
        assert isinstance(self.squares_MP, Tensor)
        steps, plain, own = [], [], []
        for m, squares_P in enumerate(self.squares_MP):
            rms_P = (squares_P / self.batches).sqrt()
            sums_BP = torch.stack([sums_MP[m] for sums_MP in self.sums_BMP])
            reward_BP = torch.stack([sums_MP[-1] for sums_MP in self.sums_BMP])
            step_BP = torch.where(rms_P > 0, sums_BP / rms_P, 0.0)
            steps.append((step_BP @ reward_BP.T).double())
            plain.append((sums_BP @ reward_BP.T).double())
            own.append((sums_BP @ sums_BP.T).double())
        mean_square_M = self.squares_MP.double().sum(dim=1) / self.batches
        return torch.stack(steps), torch.stack(plain), torch.stack(own), mean_square_M


def apart(products_MBB: Tensor, without: int | None = None) -> Tensor:
    """(M,): mean product of two different blocks, one left out or none."""
    kept = [b for b in range(products_MBB.shape[1]) if b != without]
    products_MBB = products_MBB[:, kept][:, :, kept]
    B = len(kept)
    total_M = products_MBB.sum(dim=(1, 2)) - products_MBB.diagonal(dim1=1, dim2=2).sum(dim=1)
    return total_M / (B * (B - 1))


def estimates(blocks: Blocks, names: Sequence[str], per_block: int) -> dict[str, dict[str, float]]:
    """Of every way: ``gain`` with ``low`` and ``high``, ``cosine`` and ``signal``."""
    steps_MBB, plain_MBB, own_MBB, mean_square_M = blocks.products()
    base, B = names.index("dapo"), len(blocks.sums_BMP)

    def gains(without: int | None) -> Tensor:
        step_M = apart(steps_MBB, without)
        return step_M / step_M[base]

    gain_M, left_out_BM = gains(None), torch.stack([gains(b) for b in range(B)])
    # The jackknife's standard error (Tukey 1958).
    error_M = ((left_out_BM - left_out_BM.mean(dim=0)).square().sum(dim=0) * (B - 1) / B).sqrt()
    half_M = error_M * student_t(B - 1)
    with_reward_M, length_M = apart(plain_MBB), apart(own_MBB)
    cosine_M = with_reward_M / (length_M * length_M[-1]).clamp(min=0).sqrt()
    signal_M = length_M / per_block**2 / mean_square_M
    return {
        name: {
            "gain": float(gain_M[m]), "low": float(gain_M[m] - half_M[m]), "high": float(gain_M[m] + half_M[m]),
            "cosine": float(cosine_M[m]), "signal": float(signal_M[m]),
        }
        for m, name in enumerate(names)
    }  # fmt: skip


def student_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t."""
    return float(stdtrit(freedom, 0.975))


def credit_shares(batch: Sequence[SampledGroup], weights: Sequence[Sequence[Tensor]], tokenizer: Any) -> list[float]:
    """For each way the share of its weight on the words that decide."""
    decisive = []
    for asked in batch:
        words = [[tokenizer.decode([token]).strip() for token in ids] for ids in asked.ids_G]
        rows = [torch.tensor(decisive_words(row)) for row in words]
        decisive.append(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))
    return [
        float(sum((w * d).sum() for w, d in zip(own, decisive, strict=True)) / sum(w.sum() for w in own))
        for own in weights
    ]


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All blocks; prints the table after each."""
    model, processor = load_model(args.policy)
    model.eval().base_model.visual.requires_grad_(False)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    names = args.ways.split(",") if args.ways else usual_ways()
    ways = [way_of(name) for name in names]
    clips = generate_clips(folder, args.level, 4 * args.blocks * args.batches * args.groups, args.seed)
    batches = mixed_groups(model, processor, iter(clips), args.groups, args.responses)
    weighed, blocks, credit = Weighed(ways, model, processor.tokenizer, args.seed), Blocks(), []
    began = time.monotonic()
    found: dict[str, dict[str, float]] = {}
    for block in range(args.blocks):
        gradients_MP = []
        for batch in (next(batches) for _ in range(args.batches)):
            weights = weighed(batch)
            credit.append(credit_shares(batch, weights, processor.tokenizer))
            gradients_MP.append(gradients(model, batch, weights, parameters))
        blocks.add(gradients_MP)
        left = (time.monotonic() - began) / (block + 1) * (args.blocks - block - 1)
        print(f"block {block + 1} of {args.blocks}, about {left / 60:.0f} min left", flush=True)
        if block >= 2:
            found = estimates(blocks, [*names, "R"], args.batches)
            for name, share in zip(names, torch.tensor(credit).mean(dim=0).tolist(), strict=True):
                found[name]["credit"] = share
    return found


def drawn(found: Mapping[str, Mapping[str, float]]) -> str:
    """The gains of ways that differ in one setting, as an SVG of curves; empty where there are none."""
    gains = {name: {"gain": (own["gain"], own["low"], own["high"])} for name, own in found.items() if name != "R"}
    ablated = ablations(list(gains), setting_of)
    return ablation_curves(ablated, gains, "gain of a first step over dapo's", level=1.0) if ablated else ""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, write the JSON."""
    parser = harness.base_parser(str(__doc__), "credit")
    parser.add_argument("--level", default="L1", help="of the clips (default L1)")
    parser.add_argument("--policy", type=Path, default=policy_path(), help="folder (default: the shipped one)")
    parser.add_argument("--blocks", type=int, default=12, help="at least 3 (default 12)")
    parser.add_argument("--batches", type=int, default=3, help="of each block (default 3)")
    parser.add_argument("--groups", type=int, default=16, help="of each batch (default 16)")
    parser.add_argument("--responses", type=int, default=8, help="of each group (default 8)")
    parser.add_argument(
        "--ways", help="methods of appo compare, comma between, dapo among them (default: about thirty)"
    )
    args = parser.parse_args(argv)
    require_matplotlib()
    harness.prepare(args)
    result = harness.provenance(args, sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args, Path(folder))
    keys = ("level", "blocks", "batches", "groups", "responses", "seed")
    result |= {"settings": {key: getattr(args, key) for key in keys}, "ways": found}
    columns = ("gain", "low", "high", "cosine", "signal", "credit")
    rows = [[name, *(harness.shown(own.get(key)) for key in columns)] for name, own in found.items()]
    harness.print_table("a first step, against dapo's", ["way", *columns], rows)
    harness.write_json(args.output, result)
    if curves := drawn(found):
        args.output.with_suffix(".svg").write_text(curves, encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
