"""docs/upstream.md is complete, and what it lists is where it was: fails when an upgrade of TRL moves it."""

from __future__ import annotations

import ast
import inspect
from importlib.metadata import version
from pathlib import Path

import pytest
from trl import GRPOConfig, GRPOTrainer, SFTTrainer
from trl.trainer import grpo_trainer

from appo import APPOConfig, APPOTrainer
from appo.training.nan_debugging import _ReplayTrainer
from appo.training.sft import VideoSFTTrainer
from tests.training.side_by_side import stock_trainer

PAGE = Path(__file__).parents[2] / "docs" / "upstream.md"
SOURCE = Path(__file__).parents[2] / "src" / "appo"
TRAINERS = (APPOTrainer, VideoSFTTrainer, _ReplayTrainer)
PARAMETERS = {
    "_generate_and_score_completions": ["self", "inputs"],
    "_compute_loss": ["self", "model", "inputs"],
    "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    "training_step": ["self", "model", "inputs", "num_items_in_batch"],
    "_prepare_inputs": ["self", "generation_batch"],
    "_get_train_sampler": ["self", "dataset"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_get_grad_norm": ["self", "model", "grad_norm"],
    "_get_output_dir": ["self", "trial"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_load_best_model": ["self"],
    "_finalize_training": ["self", "trial", "num_train_samples", "start_time"],
    "_generate": ["self", "prompts"],
    "_generate_single_turn": ["self", "prompt_ids", "images", "multimodal_fields", "num_generations"],
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_get_per_token_logps_and_entropies": ["self", "model", "input_ids", "attention_mask", "logits_to_keep"],
    "_push_from_checkpoint": ["self", "checkpoint_folder"],
}


def table(title: str) -> list[list[str]]:
    """The first two cells of each row of a table of the page, without their backticks."""
    section = PAGE.read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip().replace("`", "") for cell in row[:2]] for row in rows]


def test_the_version_is_the_one_these_seams_were_read_in():
    assert version("trl").startswith("1.16."), "read grpo_trainer.py again, then move this and pyproject.toml together"


@pytest.mark.parametrize(("name", "parameters"), PARAMETERS.items())
def test_methods_still_take_these_parameters(name, parameters):
    actual = list(inspect.signature(inspect.unwrap(getattr(GRPOTrainer, name))).parameters)
    assert actual[: len(parameters)] == parameters


def test_the_page_lists_all_overrides_of_all_classes_among_the_trainers_bases():
    found = set()
    for trainer in TRAINERS:
        stock = next(base for base in (GRPOTrainer, SFTTrainer) if issubclass(trainer, base))
        for one in trainer.__mro__:
            if one.__module__.startswith("appo."):
                names = [name for name, value in vars(one).items() if callable(value) and hasattr(stock, name)]
                found |= {(one.__name__, name) for name in names}
    found = {(one, name) for one, name in found if name == "__init__" or not name.startswith("__")}
    assert {tuple(row) for row in table("Methods that are overridden")} == found


def test_the_page_lists_all_private_names_of_a_trainer_that_are_used(tmp_path):
    overridden = {name for _, name in table("Methods that are overridden")}
    private = {name for name in dir(stock_trainer(tmp_path)) if name.startswith("_") and not name.startswith("__")}
    used: dict[str, set[str]] = {}
    for path in [*SOURCE.glob("training/*.py"), *SOURCE.glob("rollout/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in private - overridden:
                used.setdefault(node.attr, set()).add(path.stem)
    listed = [*table("Private methods that are called"), *table("Private state that is read")]
    assert {name: set(where.split(", ")) for name, where in listed} == used


@pytest.mark.parametrize(
    ("method", "line", "why"),
    [
        ("_compute_loss", "if advantages.dim() == 1:", "advantages may be (B, N)"),
        ("_compute_loss", "self._get_per_token_logps_and_entropies(", "one call with all rows of a micro-batch"),
        ("_get_per_token_logps_and_entropies", "batch_size = batch_size or input_ids.size(0)", "and it is not cut"),
        ("_get_per_token_logps_and_entropies", "outputs = model(**model_inputs, labels=labels", "its arguments"),
        ("_generate_and_score_completions", "if self.args.gradient_accumulation_steps % generate_every != 0", "stale"),
        ("_generate", "return prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields,", "8 lists"),
        ("_prepare_inputs", "self._generate_and_score_completions(generation_batch)", "the rollout"),
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
