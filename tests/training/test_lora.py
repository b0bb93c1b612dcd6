"""LoRA by settings: it trains, is saved as an adapter, and merges to the very policy that was trained."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from appo.cli.main import main
from appo.models.loading import load_model
from appo.reports.run_folder import RunFolder
from appo.rollout.generation import encode_prompt
from appo.training.arguments import parse
from appo.training.lora import LANGUAGE_LAYERS, AdapterSettings, adapter_config, loading_settings
from appo.video.reader import read_video
from appo.world import load_policy, policy_path
from appo.world.policy import SAMPLING
from tests.support.tiny import ARCHITECTURES, tiny_model

RECIPE = str(Path(__file__).parents[2] / "recipes" / "spotlight.yaml")
SMALL = ["--use_peft", "true", "--lora_r", "4", "--lora_alpha", "8", "--lora_dropout", "0.1", "--learning_rate", "1e-2"]


@pytest.mark.parametrize("method", ["sft", "appo"])
def test_adapters_train_and_merge_to_the_policy_that_was_trained(tmp_path, method):
    output = tmp_path / "run"
    arguments = ["--tiny", "--method", method, "--output_dir", str(output), *SMALL, "--max_completion_length", "64"]
    assert main(["train", "--config", RECIPE, *arguments]) == 0
    policy = output / "policy"
    assert (policy / "adapter_model.safetensors").exists()
    assert not (policy / "model.safetensors").exists(), "the adapter alone is saved"
    assert RunFolder.open(output).config["script"]["lora_r"] == 4
    adapted = PeftModel.from_pretrained(load_policy()[0], policy).eval()
    merged, processor = load_model(policy)
    video = read_video(str(next((output / "clips").glob("*.mp4"))), processor.video_processor, SAMPLING)
    messages = [
        {"role": "user", "content": [{"type": "video", "video": video.path}, {"type": "text", "text": "when ?"}]}
    ]
    prompt = encode_prompt(processor, messages, [video])
    with torch.no_grad():
        logits = [model(**prompt.mapping()).logits for model in (adapted, merged.eval(), load_policy()[0].eval())]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    assert float((logits[1] - logits[2]).abs().max()) > 1e-3, "nothing was trained"


def test_adapters_are_on_every_linear_layer_of_the_language_model_and_on_nothing_else():
    from peft import get_peft_model

    model = get_peft_model(load_policy()[0], adapter_config(AdapterSettings(use_peft=True)))
    adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    linear = {name for name, module in load_policy()[0].named_modules() if isinstance(module, torch.nn.Linear)}
    expected = {name for name in linear if "language_model" in name}
    assert {name.removeprefix("base_model.model.") for name in adapted} == expected
    assert len(expected) == 7 * 4


def test_settings_have_the_names_and_meanings_of_trls_scripts():
    from trl import ModelConfig

    theirs = set(ModelConfig.__dataclass_fields__)
    assert set(AdapterSettings.__dataclass_fields__) <= theirs
    script, _ = parse(["--use_peft", "--lora_target_modules", "q_proj", "v_proj", "--use_rslora", "--use_cpu"])
    config = adapter_config(script)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (16, 32, 0.05)
    assert set(config.target_modules) == {"q_proj", "v_proj"}
    assert config.use_rslora
    assert adapter_config(AdapterSettings(use_peft=True)).target_modules == LANGUAGE_LAYERS
    assert adapter_config(AdapterSettings()) is None
    assert loading_settings(AdapterSettings()) == {}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_linear_layers_of_the_language_model_are_adapted_and_no_other(architecture):
    model = tiny_model(architecture=architecture)
    decoder = {id(module) for module in model.get_decoder().modules() if isinstance(module, torch.nn.Linear)}
    named = {id(module) for name, module in model.named_modules() if re.fullmatch(LANGUAGE_LAYERS, name)}
    assert named == decoder


def test_settings_without_effect_or_library_are_refused(monkeypatch, capsys):
    without = ["train", "--config", RECIPE, "--lora_r", "64"]
    assert main(without) == 2
    assert capsys.readouterr().err == "appo: lora_r is about adapters: set use_peft to true, or leave it out\n"
    monkeypatch.setattr("appo.training.lora.find_spec", lambda name: None)
    assert main(["train", "--config", RECIPE, "--use_peft", "true"]) == 2
    error = capsys.readouterr().err
    assert error == "appo: use_peft needs PEFT: pip install 'appo[peft]', or set use_peft to false\n"
    monkeypatch.setattr("appo.training.lora.find_spec", lambda name: name != "bitsandbytes" or None)
    assert main(["train", "--config", RECIPE, "--use_peft", "true", "--load_in_4bit", "true"]) == 2
    assert "load_in_4bit needs bitsandbytes" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_qlora_trains_on_a_quantized_language_model(tmp_path):
    output = tmp_path / "run"
    flags = [*SMALL, "--load_in_4bit", "true", "--model", str(policy_path()), "--instruction", "", "--clips", "4"]
    short = ["--max_steps", "1", "--num_generations", "2", "--per_device_train_batch_size", "2",
             "--gradient_accumulation_steps", "1", "--max_completion_length", "16"]  # fmt: skip
    assert main(["train", "--config", RECIPE, "--output_dir", str(output), *flags, *short]) == 0
    assert (output / "policy" / "adapter_model.safetensors").exists()
