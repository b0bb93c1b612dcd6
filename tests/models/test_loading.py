"""models: checkpoints load as they were saved, adapters are merged exactly, fingerprints tell checkpoints apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from recipes.tiny_policy.build import build_policy

from appo.experiments.plan.architecture import read_architecture
from appo.models import loading as models
from appo.models.loading import fingerprint, load_model
from appo.models.names import checkpoint_of, policy_path, source_of
from appo.rewards.templates import build_messages
from appo.rollout.generation import VideoCache, encode_prompt, video_sources
from appo.world.policy import SAMPLING
from tests.support.runs import clips


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    for part in build_policy(0):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, base) -> Path:
    """A LoRA adapter whose every matrix is random, saved alone as PEFT does."""
    folder = tmp_path_factory.mktemp("adapter")
    model, _ = load_model(base)
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]))
    torch.manual_seed(3)
    for name, weight in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    _, processor = build_policy(0)
    question = clips(tmp_path_factory.mktemp("clips"))[0]
    messages = build_messages(question, instruction="")
    cache = VideoCache(processor.video_processor, SAMPLING)
    return encode_prompt(processor, messages, [cache.read(source) for source in video_sources(messages)])


def logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs.mapping()).logits


def test_a_merged_adapter_has_the_adapters_own_logits(base, adapter, inputs):
    merged, processor = load_model(adapter)
    unmerged = PeftModel.from_pretrained(load_model(base)[0], adapter)
    assert type(merged) is type(load_model(base)[0]), "an ordinary model, nothing wrapped around it"
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(logits(merged, inputs), logits(unmerged, inputs), rtol=1e-4, atol=1e-5)
    assert (logits(merged, inputs) - logits(load_model(base)[0], inputs)).abs().max() > 0.1
    assert processor.tokenizer.get_vocab() == build_policy(0)[1].tokenizer.get_vocab()
    assert processor.tokenizer.padding_side == "left"


def test_a_merged_adapter_is_saved_as_a_plain_checkpoint(tmp_path, adapter, inputs):
    """What lmms-eval and vLLM load: config, weights, tokenizer, processor, template; nothing of PEFT or appo."""
    merged, processor = load_model(adapter)
    merged.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any("adapter" in name for name in names)
    again, _ = load_model(tmp_path)
    assert torch.equal(logits(again, inputs), logits(merged, inputs))


def test_an_adapters_own_processor_comes_first(tmp_path, adapter):
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    _, processor = build_policy(0)
    processor.tokenizer.save_pretrained(tmp_path)  # a tokenizer alone is no processor
    assert load_model(tmp_path)[1].video_processor is not None
    processor.chat_template = "mine"
    processor.save_pretrained(tmp_path)
    assert load_model(tmp_path)[1].chat_template == "mine"
    assert load_model(adapter)[1].chat_template != "mine"


def test_weights_load_in_the_precision_asked_for(base):
    assert load_model(base)[0].dtype == torch.float32
    assert load_model(base, dtype="bfloat16")[0].dtype == torch.bfloat16


def test_fingerprints_are_of_content(tmp_path, base, adapter):
    copy = shutil.copytree(base, tmp_path / "copy")
    (copy / "notes.md").write_text("no part of the model")
    assert fingerprint(copy) == fingerprint(str(base))
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert fingerprint(copy) != fingerprint(base)
    assert fingerprint(adapter).endswith(f" on {fingerprint(base)}")


def test_of_large_files_pieces_from_start_to_end_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_WHOLE", 1000)
    monkeypatch.setattr(models, "_PIECE", 100)
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "model.safetensors"

    def changed_at(place: int) -> str:
        content = bytearray(64 * 100 * 3)
        content[place] = 1
        file.write_bytes(content)
        return fingerprint(tmp_path)

    seen = [changed_at(place) for place in (0, 99, 10_000, 64 * 300 - 1)]
    assert len(set(seen)) == 4


@pytest.mark.parametrize("load", [load_model, fingerprint, read_architecture], ids=lambda load: load.__name__)
@pytest.mark.parametrize(
    "name", ["/nowhere/model", "./nowhere", "../nowhere", "runs/nowhere/policy", "~/nowhere", "a/"]
)
def test_a_path_that_leads_nowhere_is_no_question_for_the_hub(tmp_path, monkeypatch, load, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"model {name}: no such folder; give the folder"):
        load(name)


def test_names_of_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("Qwen/Qwen2.5-VL-7B-Instruct", "gpt2", "a-b/c_d.e", "_a/b"):
        assert source_of(name) == checkpoint_of(name) == name, "of the hub"
    assert checkpoint_of("spotlight") == str(policy_path())
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="model file: this is a file"):
        checkpoint_of("file")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint \(no config\.json\)"):
        checkpoint_of(".")


def test_what_is_no_checkpoint_is_named(tmp_path, adapter):
    with pytest.raises(OSError, match=r"no checkpoint \(no config\.json\)"):
        load_model(tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for name, value, message in (
        ("base_model_name_or_path", None, "names no"),
        ("base_model_name_or_path", "/gone", "/gone"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {name: value}))
        with pytest.raises((OSError, ValueError), match=message):
            load_model(tmp_path)
