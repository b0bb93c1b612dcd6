"""Loading a model runs no code of whoever made it: remote code is off, and pickles are refused unopened."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from recipes.tiny_policy.build import build_policy

from appo.cli.main import main
from appo.models.loading import load_model


class Payload:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self._trace,)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for part in build_policy(0):
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def weights_as_pickle(folder: Path, name: str, trace: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / name).write_bytes(pickle.dumps(Payload(trace)))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt"])
def test_a_folder_with_pickles_only_is_refused_with_the_fix(model, tmp_path, name) -> None:
    weights_as_pickle(model, name, tmp_path / "trace")
    with pytest.raises(ValueError, match=rf"model: its weights are a pickle \({name}\).*save_pretrained") as error:
        load_model(model)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "trace").exists()
    pickle.loads((model / name).read_bytes())
    assert (tmp_path / "trace").exists(), "the file would have run its code"


def test_safetensors_are_read_although_a_pickle_lies_beside_them(model, tmp_path) -> None:
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "trace")))
    (model / "training_args.bin").write_bytes(pickle.dumps(Payload(tmp_path / "trace")))
    loaded, _ = load_model(model)
    expected = build_policy(0)[0].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    assert not (tmp_path / "trace").exists()


def test_an_adapter_as_pickle_is_refused_and_so_is_its_base(model, tmp_path) -> None:
    wrapped = get_peft_model(load_model(model)[0], LoraConfig(r=2, target_modules=["q_proj"]))
    adapter = tmp_path / "adapter"
    wrapped.save_pretrained(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(model)}))
    load_model(adapter)
    shutil.copytree(adapter, tmp_path / "other")
    weights_as_pickle(tmp_path / "other", "adapter_model.bin", tmp_path / "trace")
    with pytest.raises(ValueError, match=r"other: its weights are a pickle \(adapter_model.bin\)"):
        load_model(tmp_path / "other")
    weights_as_pickle(model, "pytorch_model.bin", tmp_path / "trace")
    with pytest.raises(ValueError, match=r"model: its weights are a pickle \(pytorch_model.bin\)"):
        load_model(adapter)
    assert not (tmp_path / "trace").exists()


CODE = """
from pathlib import Path
Path({trace!r}).touch()
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
class Config(Qwen2_5_VLConfig):
    model_type = "someones"
class Model(Qwen2_5_VLForConditionalGeneration):
    config_class = Config
class Processor(Qwen2_5_VLProcessor):
    pass
"""


def with_code(model: Path, trace: Path) -> Path:
    """The checkpoint as one of an architecture that only its own code knows."""
    (model / "modeling_someones.py").write_text(CODE.format(trace=str(trace)))
    config = json.loads((model / "config.json").read_text())
    config["model_type"] = "someones"
    config["auto_map"] = {
        "AutoConfig": "modeling_someones.Config",
        "AutoModelForImageTextToText": "modeling_someones.Model",
    }
    (model / "config.json").write_text(json.dumps(config))
    return model


def test_code_of_a_checkpoint_is_not_run_unless_told(model, tmp_path, monkeypatch) -> None:
    trace = tmp_path / "trace"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with_code(model, trace)
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(model)
    assert not trace.exists()
    with pytest.raises(Exception, match=r".*"):  # what the code is good for does not matter here
        load_model(model, trust_remote_code=True)
        raise RuntimeError("it was good for something")
    assert trace.exists(), "told to, it does: the test can fail"


def test_the_command_says_it_in_one_line(model, tmp_path, capsys) -> None:
    weights_as_pickle(model, "pytorch_model.bin", tmp_path / "trace")
    arguments = ["--model", str(model), "--output_dir", str(tmp_path / "run"), "--use_cpu", "true", "--bf16", "false"]
    arguments += ["--per_device_train_batch_size", "8"]
    assert main(["train", "--dataset", "spotlight", "--clips", "4", *arguments]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"appo: {model}: its weights are a pickle (pytorch_model.bin)")
    assert not (tmp_path / "trace").exists()
