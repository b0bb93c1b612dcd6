"""The benchmark of first steps: gradients against another path, estimates against simulated truth, at tiny size."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from appo.models.log_probs import score_group
from appo.world import generate, load_policy
from tests.support.svg import curves_of, words_of

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import credit


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    model, processor = load_policy()
    model.eval().base_model.visual.requires_grad_(False)
    torch.manual_seed(0)
    questions = generate(tmp_path_factory.mktemp("clips"), "L1", 16, 0)
    batch = next(credit.mixed_groups(model, processor, iter(questions), 2, 4))
    return model, processor, batch


def test_batches_hold_mixed_groups_only(world) -> None:
    _, _, batch = world
    assert len(batch) == 2
    for asked in batch:
        assert len(asked.ids_G) == len(asked.group.samples) == 4
        assert 0 < asked.accuracy_G.sum() < 4
        assert [sample.ids for sample in asked.group.samples] == [ids.tolist() for ids in asked.ids_G]


def test_gradients_are_those_of_the_losses_written_out(world) -> None:
    """Ordinary rows instead of packed groups, losses summed token by token."""
    model, processor, batch = world
    ways = [credit.way_of(name) for name in ("dapo", "appo", "oracle-tokens")]
    weights = credit.Weighed(ways, model, processor.tokenizer, 0)(batch)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found_MP = credit.gradients(model, batch, weights, parameters)
    tokens = sum(len(ids) for asked in batch for ids in asked.ids_G)
    for m in range(4):
        objective = torch.zeros(())
        for q, asked in enumerate(batch):
            scores = score_group(model, asked.group.prompt, asked.ids_G, capture_layers=0, shared_prefix=False)
            for i, ids in enumerate(asked.ids_G):
                others = [float(r) for k, r in enumerate(asked.accuracy_G) if k != i]
                for j in range(len(ids)):
                    if m == 3:  # the reward's: a response against the mean of the others
                        factor = (float(asked.accuracy_G[i]) - sum(others) / 3) / (4 * 2)
                    else:
                        spread = float(asked.accuracy_G.std()) + 1e-4
                        advantage = (float(asked.accuracy_G[i]) - float(asked.accuracy_G.mean())) / spread
                        factor = float(weights[m][q][i, j]) * advantage / tokens
                    objective = objective + factor * scores.log_probs_GN[i, j]
        own = torch.cat([part.flatten() for part in torch.autograd.grad(objective, parameters)])
        torch.testing.assert_close(found_MP[m], own, rtol=2e-3, atol=2e-5)
    assert found_MP[1].sub(found_MP[0]).abs().max() > 1e-4, "weights do something"


def test_credit_is_the_share_of_weight_on_the_words_that_decide(world) -> None:
    model, processor, batch = world
    names = ("dapo", "appo", "oracle-tokens", "shuffled")
    weights = credit.Weighed([credit.way_of(name) for name in names], model, processor.tokenizer, 0)(batch)
    shares = dict(zip(names, credit.credit_shares(batch, weights, processor.tokenizer), strict=True))
    assert shares["oracle-tokens"] == pytest.approx(1.0)
    decisive = sum(int((own > 0).sum()) for own in weights[2])
    tokens = sum(len(ids) for asked in batch for ids in asked.ids_G)
    assert shares["dapo"] == pytest.approx(decisive / tokens)
    assert 0.02 < shares["dapo"] < 0.12


def test_estimates_find_the_truth_of_simulated_gradients() -> None:
    """dapo: R with noise; half: R with half the noise; astray: half of R turned away; none: noise alone."""
    generator = torch.Generator().manual_seed(0)
    P, B, per_block = 4000, 40, 2
    reward_P = torch.randn(P, generator=generator) * 0.1
    away_P = torch.randn(P, generator=generator) * 0.1
    names = ["dapo", "half", "astray", "none", "R"]
    means_MP = torch.stack([reward_P, reward_P, (reward_P + away_P) / 2, 0 * reward_P, reward_P])
    noise_M1 = torch.tensor([1.0, 0.5, 0.5, 1.0, 1.0])[:, None]
    blocks = credit.Blocks()
    for _ in range(B):
        blocks.add([means_MP + noise_M1 * torch.randn(5, P, generator=generator) for _ in range(per_block)])
    found = credit.estimates(blocks, names, per_block)

    def truth(m: int) -> float:
        rms_P = (means_MP[m] ** 2 + noise_M1[m] ** 2).sqrt()
        return float((reward_P * means_MP[m] / rms_P).sum())

    for m, name in enumerate(names[:4]):
        own = found[name]
        assert own["low"] <= truth(m) / truth(0) <= own["high"], name
        assert own["high"] - own["low"] < 0.8
    assert (found["dapo"]["gain"], found["dapo"]["low"], found["dapo"]["high"]) == (1, 1, 1)
    cosine = float(torch.cosine_similarity(means_MP[2], reward_P, dim=0))
    assert found["astray"]["cosine"] == pytest.approx(cosine, abs=0.15)
    assert found["half"]["cosine"] == pytest.approx(1.0, abs=0.15)
    signal = float(reward_P.square().sum() / (reward_P.square().sum() + 0.25 * P))
    assert found["half"]["signal"] == pytest.approx(signal, rel=0.3)


def test_products_of_different_blocks_by_hand() -> None:
    products = torch.tensor([[[9.0, 1, 2], [3, 9, 4], [5, 6, 9]]])
    assert credit.apart(products).tolist() == [(1 + 2 + 3 + 4 + 5 + 6) / 6]
    assert credit.apart(products, without=1).tolist() == [(2 + 5) / 2]


@pytest.mark.parametrize(("freedom", "quantile"), [(2, 4.302653), (11, 2.200985), (100, 1.983972)])
def test_quantiles_of_student(freedom: int, quantile: float) -> None:
    assert credit.student_t(freedom) == pytest.approx(quantile, abs=2e-3)


def test_weightings_are_those_of_appo_compare_as_far_as_weights_go() -> None:
    assert len(credit.usual_ways()) == len(set(credit.usual_ways())) == 32
    assert credit.way_of("dapo").weigher is None
    changed = credit.way_of("appo+attention_layers=1+frame_tokens=4")
    assert changed.layers == 1
    assert changed.weigher is not None
    assert changed.weigher.settings["frame_tokens"] == 4
    assert credit.way_of("appo-relative").weigher.frame_attention == "relative"  # type: ignore[union-attr]
    for name in ("grpo", "sft", "appo+learning_rate=0.1", "entropy"):
        with pytest.raises(ValueError, match=r"only ways of weighting tokens"):
            credit.way_of(name)
    with pytest.raises(ValueError, match="unknown method 'ppo'"):
        credit.way_of("ppo")


def test_the_committed_curves_are_of_the_committed_numbers() -> None:
    results = Path(credit.__file__).parent / "results"
    curves = credit.drawn(json.loads((results / "credit.json").read_text())["ways"])
    committed, words = (results / "credit.svg").read_text(), words_of(curves)
    assert words_of(committed) == words
    found, expected = curves_of(curves), curves_of(committed)
    assert found.keys() == expected.keys()
    for name, points in expected.items():  # another matplotlib may round the last digit otherwise
        np.testing.assert_allclose(found[name], points, atol=0.01)
    for setting in (*credit.ONE_AT_A_TIME, "strategy", "divergence"):
        assert f"appo: {setting}, gain of a first step over dapo's" in words


def test_the_whole_benchmark_at_tiny_size(tmp_path, capsys) -> None:
    output = tmp_path / "credit.json"
    words = "--blocks 3 --batches 1 --groups 2 --responses 4 --ways dapo,appo,random-frames --output"
    result = credit.main([*words.split(), str(output)])
    assert json.loads(output.read_text())["ways"].keys() == {"dapo", "appo", "random-frames", "R"}
    assert result["ways"]["dapo"]["gain"] == 1
    assert all(math.isfinite(result["ways"]["appo"][key]) for key in ("gain", "low", "high", "signal", "credit"))
    assert result["settings"]["responses"] == 4
    out = capsys.readouterr().out
    assert not output.with_suffix(".svg").exists(), "no two of them differ in one setting"
    assert "block 3 of 3" in out
    assert "| random-frames" in out
