"""Dropout is for gradients only: sampling, scoring, old and reference log-probabilities are those of one policy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from recipes.tiny_policy.build import build_policy

from appo import APPOConfig, APPOTrainer
from appo.data.table import question_of
from appo.types import Group, Sample
from tests.support.runs import FAST, accuracy_reward, clips, logged, rows_of

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return rows_of(clips(tmp_path_factory.mktemp("clips")))


def make(folder: Any, dataset: Dataset, **settings: Any) -> APPOTrainer:
    """A policy whose adapters do something from the first pass on, with much dropout."""
    model, processor = build_policy(0)
    args = APPOConfig(str(folder), **{**FAST, "max_steps": 2, **settings})
    config = peft.LoraConfig(
        target_modules=r".*language_model.*(q_proj|v_proj|down_proj)", r=4, lora_dropout=0.2, init_lora_weights=False
    )
    torch.manual_seed(0)
    return APPOTrainer(
        model, accuracy_reward, args, train_dataset=dataset, processing_class=processor, peft_config=config
    )


def test_identical_responses_have_weights_of_exactly_one(tmp_path, dataset):
    """Dropout made their distributions differ, and that difference is what the weights are made of."""
    trainer = make(tmp_path, dataset, method="appo")
    prompt = trainer.encoder.read(trainer.base_model, dataset[0]["prompt"])
    samples = [Sample([40, 41, 42, 43, 44, 45], "", torch.tensor([float(number % 2)])) for number in range(4)]
    group = Group({}, question_of(dataset[0]), prompt, samples=samples)
    trainer.model.train()
    before = torch.get_rng_state()
    (group,) = trainer.pipeline.score([group])
    scores = group.scores
    assert torch.equal(torch.get_rng_state(), before), "scoring drew random numbers of training"
    assert trainer.model.training
    (group,) = trainer.pipeline.weigh([group])
    weights = group.weights
    assert weights.crucial_F.any()
    assert weights.chosen_GN.any()
    assert torch.equal(weights.weights_GN, torch.ones_like(weights.weights_GN))
    for log_probs_N in scores.log_probs_GN:
        assert torch.equal(log_probs_N, scores.log_probs_GN[0])


@pytest.mark.parametrize("settings", [{}, {"beta": 0.1}], ids=["plain", "reference"])
def test_appo_with_max_weight_one_is_dapo_bit_for_bit_with_dropout(tmp_path, dataset, settings):
    appo = make(tmp_path / "appo", dataset, method="appo", max_weight=1.0, **settings)
    appo.train()
    dapo = make(tmp_path / "dapo", dataset, method="dapo", **settings)
    dapo.train()
    assert logged(appo, "loss") == logged(dapo, "loss")
    assert max(logged(dapo, "grad_norm")) > 0.01
    for one, other in zip(appo.model.parameters(), dapo.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("method", ["appo", "dapo"])
def test_old_log_probs_are_those_of_the_policy_without_dropout(tmp_path, dataset, method):
    """Four micro-batches from one rollout, two a step: the second step needs them."""
    settings = {"max_resampling_rounds": 0, "steps_per_generation": 4, "max_steps": 1}
    trainer = make(tmp_path, dataset, method=method, **settings)
    compared = []
    loss = trainer._compute_loss

    def comparing(model: Any, inputs: dict[str, Any]) -> Any:
        result = loss(model, inputs)
        rows = {key: value.flatten(0, 1) for key, value in inputs.items() if torch.is_tensor(value) and value.ndim}
        ids = torch.cat([rows["prompt_ids"], rows["completion_ids"]], dim=1)
        mask = torch.cat([rows["prompt_mask"], rows["completion_mask"]], dim=1)
        trainer.model.eval()
        with torch.no_grad():
            now, _, _ = trainer._get_per_token_logps_and_entropies(
                trainer.carrying(trainer.model, inputs["vision"], 4), ids, mask, rows["completion_ids"].shape[1]
            )
        trainer.model.train()
        real = rows["completion_mask"].bool()
        torch.testing.assert_close(now[real], rows["old_per_token_logps"][real], rtol=1e-5, atol=1e-5)
        compared.append(len(ids))
        return result

    trainer._compute_loss = comparing
    trainer.train()
    assert compared == [4, 4]


def test_responses_are_sampled_without_dropout(tmp_path, dataset):
    trainer = make(tmp_path, dataset, method="grpo", max_steps=1)
    modes = []
    trainer.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: modes.append((module.training, bool(kwargs.get("use_cache")))), with_kwargs=True
    )
    trainer.train()
    assert {training for training, caching in modes if caching} == {False}
    assert {training for training, caching in modes if not caching} >= {True}, "updates have dropout"
