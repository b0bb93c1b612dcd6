"""transformers 5.23 gave gradient checkpointing another name: both are understood, and no run warns of the old one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from recipes.tiny_policy.build import build_policy
from transformers import TrainingArguments

from appo import APPOConfig, APPOTrainer
from appo.experiments.plan.planning import settings_of
from appo.models.checkpointing_names import quiet
from appo.training.arguments import parse
from tests.support.runs import FAST, accuracy_reward, clips, rows_of
from tests.training.test_sft import make as make_sft

NEW = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
USUAL = {name: value for name, value in FAST.items() if name != "gradient_checkpointing"}


@pytest.fixture(autouse=True)
def nothing_is_deprecated() -> Iterator[None]:
    """Any warning of the old name is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*checkpointing.*deprecated")
        yield


CASES: list[tuple[dict[str, Any], bool]] = [
    ({}, True),  # TRL's default
    ({"gradient_checkpointing": False}, False),
    ({"gradient_checkpointing": True}, True),
    *([({"activation_checkpointing": True}, True), ({"activation_checkpointing": False}, False)] if NEW else []),
]


@pytest.mark.parametrize(("given", "checkpoints"), CASES, ids=str)
def test_either_name_sets_it(tmp_path: Path, given: dict[str, Any], checkpoints: bool) -> None:
    config = APPOConfig(str(tmp_path), **USUAL, **given)
    assert config.gradient_checkpointing is checkpoints
    if NEW:
        assert config.activation_checkpointing is checkpoints


@pytest.mark.parametrize("name", ["gradient", *(["activation"] if NEW else [])])
def test_its_settings_go_by_either_name(tmp_path: Path, name: str) -> None:
    reentrant = {"use_reentrant": True}
    config = APPOConfig(str(tmp_path), **USUAL, **{f"{name}_checkpointing_kwargs": reentrant})
    assert config.gradient_checkpointing_kwargs == reentrant
    assert not NEW or config.activation_checkpointing_kwargs == reentrant


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_no_recipe_warns(recipe: Path) -> None:
    parse(["--config", str(recipe)], tiny=True)


@pytest.mark.parametrize("name", ["gradient_checkpointing", *(["activation_checkpointing"] if NEW else [])])
def test_a_file_may_say_either(tmp_path: Path, name: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"output_dir: x\nmethod: dapo\n{name}: false\n")
    assert parse(["--config", str(file)], tiny=True)[1].gradient_checkpointing is False
    assert settings_of(str(file))["gradient_checkpointing"] is False


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    clips(folder)
    return folder


@pytest.mark.parametrize("adapter", [None, LoraConfig(target_modules=["q_proj"], r=2)], ids=["full", "lora"])
def test_no_run_warns_though_trl_and_peft_use_the_old_names(tmp_path: Path, world: Path, adapter: Any) -> None:
    """They ask the model by them around every generation, and when an adapter is made."""
    model, processor = build_policy(0)
    rows = rows_of(clips(world))
    trainer = APPOTrainer(
        model,
        accuracy_reward,
        APPOConfig(str(tmp_path / "run"), **{**USUAL, "max_steps": 1, "per_device_eval_batch_size": 4}),
        train_dataset=rows,
        eval_dataset=rows.select(range(1)),
        processing_class=processor,
        peft_config=adapter,
    )
    trainer.train()
    trainer.evaluate()
    assert any(getattr(part, "gradient_checkpointing", False) for part in trainer.model.modules()), "it was on"


def test_no_supervised_run_warns(tmp_path: Path, world: Path) -> None:
    rows = rows_of(clips(world)).map(lambda row: {"options": []})
    make_sft(tmp_path / "run", rows, reasoning=False, gradient_checkpointing=True, max_steps=1).train()


def test_what_others_deprecate_is_still_heard() -> None:
    with quiet(), pytest.warns(FutureWarning, match="something else"):
        warnings.warn("`something else` is deprecated", FutureWarning, stacklevel=1)
