"""Identities of the trainer on real video files, through real optimiser steps of TRL."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from datasets import Dataset
from recipes.tiny_policy.build import build_policy
from trl import GRPOConfig, GRPOTrainer

from appo import APPOConfig, APPOTrainer
from appo.models.families import family_of
from appo.rollout import pipeline as pipeline_module
from appo.training.vision_check import BlindPolicyError
from tests.support.runs import FAST, accuracy_reward, clips, logged, make_trainer, rows_of


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return rows_of(clips(tmp_path_factory.mktemp("clips")))


def train(tmp_path, dataset, **settings):
    """Train, remembering the gradients of the last backward pass of every step."""
    trainer = make_trainer(tmp_path, dataset, **settings)
    gradients = []
    step = trainer.training_step

    def remembering(*args, **kwargs):
        loss = step(*args, **kwargs)
        gradients.append([None if p.grad is None else p.grad.clone() for p in trainer.model.parameters()])
        return loss

    trainer.training_step = remembering
    trainer.train()
    return trainer, gradients


CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def assert_same_run(first, second):
    (one, one_grads), (two, two_grads) = first, second
    assert logged(one, "loss") == logged(two, "loss")
    assert logged(one, "reward") == logged(two, "reward")
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(one_grads) == len(two_grads) > 0
    for step_a, step_b in zip(one_grads, two_grads, strict=True):
        for a, b in zip(step_a, step_b, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def test_appo_with_max_weight_one_is_dapo_bit_for_bit(tmp_path, dataset):
    appo = train(tmp_path / "appo", dataset, method="appo", max_weight=1.0)
    dapo = train(tmp_path / "dapo", dataset, method="dapo")
    assert logged(appo[0], "appo/mean_weight") == [1.0] * 5
    assert any(loss != 0 for loss in logged(dapo[0], "loss"))
    assert_same_run(appo, dapo)


def test_two_runs_of_one_seed_are_identical_and_weights_matter(tmp_path, dataset):
    one = train(tmp_path / "one", dataset, method="appo")
    two = train(tmp_path / "two", dataset, method="appo")
    assert_same_run(one, two)
    assert max(logged(one[0], "appo/mean_weight")) > 1.01
    dapo, _ = train(tmp_path / "dapo", dataset, method="dapo")
    assert logged(dapo, "loss") != logged(one[0], "loss"), "the weights changed nothing"


def test_text_only_prompts_train_like_stock_trl(tmp_path):
    words = ["what colour is the star ?", "what shape is the red one ?", "which came first ?", "when ?"]
    dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in words])
    model, processor = build_policy(0)
    banned = family_of(model).banned_ids
    args = GRPOConfig(str(tmp_path / "trl"), generation_kwargs={"suppress_tokens": banned}, epsilon_high=0.28, **FAST)
    stock = GRPOTrainer(model, accuracy_reward, args, train_dataset=dataset, processing_class=processor)
    stock.train()
    settings = {"method": "dapo", "max_resampling_rounds": 0, "overlong_cache": 0}
    ours = make_trainer(tmp_path / "appo", dataset, **settings)
    ours.train()
    assert logged(stock, "loss") == logged(ours, "loss")
    assert any(loss != 0 for loss in logged(stock, "loss"))
    for a, b in zip(stock.model.parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "settings", [{}, {"steps_per_generation": 4}, {"freeze_vision_tower": False}, {"rows_per_chunk": 3}]
)
def test_five_steps_with_and_without_a_shared_prefix_agree(tmp_path, dataset, settings):
    """The same rollouts, so that both are compared on the same tokens: only generation is sampled."""
    packed, packed_grads = train(tmp_path / "packed", dataset, method="appo", **settings)
    as_rows = {**settings, "shared_prefix": False, "rows_per_chunk": 0}
    rows, rows_grads = train(tmp_path / "rows", dataset, method="appo", **as_rows)
    assert logged(packed, "reward") == logged(rows, "reward")
    for name in ("loss", "entropy", "appo/mean_weight"):
        torch.testing.assert_close(torch.tensor(logged(packed, name)), torch.tensor(logged(rows, name)), **CLOSE)
    for a, b in zip(packed_grads[0], rows_grads[0], strict=True):
        assert (a is None and b is None) or float((a - b).abs().max()) <= 1e-4 * max(float(b.abs().max()), 1e-2)


def test_groups_stay_whole_with_their_own_video_and_each_file_is_decoded_once(tmp_path, dataset):
    trainer = make_trainer(tmp_path, dataset, method="dapo", max_resampling_rounds=0, max_steps=2)
    batches = []
    loss = trainer._compute_loss

    def spying(model, inputs):
        batches.append(inputs)
        return loss(model, inputs)

    trainer._compute_loss = spying
    trainer.train()
    assert len(batches) == 4, "two steps of two micro-batches"
    for batch in batches:
        for prompt_ids, mask, vision in zip(batch["prompt_ids"], batch["prompt_mask"], batch["vision"], strict=True):
            assert len(prompt_ids) == 4
            own = vision.ids_1P[0]
            for row, row_mask in zip(prompt_ids, mask, strict=True):
                assert torch.equal(row[row_mask.bool()], own)
            assert abs(float(batch["advantages"][0].sum())) < 1e-4, "a whole group's advantages cancel"
    assert trainer.encoder.videos.decoded == 2 * 2, "two distinct videos a rollout, eight copies of their prompts"


@pytest.mark.parametrize(("method", "scoring_passes"), [("appo", 2), ("dapo", 0)])
def test_old_and_new_log_probs_agree_and_capture_rides_on_the_pass_that_makes_them(
    tmp_path, dataset, monkeypatch, method, scoring_passes
):
    """Four micro-batches from one rollout, two a step: the second step is off-policy, so old log-probs are needed."""
    settings = {"max_resampling_rounds": 0, "max_steps": 2, "steps_per_generation": 4, "learning_rate": 0.0}
    trainer = make_trainer(tmp_path, dataset, method=method, **settings)
    new, passes = [], []
    stock = trainer._get_per_token_logps_and_entropies
    score = pipeline_module.score_group

    def spying(model, *args, **kwargs):
        logps, *rest = stock(model, *args, **kwargs)
        new.append(logps.detach())
        return (logps, *rest)

    def counting(*args, **kwargs):
        passes.append(kwargs["capture_layers"])
        return score(*args, **kwargs)

    loss = trainer._compute_loss

    def comparing(model, inputs):
        result = loss(model, inputs)
        old = inputs["old_per_token_logps"].flatten(0, 1)
        mask = inputs["completion_mask"].flatten(0, 1).bool()
        torch.testing.assert_close(new[-1][mask], old[mask], rtol=1e-5, atol=1e-5)
        compared.append(len(old))
        return result

    compared: list[int] = []
    trainer._get_per_token_logps_and_entropies = spying
    trainer._compute_loss = comparing
    monkeypatch.setattr(pipeline_module, "score_group", counting)
    trainer.train()
    assert compared == [4] * 4
    assert passes == [3] * (2 * scoring_passes), "one pass a group, capture included"


@pytest.mark.parametrize(("frozen", "encoded"), [(True, 2), (False, 2 * 2)])
def test_a_frozen_vision_tower_runs_once_per_video_and_step(tmp_path, dataset, frozen, encoded):
    """Two videos, one step. Frozen: once each. Trained: once each for generation and for the update, which scores."""
    trainer = make_trainer(tmp_path, dataset, method="appo", max_resampling_rounds=0, freeze_vision_tower=frozen)
    if frozen and not family_of(trainer.model).reuses_vision:
        pytest.skip("this transformers takes pixels only")
    trainer._checked_vision = True  # its own passes are not counted here
    trainer.args.max_steps = 1
    videos = []
    trainer.model.model.visual.register_forward_hook(
        lambda module, args, kwargs, out: videos.extend(kwargs["grid_thw"].tolist()), with_kwargs=True
    )
    trainer.train()
    assert len(videos) == encoded


def test_vision_placeholders_are_never_sampled(tmp_path, dataset):
    """A policy that wants to say nothing but <|video_pad|>."""
    trainer = make_trainer(tmp_path, dataset, method="grpo", max_steps=1)
    banned = family_of(trainer.model).banned_ids
    head = trainer.model.get_output_embeddings()
    calls = []

    def longing(module, inputs, output):
        output[..., banned] += 1e4
        calls.append(output.shape)

    head.register_forward_hook(longing)
    seen = []
    trainer.on_rollout = lambda step, groups: seen.extend(groups)
    trainer.train()
    assert calls, "the hook never ran, the test proves nothing"
    ids = {token for group in seen for sample in group.samples for token in sample.ids}
    assert ids
    assert not ids & set(banned)


@pytest.mark.parametrize("blindness", ["pixels never arrive", "constant vision tower", "constant tower, dropout"])
def test_a_blind_policy_is_refused_before_the_first_step(tmp_path, dataset, blindness):
    trainer = make_trainer(tmp_path, dataset, method="grpo", max_steps=1)
    if blindness == "pixels never arrive":
        forward = trainer.model.model.forward
        vision = ("pixel_values_videos", "mm_encoder_outputs")

        def blind(*args, **kwargs):
            return forward(*args, **{key: value for key, value in kwargs.items() if key not in vision})

        trainer.model.model.forward = blind
    else:
        for parameter in trainer.model.model.visual.merger.parameters():
            torch.nn.init.zeros_(parameter)
    if blindness == "constant tower, dropout":  # two passes of a model with dropout differ by themselves
        drop = partial(torch.nn.functional.dropout, p=0.5)
        mlp = trainer.model.model.language_model.layers[0].mlp
        mlp.register_forward_hook(lambda module, inputs, output: drop(output, training=module.training))
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(BlindPolicyError, match="trained blind"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_dynamic_sampling_replaces_flat_groups_by_fresh_prompts(tmp_path, dataset):
    """Only one question ever gives unequal rewards; its group must crowd out the others, in bounded rounds."""
    wanted = dataset[0]["prompt"]

    def only_one(prompts, completion_ids, **kwargs):
        hit = [prompt[0]["content"][0]["video"] == wanted[0]["content"][0]["video"] for prompt in prompts]
        return [float(i % 2) if h else 0.0 for i, h in enumerate(hit)]

    trainer = make_trainer(
        tmp_path, dataset, rewards=only_one, method="dapo", max_resampling_rounds=20, overlong_cache=0, max_steps=2,
        accuracy_reward="only_one",
    )  # fmt: skip
    groups = []
    trainer.on_rollout = lambda step, scored: groups.extend(scored)
    trainer.train()
    assert logged(trainer, "resampling/flat_groups") == [0.0, 0.0]
    assert logged(trainer, "frac_reward_zero_std") == [0.0, 0.0]
    assert max(logged(trainer, "resampling/replaced_groups")) > 0
    assert logged(trainer, "reward") == [0.5, 0.5]
    assert all(r < 0.5 for r in logged(trainer, "resampling/first_round_reward")), "the honest reward is before"
    for group in groups:
        assert group.row["prompt"][0]["content"][0]["video"] == wanted[0]["content"][0]["video"]


def test_when_rounds_run_out_the_flat_groups_stay_and_metrics_say_so(tmp_path, dataset):
    def never(completions, **kwargs):
        return [0.0] * len(completions)

    trainer = make_trainer(
        tmp_path, dataset, rewards=never, method="appo", max_resampling_rounds=1, overlong_cache=0, max_steps=1
    )
    trainer.train()
    assert logged(trainer, "resampling/flat_groups") == [1.0]
    assert logged(trainer, "resampling/replaced_groups") == [0.0]
    assert logged(trainer, "appo/groups_without_crucial_frames") == [1.0], "no winner, soft strategy"
    assert logged(trainer, "loss") == [0.0]


def test_soft_overlong_punishment_is_dapos_equation_13(tmp_path, dataset):
    """max_completion_length 96, cache 64: no punishment up to 32 tokens, -1 at 96."""
    trainer = make_trainer(
        tmp_path,
        dataset,
        method="dapo",
        max_completion_length=96,
        overlong_cache=64,
        max_resampling_rounds=0,
        max_steps=2,
    )
    groups = []
    trainer.on_rollout = lambda step, scored: groups.extend(scored)
    trainer.train()
    assert trainer.reward_func_names == ["accuracy_reward", "soft_overlong_punishment_reward"]
    lengths = set()
    for sample in [sample for group in groups for sample in group.samples]:
        length = len(sample.ids)
        lengths.add(length)
        assert float(sample.rewards_R[1]) == pytest.approx(min(0.0, (32 - length) / 64), abs=1e-6)
    assert max(lengths) == 96
    assert min(lengths) < 96


def test_columns_logged_by_reward_functions_survive_resampling(tmp_path, dataset):
    def logging_reward(completion_ids, log_extra, **kwargs):
        log_extra("first_token", [ids[0] for ids in completion_ids])
        return [float(sum(ids) % 2) for ids in completion_ids]

    trainer = make_trainer(
        tmp_path, dataset, rewards=logging_reward, method="dapo", max_resampling_rounds=3, max_steps=1
    )
    groups = []
    trainer.on_rollout = lambda step, scored: groups.extend(scored)
    trainer.train()
    expected = [sample.ids[0] for group in groups for sample in group.samples]
    assert list(trainer._logs["extra"]["first_token"]) == expected


def test_unsupported_uses_are_refused(tmp_path, dataset):
    model, processor = build_policy(0)
    with pytest.raises(TypeError, match=r"appo\.APPOConfig"):
        APPOTrainer(model, accuracy_reward, GRPOConfig(str(tmp_path), **FAST), train_dataset=dataset)
    with pytest.raises(ValueError, match="tools is not supported"):
        APPOTrainer(
            model, accuracy_reward, APPOConfig(str(tmp_path), **FAST), train_dataset=dataset,
            processing_class=processor, tools=[print],
        )  # fmt: skip

    def first(completions, **kwargs):
        return [0.0] * len(completions)

    def second(completions, **kwargs):
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match="accuracy_reward is 'accuracy_reward', but the reward functions are first, s"):
        make_trainer(tmp_path, dataset, rewards=[first, second])


def test_a_dataset_smaller_than_a_rollout_is_refused(tmp_path, dataset):
    """TRL makes no step, warns and ends without an error."""
    trainer = make_trainer(tmp_path, dataset.select(range(2)), method="grpo", gradient_accumulation_steps=3)
    with pytest.raises(ValueError, match="the dataset has 2 rows, but a rollout takes 3 prompts"):
        trainer.train()


def test_evaluation_sees_the_videos_too(tmp_path, dataset):
    trainer = make_trainer(
        tmp_path, dataset, method="appo", max_steps=1, per_device_eval_batch_size=4, num_generations_eval=2
    )
    trainer.eval_dataset = dataset.select(range(2))
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_rewards/accuracy_reward/mean"] <= 1
    assert trainer.encoder.videos.decoded == 2
