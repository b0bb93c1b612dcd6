"""The card in a trained model's folder: its own paper, its base where there is a name for it, code that runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig
from recipes.tiny_policy.build import build_policy

from appo import APPOConfig, APPOTrainer
from appo.reports.run_folder import RunFolder
from appo.training.atomic_checkpoint import problem
from appo.training.run import save_policy
from appo.training.sft import make_sft_trainer
from tests.support.runs import FAST, accuracy_reward, clips, make_trainer, rows_of

PAPERS = {"appo": "2602.23823", "dapo": "2503.14476", "grpo": "2402.03300"}
QWEN = "Qwen/Qwen2.5-VL-3B-Instruct"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    clips(folder)
    return folder


def trainer_of(method: str, output: Path, world: Path, base: str = "", **settings: Any) -> Any:
    model, processor = build_policy(0)
    model.config._name_or_path = base
    if method != "sft":
        trainer = make_trainer(output, rows_of(clips(world)), method=method, **settings)
        trainer.model.config._name_or_path = base
        return trainer
    config = APPOConfig(str(output), method="sft", **{**FAST, **settings})
    rows = rows_of(clips(world)).map(lambda row: {"options": []})
    return make_sft_trainer(model, processor, rows, config, RunFolder.create(output, {}))


def parts(card: Path) -> tuple[dict[str, Any], str]:
    """The data for the Hub at the head of a card, and its text."""
    _, data, text = card.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(data), text


@pytest.mark.parametrize("method", ["appo", "dapo", "grpo", "sft"])
def test_a_card_cites_its_own_method_and_nothing_unknown(tmp_path: Path, world: Path, method: str) -> None:
    trainer = trainer_of(method, tmp_path / "run", world)
    trainer.create_model_card(model_name="mine")
    save_policy(trainer, tmp_path / "run" / "policy")
    for card in (tmp_path / "run" / "README.md", tmp_path / "run" / "policy" / "README.md"):
        data, text = parts(card)
        assert "base_model" not in data
        assert data["tags"] == sorted({"appo", "generated_from_trainer", method, "trl"})
        assert data["pipeline_tag"] == "video-text-to-text"
        assert f"trained with {method.upper()}" in text
        assert [name for name, arxiv in PAPERS.items() if text.count(arxiv) == 2] == [method][: method != "sft"]
        assert not any(arxiv in text for name, arxiv in PAPERS.items() if name != method)
        assert ("Attention-guided Perception Policy Optimization" in text) == (method == "appo")
        assert "vonwerra2020trl" in text
        assert "None" not in text
        assert text.count("```") % 2 == 0


def test_the_base_is_named_where_it_has_a_name_for_others(tmp_path: Path, world: Path) -> None:
    trainer = trainer_of("dapo", tmp_path / "a", world, QWEN)
    trainer.create_model_card()
    data, text = parts(tmp_path / "a" / "README.md")
    assert data["base_model"] == QWEN
    assert f"[{QWEN}](https://huggingface.co/{QWEN})" in text
    for local in (str(tmp_path), "/gone/with/a/disk", ""):
        trainer.model.config._name_or_path = local
        trainer.create_model_card()
        data, text = parts(tmp_path / "a" / "README.md")
        assert "base_model" not in data
        assert "fine-tuned" in text
        assert str(tmp_path / "a") in text, "where the model is"
        assert "gone" not in text


def test_every_checkpoint_has_its_card_and_is_complete(tmp_path: Path, world: Path) -> None:
    trainer = trainer_of("appo", tmp_path / "run", world, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    for card in (checkpoint / "README.md", tmp_path / "run" / "README.md"):
        _, text = parts(card)
        assert f'checkpoint = "{checkpoint}"' in text
        assert "# run\n" in text
    assert problem(checkpoint) is None


def test_an_adapter_says_on_what_it_was_trained(tmp_path: Path, world: Path) -> None:
    """PEFT writes a card of its own, all of whose lines ask for more information."""
    model, processor = build_policy(0)
    model.config._name_or_path = QWEN
    config = APPOConfig(str(tmp_path / "run"), **FAST)
    lora = LoraConfig(target_modules=["q_proj"], r=2)
    data = rows_of(clips(world))
    trainer = APPOTrainer(
        model, accuracy_reward, config, train_dataset=data, processing_class=processor, peft_config=lora
    )
    save_policy(trainer, tmp_path / "policy")
    data, text = parts(tmp_path / "policy" / "README.md")
    assert (data["library_name"], data["base_model"]) == ("peft", QWEN)
    assert "More Information Needed" not in text


def test_the_quick_start_runs_as_it_stands(
    tmp_path: Path, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Copied from the card, in a folder with a video of that name."""
    save_policy(trainer_of("appo", tmp_path / "run", world), tmp_path / "run" / "policy")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "run" / "policy" / "README.md").read_text(), re.DOTALL)
    assert f'checkpoint = "{tmp_path / "run" / "policy"}"' in code
    assert "appo" not in code.replace(str(tmp_path), ""), "transformers is all it takes"
    (tmp_path / "video.mp4").write_bytes(Path(clips(world)[0].video.path).read_bytes())
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    names: dict[str, Any] = {}
    exec(compile(code.replace("max_new_tokens=1024", "max_new_tokens=8"), "card", "exec"), names)
    assert capsys.readouterr().out.strip()
    assert names["inputs"]["video_grid_thw"][0, 0] == 8, "of 8 seconds, two frames a second, in pairs"
