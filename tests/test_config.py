"""APPOConfig: what the methods prescribe, and settings that contradict each other."""

from __future__ import annotations

import pytest

from appo import APPOConfig
from appo.config import check_groups
from runs import FAST

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
        ({"max_resampling_rounds": -1}, "max_resampling_rounds must not be negative"),
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
