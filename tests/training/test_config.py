"""APPOConfig: what the methods prescribe, and settings that contradict each other."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from appo import APPOConfig
from appo.training.arguments import TrainScript
from appo.training.config import check_groups
from appo.training.setting_rules import CHOICES, RANGES, SWITCHES, check_texts, check_values
from tests.support.runs import FAST

PRESETS = [
    ("grpo", {"loss_type": "grpo", "epsilon_high": 0.2, "beta": 0.0, "max_resampling_rounds": 0, "overlong_cache": 0}),
    ("dapo", {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.0, "overlong_cache": 76}),
    ("appo", {"loss_type": "dapo", "epsilon_high": 0.28, "beta": 0.0, "overlong_cache": 76, "max_weight": 1.7}),
]


@pytest.mark.parametrize(("method", "expected"), PRESETS)
def test_methods_set_trls_own_knobs(tmp_path, method, expected):
    settings = {**FAST, "max_completion_length": 384}
    config = APPOConfig(str(tmp_path), method=method, **settings)
    assert {name: getattr(config, name) for name in expected} == expected
    explicit = APPOConfig(str(tmp_path), method=method, epsilon_high=0.5, overlong_cache=0, **settings)
    assert (explicit.epsilon_high, explicit.overlong_cache) == (0.5, 0), "an explicit value wins"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "luspo"}, "loss_type='luspo'"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
        ({"method": "ppo"}, "method must be one of grpo, dapo, appo"),
        ({"max_weight": 0.5}, "max_weight must be at least 1"),
        ({"base_weight": 1.1}, "base_weight must be from 0 to 1"),
        ({"base_weight": -0.1}, "base_weight must be from 0 to 1"),
        ({"frame_attention": "both"}, "frame_attention must be one of raw, relative"),
        ({"strategy": "softest"}, "strategy must be one of soft, hard, all"),
        ({"divergence": "js"}, "divergence must be one of kl, k3"),
        ({"top_frames": 0}, "top_frames must be at least 1"),
        ({"max_resampling_rounds": -1}, "max_resampling_rounds must be at least 0, got -1"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level='sequence' .* choose 'token'"),
        ({"rows_per_chunk": 2, "shared_prefix": False}, "rows_per_chunk splits packed groups"),
        ({"overlong_cache": 8}, "overlong_cache .* smaller than max_completion_length"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_by_name(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        APPOConfig(str(tmp_path), **{**FAST, **settings})


CUT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
ROWS = {
    "video": {"prompt": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]},
    "picture": {"prompt": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]},
    "column": {"prompt": [{"role": "user", "content": "when ?"}], "image": "a.png"},
    "text": {"prompt": [{"role": "user", "content": "when ?"}]},
}


@pytest.mark.parametrize("kind", ROWS)
def test_batches_may_cut_groups_of_text_alone(tmp_path, kind):
    """TRL takes such sizes for text; groups with pictures or videos stay whole."""
    message = r"per_device_train_batch_size \(2\) must be a multiple of num_generations \(4\)"
    args = APPOConfig(str(tmp_path), **{**FAST, **CUT})
    rows = [ROWS["text"], ROWS[kind]]
    if kind == "text":
        check_groups(args, rows, None)
        return
    with pytest.raises(ValueError, match=message):
        check_groups(args, rows, None)
    with pytest.raises(ValueError, match=message):
        check_groups(args, [ROWS["text"]], {"held out": rows})


def test_batches_of_an_evaluation_are_checked_too(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 4, "per_device_eval_batch_size": 4}
    args = APPOConfig(str(tmp_path), **{**FAST, **settings})
    args.per_device_eval_batch_size = 6
    with pytest.raises(ValueError, match=r"eval_batch_size \(6\) must be a multiple of num_generations_eval"):
        check_groups(args, [ROWS["video"]])


def test_dynamic_sampling_needs_whole_groups_in_a_process(tmp_path):
    """Two processes of two rows each share a group of four: neither could replace it."""
    settings = {**FAST, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "num_generations": 2}
    args = APPOConfig(str(tmp_path), **settings)
    args.num_generations = 4  # as two processes allow
    with pytest.raises(ValueError, match=r"samples 2 responses at a time.*set max_resampling_rounds to 0"):
        check_groups(args, [ROWS["text"]])
    args.max_resampling_rounds = 0
    check_groups(args, [ROWS["text"]])


def test_a_whole_responses_ratio_is_left_to_methods_without_token_weights(tmp_path):
    for method in ("grpo", "dapo"):
        APPOConfig(str(tmp_path), **FAST, method=method, importance_sampling_level="sequence")


# --- what a setting may be on its own ------------------------------------------------------------------------------

REFUSED = [
    ("threshold", 5, "must be from 0 to 1 (as an accuracy reward is)"),
    ("threshold", -0.1, "must be from 0 to 1 (as an accuracy reward is)"),
    ("video_fps", 0, "must be above 0 frames a second"),
    ("video_fps", -2.0, "must be above 0 frames a second"),
    ("video_fps", math.inf, "must be finite"),
    ("max_steps", -5, "must be at least 0, or -1: num_train_epochs counts"),
    ("max_steps", "5", "must be a whole number"),
    ("video_max_frames", "16", "must be a whole number"),
    ("video_max_frames", 16.0, "must be a whole number"),
    ("video_max_frames", 0, "must be at least 1"),
    ("video_min_frames", True, "must be a whole number"),
    ("top_frames", math.nan, "must be a whole number"),
    ("max_weight", math.inf, "must be finite"),
    ("max_weight", math.nan, "must be at least 1 (1 is DAPO)"),
    ("base_weight", math.nan, "must be from 0 to 1 (1 is the paper)"),
    ("base_weight", None, "must be a number"),
    ("decode_timeout", math.inf, "must be finite"),
    ("decode_timeout", 0, "must be above 0 seconds"),
    ("overlong_cache", 2.5, "must be a whole number"),
    ("shared_prefix", "false", "must be true or false"),
    ("temperature", math.nan, "must be a number"),
    ("strategy", ["soft"], "must be one of soft, hard, all"),
]


@pytest.mark.parametrize(("name", "value", "problem"), REFUSED, ids=lambda value: str(value)[:20])
def test_a_value_that_a_setting_cannot_have_is_named_with_what_it_may_be(tmp_path, name, value, problem):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011  # the whole line is compared
        APPOConfig(str(tmp_path), **{**FAST, name: value})
    assert str(refusal.value) == f"{name} {problem}, got {value!r}"


def test_a_maximum_below_its_minimum_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"video_max_frames \(8\) is less than video_min_frames \(9\): set both"):
        APPOConfig(str(tmp_path), **FAST, video_max_frames=8, video_min_frames=9)
    assert APPOConfig(str(tmp_path), **FAST, video_max_frames=9, video_min_frames=9).video_min_frames == 9


ALLOWED: list[dict[str, Any]] = [
    {"max_steps": -1, "num_train_epochs": 0.5},
    {"max_steps": 0},
    {"max_grad_norm": math.inf},
    {"threshold": 0, "base_weight": 1, "max_weight": 1, "video_fps": 1},
    {"threshold": np.float64(1.0), "top_frames": np.int64(2), "video_max_frames": np.int32(16)},
    {"rollouts_per_step": 0, "max_faulty_videos": 0, "overlong_cache": 0, "rows_per_chunk": 0},
    {"loss_type": None, "beta": None, "epsilon_high": None, "overlong_cache": None, "max_resampling_rounds": None},
]


@pytest.mark.parametrize("settings", ALLOWED, ids=str)
def test_what_is_meant_stays_allowed(tmp_path, settings):
    APPOConfig(str(tmp_path), **{**FAST, **settings})


def test_texts_of_a_file_or_of_flags_are_checked_as_the_values_they_stand_for():
    check_texts({"video_max_frames": "16", "threshold": "5e-1", "shared_prefix": "No", "max_steps": "-1"})
    check_texts({"overlong_cache": None, "learning_rate": "1e-6", "strategy": "hard", "output_dir": "5"})
    for name, text, problem in [
        ("max_weight", "heavy", "max_weight must be a number, got 'heavy'"),
        ("top_frames", "2.5", "top_frames must be a whole number, got '2.5'"),
        ("threshold", "nan", "threshold must be from 0 to 1"),
        ("shared_prefix", "maybe", "shared_prefix must be true or false, got 'maybe'"),
        ("method", "ppo", "method must be one of grpo, dapo, appo, sft, got 'ppo'"),
    ]:
        with pytest.raises(ValueError, match=problem):
            check_texts({name: text})


def test_every_rule_is_about_a_setting_and_every_own_number_has_one():
    names = {field.name for owner in (APPOConfig, TrainScript) for field in fields(owner)}
    assert {*RANGES, *CHOICES, *SWITCHES} <= names
    own = {name for name, kind in APPOConfig.__annotations__.items() if kind in ("int", "float", "bool", "int | None")}
    assert own - {*RANGES, *SWITCHES} == set()
    check_values({field.name: field.default for field in fields(APPOConfig) if field.name not in ("overlong_cache",
                  "max_resampling_rounds")})  # fmt: skip
