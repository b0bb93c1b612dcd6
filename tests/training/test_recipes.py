"""recipes/: each trains two real steps, has the paper's settings and says where they come from."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from appo.cli.main import main
from appo.reports.run_folder import RunFolder
from appo.training.arguments import parse
from appo.training.config import METHODS

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
BIG = [path for path in RECIPES if path.stem != "spotlight"]
LAUNCHERS = sorted((FOLDER / "accelerate").glob("*.yaml"))


def settings(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def by_stem(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("recipe", RECIPES, ids=by_stem)
def test_every_recipe_trains_two_steps(tmp_path, recipe):
    output = tmp_path / "run"
    assert main(["train", "--config", str(recipe), "--tiny", "--output_dir", str(output)]) == 0
    folder = RunFolder.open(output)
    steps = [entry for entry in folder.read_metrics() if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 2]
    assert all(math.isfinite(entry["loss"]) for entry in steps)
    own = settings(recipe)
    record = next(iter(folder.read_rollouts()))
    expected = {f"{name}_reward" for name in own.get("rewards", ["accuracy", "format"])}
    assert set(record.responses[0].rewards) - {"soft_overlong_punishment_reward"} == expected
    adapter = (output / "policy" / "adapter_model.safetensors").exists()
    assert adapter == own.get("use_peft", False)
    assert adapter != (output / "policy" / "model.safetensors").exists()


@pytest.mark.parametrize("method", METHODS)
def test_one_line_of_a_recipe_changes_the_method(tmp_path, method):
    recipe = tmp_path / "recipe.yaml"
    text = (FOLDER / "nextgqa-7b.yaml").read_text(encoding="utf-8")
    recipe.write_text(re.sub(r"^method: \w+", f"method: {method}", text, flags=re.MULTILINE), encoding="utf-8")
    assert main(["train", "--config", str(recipe), "--tiny", "--output_dir", str(tmp_path / "run")]) == 0
    folder = RunFolder.open(tmp_path / "run")
    assert folder.config["training"]["method"] == method
    assert [entry["step"] for entry in folder.read_metrics() if "loss" in entry] == [1, 2]


@pytest.mark.parametrize("recipe", RECIPES, ids=by_stem)
def test_every_setting_of_a_recipe_is_understood_as_it_stands(tmp_path, recipe):
    """Without --tiny; on a machine without a GPU only the device differs."""
    script, config = parse(["--config", str(recipe), "--use_cpu", "true", "--output_dir", str(tmp_path / "run")])
    for name, value in settings(recipe).items():
        if name not in ("output_dir", "use_cpu"):
            found = getattr(script, name) if hasattr(script, name) else getattr(config, name)
            found = getattr(found, "value", found)  # enumerations
            assert ([] if value == "none" and name == "report_to" else value) == found, name


@pytest.mark.parametrize("recipe", BIG, ids=by_stem)
def test_recipes_have_the_papers_settings(recipe):
    """method.md, «Settings of the paper»; 16 prompts a step on the number of GPUs the first lines name."""
    own, text = settings(recipe), recipe.read_text(encoding="utf-8")
    processes = settings(FOLDER / "accelerate" / "fsdp2.yaml")["num_processes"] if "accelerate launch" in text else 1
    responses = own["per_device_train_batch_size"] * own["gradient_accumulation_steps"] * processes
    assert responses / own["num_generations"] == 16
    assert (own["num_generations"], own["temperature"], own["video_fps"]) == (8, 1.0, 1.0)
    grounded = own["dataset"] == "nextgqa"
    assert own["max_completion_length"] == (512 if grounded else 384)
    assert own["video_max_frames"] == (100 if grounded else 16)
    assert own["video_max_pixels"] == (32 if grounded else 64) * 28 * 28
    assert own["video_min_pixels"] == (16 if grounded else 64) * 28 * 28
    assert own.get("use_peft") or own["learning_rate"] == 1e-6
    assert own.get("reward_weights") == ([1.0, 0.1, 1.0] if grounded else None), "None: 0.9 and 0.1"
    assert own.get("limit") == {"seed-bench-r1": 6000, "video-r1": 34000, "nextgqa": None}[own["dataset"]]


@pytest.mark.parametrize("recipe", BIG, ids=by_stem)
def test_every_value_of_a_recipe_cites_its_source(recipe):
    """A comment on its line, but for paths, names and switches of what is shown."""
    free = {"output_dir", "dataset", "annotations", "videos", "split", "rewards", "limit_seed", "seed",
            "model_init_kwargs", "video_max_pixels"}  # fmt: skip
    lines = recipe.read_text(encoding="utf-8").splitlines()
    bare = [line for line in lines if re.match(r"\w+:", line) and "#" not in line]
    assert {line.split(":")[0] for line in bare} <= free


def test_the_readme_of_the_recipes_names_each_file_and_no_other():
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    files = {path.relative_to(FOLDER).as_posix() for path in [*RECIPES, *LAUNCHERS]}
    named = set(re.findall(r"[\w./-]+\.yaml", readme))
    assert {name.removeprefix("recipes/") for name in named} == files
    commands = [line for line in readme.splitlines() if line.startswith(("appo ", "accelerate "))]
    assert commands


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=by_stem)
def test_accelerate_understands_its_files(launcher):
    """Its own loader refuses unknown keys."""
    config = load_config_from_file(str(launcher))
    assert config.num_processes == 8
    assert str(config.mixed_precision) == "bf16"
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}[launcher.stem]
    assert str(config.distributed_type).endswith(kind)
    if kind == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(launcher.stem[-1])


def test_recipes_name_launchers_that_are_there():
    texts = [path.read_text(encoding="utf-8") for path in RECIPES]
    named = {name for text in texts for name in re.findall(r"recipes/accelerate/(\w+)\.yaml", text)}
    assert named
    assert named <= {path.stem for path in LAUNCHERS}
