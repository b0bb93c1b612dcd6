"""Every family on real video files, with its real processor's code: train, resume, show, evaluate."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig

from appo import APPOConfig, APPOTrainer
from appo.cli.main import main
from appo.models.families import family_of
from appo.models.families.base import FAMILIES
from appo.models.log_probs import score_group
from appo.reports.run_folder import RunFolder, load_run
from appo.training.lora import LANGUAGE_LAYERS
from appo.training.sft import make_sft_trainer
from appo.types import VideoQA, VideoSource
from tests.support.clips import write_clip
from tests.support.eval_runs import evaluate, scores
from tests.support.family_models import PROCESSORS, family_model
from tests.support.runs import FAST, accuracy_reward, logged, rows_of
from tests.support.tiny import BY_RUNS, MROPE
from tests.training.resume_cases import begin, differences, go_on, killed_after

FRAMES = dict.fromkeys(MROPE, 2) | dict.fromkeys(BY_RUNS, 4)  # of 4 sampled ones
LORA = dict.fromkeys(("qwen3_5", "smolvlm"), LoraConfig(r=2, target_modules=LANGUAGE_LAYERS))


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[VideoQA]:
    """About two seconds of coloured noise each."""
    folder = tmp_path_factory.mktemp("clips")
    draw = np.random.default_rng(0).integers
    clips = [np.kron(draw(0, 255, (16, 4, 4, 3), dtype=np.uint8), np.ones((1, 16, 16, 1), np.uint8)) for _ in range(3)]
    files = [write_clip(folder / f"{number}.mp4", frames, fps=8) for number, frames in enumerate(clips)]
    return [VideoQA(str(n), VideoSource(str(file)), f"which, {n} ?", "b") for n, file in enumerate(files)]


def test_every_family_is_here() -> None:
    assert set(PROCESSORS) == set(FRAMES) == set(FAMILIES)


@pytest.mark.parametrize("architecture", PROCESSORS)
def test_a_family_trains_resumes_is_shown_and_evaluated(
    tmp_path: Path, questions: list[VideoQA], architecture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    passes: list[int] = []

    def build() -> Any:
        model, processor = family_model(architecture)
        family_of(model).tower.register_forward_hook(lambda *_: passes.append(1))
        return model, processor

    rows, peft_config = rows_of(questions), LORA.get(architecture)
    settings = {"build": build, "peft_config": peft_config, "max_steps": 2, "max_resampling_rounds": 0}
    settings |= {"num_generations": 3, "per_device_train_batch_size": 3}
    whole = begin(tmp_path / "whole", rows, **settings)
    if family_of(whole.model).reuses_vision:
        assert len(passes) == 2 + 4, "twice for the vision check, once a group"
    assert all(norm > 0 for norm in logged(whole, "grad_norm"))
    assert max(logged(whole, "appo/mean_weight")) > 1, "frame attention chose tokens"
    prompt = whole.encoder.read(whole.base_model, rows[0]["prompt"])
    with torch.no_grad():
        ours = score_group(whole.base_model, prompt, [prompt.ids_1P[0, -4:]], capture_layers=0).log_probs_GN
        torch.testing.assert_close(whole._log_probs_of_own_words(prompt), ours, rtol=1e-4, atol=1e-4)
    assert differences(go_on(killed_after(tmp_path / "whole", tmp_path / "resumed", 1), rows, **settings), whole) == []

    run = load_run(tmp_path / "whole")
    assert (len(run.groups), run.notes) == (4, [])
    for group in run.groups:
        assert len(group.timestamps) == len(group.responses[0].frame_attention[0]) == FRAMES[architecture]
        assert group.timestamps == sorted(set(group.timestamps))
        assert run.films[group.film][:4] == b"RIFF"
    assert main(["spotlight", str(tmp_path / "whole"), "--output", str(tmp_path / "page.html")]) == 0
    assert len(json.loads((tmp_path / "page.json").read_text())["groups"]) == 4

    model = whole.model.merge_and_unload() if peft_config else whole.model
    for part in (model, whole.processing_class):
        part.save_pretrained(tmp_path / "policy")
    lines = [{"id": one.id, "video": one.video.path, "question": one.question, "answer": "b"} for one in questions]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = ["--dataset", "jsonl", "--annotations", str(tmp_path / "mine.jsonl"), "--max-completion-length", "4"]
    capsys.readouterr()
    code = evaluate(tmp_path / "e", "--model", str(tmp_path / "policy"), *asked)
    assert (code, capsys.readouterr().err) == (0, "")
    assert scores(tmp_path / "e")["missing"] == 0


@pytest.mark.parametrize("architecture", PROCESSORS)
def test_a_family_learns_from_written_answers(tmp_path: Path, questions: list[VideoQA], architecture: str) -> None:
    """Two prompts of unequal length in a batch; the vision check runs before."""
    config = APPOConfig(str(tmp_path), **{**FAST, "method": "sft", "per_device_train_batch_size": 8, "max_steps": 1})
    folder = RunFolder.create(tmp_path, {})
    rows = rows_of([replace(question, question="which ?" * n) for n, question in enumerate(questions)])
    trainer = make_sft_trainer(*family_model(architecture), rows, config, folder)
    trainer.train()
    assert logged(trainer, "grad_norm")[0] > 0


def test_what_would_lose_gradients_is_refused(tmp_path: Path, questions: list[VideoQA]) -> None:
    model, processor = family_model("gemma4")
    recomputing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    args = APPOConfig(str(tmp_path), **FAST | recomputing)
    with pytest.raises(ValueError, match=r"^gradient_checkpointing_kwargs: with use_reentrant .*: set it to false$"):
        APPOTrainer(model, accuracy_reward, args, train_dataset=rows_of(questions), processing_class=processor)


def test_vllm_is_refused_before_it_is_started(tmp_path: Path, questions: list[VideoQA]) -> None:
    model, processor = family_model("internvl")
    args = APPOConfig(str(tmp_path), **FAST, use_vllm=True)
    with pytest.raises(ValueError, match=r"^vLLM samples for no internvl model here: set use_vllm to false \(docs/"):
        APPOTrainer(model, accuracy_reward, args, train_dataset=rows_of(questions), processing_class=processor)
