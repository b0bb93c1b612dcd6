"""An LM head in float32 above bfloat16 weights (TRL's ``cast_lm_head_to_fp32``): its pieces are those of the whole."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from recipes.tiny_policy.build import build_policy

from appo import APPOConfig, APPOTrainer
from appo.models.frame_attention import full_precision
from appo.models.log_probs import log_probs_at, score_group
from appo.models.prompt import Prompt
from appo.rollout.vllm.colocate import VideoEngine
from tests.support.runs import FAST, accuracy_reward, clips, logged, rows_of
from tests.support.tiny import random_responses


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return rows_of(clips(tmp_path_factory.mktemp("clips")))


def trainer_of(folder, dataset: Dataset, **settings) -> APPOTrainer:
    """TRL casts heads of their own only: of a video model it does not find the embedding that a tied head shares."""
    model, processor = build_policy(0)
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    args = APPOConfig(str(folder), **{**FAST, "max_resampling_rounds": 0, **settings})
    return APPOTrainer(
        model.to(torch.bfloat16), accuracy_reward, args, train_dataset=dataset, processing_class=processor
    )


def encoded(trainer: APPOTrainer, dataset: Dataset) -> Prompt:
    return trainer.encoder.read(trainer.model, dataset[0]["prompt"])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("cast", [False, True])
def test_log_probs_of_pieces_are_those_of_the_head_as_it_is_called(tmp_path, dataset, cast, autocast):
    trainer = trainer_of(tmp_path, dataset, cast_lm_head_to_fp32=cast)
    head = trainer.model.get_output_embeddings()
    assert head.weight.dtype == (torch.float32 if cast else torch.bfloat16)
    responses = random_responses([5, 3])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        scores = score_group(trainer.model, encoded(trainer, dataset), responses)
    i_n, j_n = scores.mask_GN.nonzero().unbind(dim=1)
    found_nV = log_probs_at(trainer.model, scores)(i_n, j_n)
    logits_nV = scores.hidden_GNH[i_n, j_n].double() @ head.weight.double().T
    # With the head in float32 nothing rounds to bfloat16 (8 bits) any more: so autocast must not reach it.
    close = 1e-5 if cast else 2e-2
    torch.testing.assert_close(found_nV.double(), logits_nV.log_softmax(-1), rtol=close, atol=close)
    own_n = torch.cat(responses)
    torch.testing.assert_close(scores.log_probs_GN[i_n, j_n], found_nV[torch.arange(len(own_n)), own_n])


def test_what_the_sampler_may_say_is_found_with_a_cast_head(tmp_path, dataset):
    trainer = trainer_of(tmp_path, dataset, cast_lm_head_to_fp32=True)
    with torch.no_grad():
        scores = score_group(trainer.model, encoded(trainer, dataset), random_responses([5]))
    banned = [3, 8, 11]
    engine = SimpleNamespace(_base=trainer.model, _banned=banned, _generation=SimpleNamespace(temperature=1.0))
    allowed_GN = VideoEngine._allowed(engine, scores)
    every_nV = log_probs_at(trainer.model, scores)(torch.zeros(5).long(), torch.arange(5)).exp()
    torch.testing.assert_close(allowed_GN[0].exp(), 1 - full_precision(every_nV[:, banned]).sum(-1))


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"steps_per_generation": 4}])
def test_a_policy_in_bfloat16_trains_with_its_head_in_float32(tmp_path, dataset, settings):
    trainer = trainer_of(tmp_path, dataset, method="appo", cast_lm_head_to_fp32=True, max_steps=2, **settings)
    trainer.train()
    assert len(logged(trainer, "loss")) == 2
    assert max(logged(trainer, "appo/mean_weight")) > 1.0
    assert all(0 < norm < float("inf") for norm in logged(trainer, "grad_norm"))
