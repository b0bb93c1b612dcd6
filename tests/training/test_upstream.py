"""Fails loudly when a TRL upgrade moves what APPOTrainer overrides or relies on."""

from __future__ import annotations

import inspect
from importlib.metadata import version

import pytest
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer

from appo import APPOConfig, APPOTrainer

SEAMS = {
    "__init__": ["self", "model", "reward_funcs", "args", "train_dataset", "eval_dataset", "processing_class"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_generate": ["self", "prompts"],
    "_tokenize_prompts": ["self", "prompts"],
    "_generate_single_turn": ["self", "prompt_ids", "images", "multimodal_fields", "num_generations"],
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_get_per_token_logps_and_entropies": ["self", "model", "input_ids", "attention_mask", "logits_to_keep"],
    "_compute_loss": ["self", "model", "inputs"],
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
}


def test_the_version_is_the_one_these_seams_were_read_in():
    assert version("trl").startswith("1.16."), "read grpo_trainer.py again, then move this and pyproject.toml together"


@pytest.mark.parametrize(("name", "parameters"), SEAMS.items())
def test_overridden_methods_still_take_these_parameters(name, parameters):
    actual = list(inspect.signature(inspect.unwrap(getattr(GRPOTrainer, name))).parameters)
    assert actual[: len(parameters)] == parameters


def test_nothing_else_of_trl_is_overridden():
    overridden = {n for n, f in vars(APPOTrainer).items() if callable(f) and hasattr(GRPOTrainer, n)}
    assert overridden == set(SEAMS)


@pytest.mark.parametrize(
    ("method", "line", "why"),
    [
        ("_compute_loss", "if advantages.dim() == 1:", "advantages may be (B, T)"),
        ("_compute_loss", "self._get_per_token_logps_and_entropies(", "log-probs go through our override"),
        ("_get_per_token_logps_and_entropies", "outputs = model(**model_inputs, labels=labels", "a call per slice"),
        ("_generate_and_score_completions", ") = self._generate(prompts)", "the list of prompts is ours to replace"),
        ("_generate_and_score_completions", "self._calculate_rewards(inputs, prompts, completions", "same rows list"),
        ("_generate", "self._tokenize_prompts(prompts)", "videos enter here"),
        ("_generate_and_score_completions", "if self.args.gradient_accumulation_steps % generate_every != 0", "stale"),
        ("_generate", "return prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields,", "8 lists"),
        ("_generate", "completion_ids, logprobs = self._generate_single_turn(", "ids as lists, and log-probs or None"),
        ("_prepare_inputs", "shuffle_sequence_dict(generation_batch)", "groups are shuffled as wholes"),
        ("_prepare_inputs", "split_tensor_dict(generation_batch, self.args.steps_per_generation)", "and split"),
    ],
)  # fmt: skip
def test_lines_the_overrides_rely_on(method, line, why):
    assert line in inspect.getsource(inspect.unwrap(getattr(GRPOTrainer, method))), why


def test_shuffling_and_splitting_keep_groups_and_their_videos_together():
    import torch

    batch = {"ids": torch.arange(24).view(4, 3, 2), "vision": [{"of": i} for i in range(4)], "scalar": torch.tensor(1)}
    chunks = grpo_trainer.split_tensor_dict(grpo_trainer.shuffle_sequence_dict(batch), 2)
    for chunk in chunks:
        assert chunk["scalar"] == 1
        for group, vision in zip(chunk["ids"], chunk["vision"], strict=True):
            assert torch.equal(group, torch.arange(24).view(4, 3, 2)[vision["of"]])


def test_every_setting_of_trl_is_a_setting_of_ours():
    assert set(GRPOConfig.__dataclass_fields__) < set(APPOConfig.__dataclass_fields__)
