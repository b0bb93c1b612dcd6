"""Videos through the real vLLM engine, in float32 on a CPU: run by .ci/vllm in an environment of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset

pytest.importorskip("vllm", reason="vLLM has an environment of its own: .ci/vllm")

from appo import APPOConfig, APPOTrainer
from appo.models.families import family_of
from appo.rollout.generation import respond
from appo.rollout.vllm import colocate as room
from appo.rollout.vllm.colocate import VideoLLM
from appo.rollout.vllm.prompts import EngineMismatchError, EnginePrompt
from appo.world import load_policy
from tests.rollout.vllm_engine import model_of, prepare, vllm_settings
from tests.support.runs import FAST, accuracy_reward, clips, logged, rows_of

ROUNDING = 1e-3


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return rows_of(clips(tmp_path_factory.mktemp("clips")))


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A trainer of the shipped policy, which answers through vLLM."""
    prepare(monkeypatch)

    def build(dataset, **settings):
        model, processor = load_policy()
        fixed = {"max_completion_length": 16, "max_resampling_rounds": 0, "overlong_cache": 0, "max_steps": 1}
        args = APPOConfig(**{**FAST, **vllm_settings(tmp_path), **fixed, **settings})
        return APPOTrainer(model, accuracy_reward, args, train_dataset=dataset, processing_class=processor)

    return build


def rollout_differences(trainer, groups, scorer=None):
    """Mean |log p by vLLM - log p by scoring| of each group, under the weights of now."""
    scores = [trainer.pipeline.scores_of(group) for group in groups]
    return [
        room.log_prob_difference(group, score, trainer.engine.vllm._allowed(score))
        for group, score in zip(groups, scores, strict=True)
    ]


def test_a_few_appo_steps_sample_from_the_weights_of_each_moment_and_decode_each_video_once(make, dataset):
    trainer = make(dataset, max_steps=3, learning_rate=3e-3, freeze_vision_tower=False)
    now, later, kept = [], [], []

    def on_rollout(step, scored):
        groups = list(scored)
        now.extend(rollout_differences(trainer, groups))
        if kept:  # what the policy of a step ago said, judged by the policy of now
            later.extend(rollout_differences(trainer, kept[-1]))
        kept.append(groups)

    trainer.on_rollout = on_rollout
    trainer.train()
    assert len(now) == 3 * 2
    assert max(now) < ROUNDING, "vLLM samples from the policy in training"
    assert min(later) > 10 * ROUNDING, "the weights have not moved: the test proves nothing"
    assert trainer.encoder.videos.decoded == 3 * 2, "two videos a rollout, eight responses"
    assert max(logged(trainer, "sampling/sampling_logp_difference/mean")) < 10 * ROUNDING
    assert max(logged(trainer, "appo/mean_weight")) > 1.01
    assert trainer.engine.vllm.checked


def test_after_new_weights_greedy_answers_are_those_of_transformers(make, dataset):
    """Language model and vision tower both change; the videos are those that the engine has seen before."""
    from vllm import SamplingParams

    trainer = make(dataset)
    banned = family_of(trainer.model).banned_ids
    prompts = [row["prompt"] for row in dataset.select(range(4))]
    answers = []
    for seed in (None, 1, 2):
        if seed is not None:
            disturb(trainer.model, seed)
        encoded = [trainer.encoder.read(trainer.model, prompt) for prompt in prompts]
        settings = {"do_sample": False, "max_new_tokens": 12, "suppress_tokens": banned}
        expected = [ids for (ids,) in respond(trainer.model.eval(), 0, encoded, 1, **settings)]
        trainer.vllm_generation.sync_weights()
        requests = [carried[0].request() for carried in trainer.engine.vllm.carry(trainer.encoder, prompts, encoded)]
        words = trainer.vllm_generation.generation_kwargs["bad_words"]
        sampling = SamplingParams(temperature=0.0, max_tokens=12, bad_words=words)
        outputs = trainer.vllm_generation.llm.generate(requests, sampling_params=sampling, use_tqdm=False)
        found = [list(output.outputs[0].token_ids) for output in outputs]
        assert found == [ids.tolist() for ids in expected]
        answers.append(found)
    assert answers[0] != answers[1] != answers[2], "the weights did not matter: the test proves nothing"


def disturb(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in [*model.model.visual.merger.parameters(), *model.model.language_model.norm.parameters()]:
            parameter.mul_(1 + 0.5 * torch.randn(parameter.shape, generator=generator))


def test_videos_longer_than_the_text_after_them_are_answered_where_they_are_trained(make, tmp_path):
    """48 frames: the last one's time lies behind the positions of the question, where vLLM's own rule differs most."""
    from appo.world import generate

    trainer = make(rows_of(generate(tmp_path / "long", "L3", 4, 0)), video_max_frames=48)
    differences = []
    trainer.on_rollout = lambda step, scored: differences.extend(rollout_differences(trainer, scored))
    trainer.train()
    assert max(differences) < ROUNDING


def test_text_alone_takes_the_way_of_trl(make, monkeypatch):
    words = ["what colour is the star ?", "what shape is the red one ?", "which came first ?", "when ?"]
    trainer = make(Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in words]))
    monkeypatch.setattr(room, "engine_prompt", None)
    trainer.train()
    assert not trainer.engine.vllm.checked
    assert max(logged(trainer, "sampling/sampling_logp_difference/mean")) < 10 * ROUNDING


def test_vision_placeholders_are_never_sampled(make, dataset, monkeypatch):
    """A policy that wants to say nothing but <|video_pad|>."""
    trainer = make(dataset)
    banned = family_of(trainer.model).banned_ids
    model = model_of(trainer.vllm_generation.llm)
    compute, calls = model.compute_logits, []

    def longing(*args, **kwargs):
        logits = compute(*args, **kwargs)
        logits[..., banned] += 1e4
        calls.append(len(logits))
        return logits

    monkeypatch.setattr(model, "compute_logits", longing)
    said = []
    trainer.on_rollout = lambda step, groups: said.extend(t for g in groups for s in g.samples for t in s.ids)
    trainer.train()
    assert calls, "the hook never ran, the test proves nothing"
    assert said
    assert not set(said) & set(banned)


def blank(request):
    videos = request["multi_modal_data"]["video"]
    request["multi_modal_data"]["video"] = [(np.zeros_like(frames), metadata) for frames, metadata in videos]


def hurried(request):
    videos = request["multi_modal_data"]["video"]
    times = [metadata | {"fps": metadata["fps"] / 2} for _, metadata in videos]
    request["multi_modal_data"]["video"] = [(frames, time) for (frames, _), time in zip(videos, times, strict=True)]


def shortened(request):
    request["multi_modal_data"]["video"] = [(f[:8], m) for f, m in request["multi_modal_data"]["video"]]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (blank, r"log-probabilities of its own responses differ from the scoring pass by .* sees another video"),
        (hurried, r"vLLM reads token \d+ of a prompt at \(time, height, width\) .*: it was given another frame rate"),
        (shortened, r"vLLM reads a prompt as \d+ tokens, the training forward as \d+ .* another processor"),
    ],
)
def test_an_engine_that_sees_something_else_is_refused_in_one_line(make, dataset, monkeypatch, fault, message):
    trainer = make(dataset)
    asked = EnginePrompt.request

    def faulty(self):
        request = asked(self)
        fault(request)
        return request

    monkeypatch.setattr(EnginePrompt, "request", faulty)
    with pytest.raises(EngineMismatchError, match=message) as error:
        trainer.train()
    assert "\n" not in str(error.value)


def test_other_weights_in_the_engine_are_refused(make, dataset, monkeypatch):
    trainer = make(dataset)
    disturb(trainer.model, 3)
    trainer._last_loaded_step = 0  # TRL's mark that the engine is up to date
    with pytest.raises(EngineMismatchError, match="it has other weights"):
        trainer.train()


def test_evaluation_answers_through_vllm_too(make, dataset):
    trainer = make(dataset, per_device_eval_batch_size=4, num_generations_eval=2)
    trainer.eval_dataset = dataset.select(range(2))
    assert isinstance(trainer.vllm_generation.llm, VideoLLM)
    assert 0 <= trainer.evaluate()["eval_rewards/accuracy_reward/mean"] <= 1
    assert trainer.encoder.videos.decoded == 2
