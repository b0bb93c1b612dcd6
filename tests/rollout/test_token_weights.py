"""Weights beyond the paper's: a base for tokens no frame chose, and a mean of one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from appo.models.log_probs import score_group
from appo.rollout.token_weights import weigh, with_base
from appo.training.trl_batch import batch_weights
from tests.method.perception_cases import kinds, random_case, seeds
from tests.support.runs import clips, logged, make_trainer, rows_of
from tests.support.tiny import PromptShape, random_prompt, random_responses, tiny_model
from tests.training.resume_cases import begin, differences, go_on, killed_after, questions

OURS = {"frame_attention": "relative", "base_weight": 0.2, "normalize_weights": True}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return rows_of(clips(tmp_path_factory.mktemp("clips")))


# --- accuracy -----------------------------------------------------------------------------------------------------


def test_a_response_without_an_accuracy_counts_as_lost() -> None:
    """A reward function may leave a response out (NaN): it is no winner, so its frames are not crucial."""
    model, prompt = tiny_model(), random_prompt(PromptShape(videos=((4, 1, 2),)))
    with torch.no_grad():
        scores = score_group(model, prompt, random_responses([6, 5, 7]))
    few = {"score_tokens": 2, "top_frames": 1, "frame_tokens": 3}
    unscored, lost, won = (
        weigh(model, scores, torch.tensor([1.0, accuracy, 0.0]), **few) for accuracy in (float("nan"), 0.0, 1.0)
    )
    assert torch.equal(unscored.weights_GN, lost.weights_GN)
    assert torch.equal(unscored.crucial_F, lost.crucial_F)
    assert not torch.equal(unscored.crucial_F, won.crucial_F), "winning would change nothing, so nothing is proved"


# --- base weight --------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(seeds, kinds, st.floats(0.0, 1.0))
def test_the_base_weight_is_for_real_tokens_that_no_frame_chose(seed: int, kind: str, base: float) -> None:
    case = random_case(np.random.default_rng(seed), kind)
    paper = case.weigh()
    ours = with_base(paper, case.mask_GN, base)
    for i, row in enumerate(case.mask_GN.tolist()):
        for j, real in enumerate(row):
            applies = real and bool(paper.crucial_F.any()) and not paper.chosen_GN[i, j]
            assert float(ours.weights_GN[i, j]) == (pytest.approx(base) if applies else float(paper.weights_GN[i, j]))
    assert torch.equal(with_base(paper, case.mask_GN, 1.0).weights_GN, paper.weights_GN)


# --- mean one -----------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(seeds, st.integers(1, 4), st.floats(0.0, 1.0))
def test_normalised_weights_have_a_mean_of_one_and_keep_their_ratios(seed: int, groups: int, base: float) -> None:
    rng = np.random.default_rng(seed)
    case = random_case(rng)
    weights = [with_base(case.weigh(), case.mask_GN, base)] + [None] * (groups - 1)
    G, N = case.mask_GN.shape
    mask_BN = torch.cat([case.mask_GN, torch.tensor(rng.random(((groups - 1) * G, N)) < 0.7)]).long()
    plain, metrics = batch_weights(weights, mask_BN)
    ours, ours_metrics = batch_weights(weights, mask_BN, lambda row: row)
    real = mask_BN.bool()
    assert float(ours.double()[real].mean()) == pytest.approx(1.0, abs=1e-5)
    total, tokens = metrics["mean_weight"]
    torch.testing.assert_close(ours[real] * (total / tokens), plain[real], rtol=1e-5, atol=1e-6)
    assert torch.equal(ours[~real], plain[~real])
    assert ours_metrics == metrics, "metrics are of the weights before"


def test_the_mean_is_over_all_processes() -> None:
    """Two processes of one group each: 2 tokens with weights 1.7 and 0.3, 3 tokens of weight 1: mean 1."""
    case = random_case(np.random.default_rng(0))
    weights = replace(case.weigh(), weights_GN=torch.tensor([[1.7, 0.5]]), chosen_GN=torch.ones(1, 2).bool())
    other = torch.tensor([[3.0, 3.0]])  # what the other process sends: a sum of 3 over 3 tokens
    ours, _ = batch_weights([weights], torch.ones(1, 2), lambda row: torch.cat([row, other]))
    mean = (1.7 + 0.5 + 3) / 5
    assert ours[0].tolist() == pytest.approx([1.7 / mean, 0.5 / mean])


def test_a_batch_without_tokens_or_weights_stays_as_it_is() -> None:
    empty, _ = batch_weights([None], torch.zeros(2, 3), lambda row: row)
    assert torch.equal(empty, torch.ones(2, 3))
    case = random_case(np.random.default_rng(0))
    nothing = replace(case.weigh(), weights_GN=torch.zeros(2, 3), chosen_GN=torch.zeros(2, 3).bool())
    zeros, _ = batch_weights([nothing], torch.ones(2, 3), lambda row: row)
    assert torch.equal(zeros, torch.zeros(2, 3)), "no division by zero"


# --- through the trainer ------------------------------------------------------------------------------------------


def test_equal_weights_with_a_mean_of_one_are_dapo_bit_for_bit(tmp_path, dataset) -> None:
    flat = {"method": "appo", "max_weight": 1.0, "frame_attention": "relative", "normalize_weights": True}
    ours = make_trainer(tmp_path / "ours", dataset, max_steps=2, **flat)
    ours.train()
    dapo = make_trainer(tmp_path / "dapo", dataset, max_steps=2, method="dapo")
    dapo.train()
    assert logged(ours, "loss") == logged(dapo, "loss")
    assert any(loss != 0 for loss in logged(dapo, "loss"))
    for a, b in zip(ours.model.parameters(), dapo.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_trainer_weighs_with_the_frames_usual_shares(tmp_path, dataset) -> None:
    trainer = make_trainer(tmp_path, dataset, method="appo", max_steps=2, score_tokens=2, top_frames=1, frame_tokens=2,
                           **OURS)  # fmt: skip
    seen: list = []
    trainer.on_rollout = lambda step, groups: seen.append(groups)
    trainer.train()
    assert float(trainer.pipeline.weigher.shares.mean(8).sum()) == pytest.approx(1.0)
    for weight, groups in zip(logged(trainer, "appo/mean_weight"), seen, strict=True):
        weights = torch.cat([group.weights.weights_GN[group.scores.mask_GN] for group in groups])
        assert float(weights.mean()) == pytest.approx(weight, rel=1e-4)
        assert float(weights.min()) == pytest.approx(0.2)
    group = seen[-1][0]
    raw = replace(trainer.pipeline.weigher, frame_attention="raw")(trainer.model, replace(group, weights=None))
    assert not torch.equal(raw.weights.weights_GN, group.weights.weights_GN), "relative attention changed nothing"


def test_a_run_with_relative_attention_resumes_exactly_and_needs_its_shares(tmp_path) -> None:
    rows = rows_of(questions(tmp_path / "clips"))
    few = {"max_steps": 4, "score_tokens": 2, "top_frames": 1, "frame_tokens": 2}
    whole = begin(tmp_path / "whole", rows, **few, **OURS)
    resumed = go_on(killed_after(tmp_path / "whole", tmp_path / "from-2", 2), rows, **few, **OURS)
    assert differences(resumed, whole) == []
    first, later = whole.pipeline.weigher.shares, resumed.pipeline.weigher.shares
    assert torch.equal(first.mean(8), later.mean(8))
    forgetful = killed_after(tmp_path / "whole", tmp_path / "without", 2)
    file = forgetful / "checkpoint-2" / "state-0.pt"
    state, size = torch.load(file, weights_only=True), file.stat().st_size
    assert state.pop("frame shares")["frames"] == [8]
    torch.save(state, file)
    manifest = file.with_name("manifest.json")
    manifest.write_text(manifest.read_text().replace(f'"state-0.pt": {size}', f'"state-0.pt": {file.stat().st_size}'))
    assert not torch.equal(go_on(forgetful, rows, **few, **OURS).pipeline.weigher.shares.mean(8), first.mean(8))
