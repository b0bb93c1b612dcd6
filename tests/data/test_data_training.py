"""data: what `load` returns trains as it is, through APPOTrainer and through `appo train`."""

from __future__ import annotations

import re
from typing import Any

import pytest
from datasets import concatenate_datasets
from recipes.tiny_policy.build import build_policy

from appo.cli.main import main
from appo.data import load
from appo.reports.run_folder import RunFolder
from appo.rewards.functions import format_reward, temporal_iou_reward
from appo.rewards.templates import GROUNDED_INSTRUCTION
from tests.support.data_fixtures import CASES, Case, nextgqa, nextqa, perception_test
from tests.support.runs import logged, make_trainer

TINY = ["--output_dir", "{out}", "--max_steps", "1", "--per_device_train_batch_size", "4", "--num_generations", "4",
        "--gradient_accumulation_steps", "1", "--max_completion_length", "8", "--use_cpu", "true", "--bf16", "false",
        "--gradient_checkpointing", "false", "--report_to", "none", "--save_strategy", "no"]  # fmt: skip


def train(tmp_path: Any, *arguments: str) -> int:
    return main(["train", *arguments, *(word.format(out=tmp_path / "run") for word in TINY)])


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("untrained")
    for part in build_policy(0):
        part.save_pretrained(folder)
    return str(folder)


SORTS = [case for case in CASES if (case.name, case.split) in [("seed-bench-r1", "train"), ("video-r1", "image")]]


@pytest.mark.parametrize("case", SORTS, ids=["video and image", "image only"])
def test_questions_with_pictures_train(tmp_path, case: Case):
    """A row's pictures reach the policy both when it answers and when its answers are scored."""
    table = concatenate_datasets([load(case.name, *case.write(tmp_path), case.split)] * 4)
    trainer = make_trainer(tmp_path / "run", table, max_steps=1)
    shown = []
    trainer.model.register_forward_pre_hook(lambda module, args, kwargs: shown.append(_shown(kwargs)), with_kwargs=True)
    trainer.train()
    assert logged(trainer, "grad_norm")[0] > 0
    expected = {"image"} if case.split == "image" else {"image", "video"}
    assert shown[-1] == expected, "what scores answers in the loss is blind"
    seen_first = next(kinds for kinds in shown if kinds)
    assert seen_first == expected, "what answers is blind"


def _shown(kwargs: dict[str, Any]) -> set[str]:
    named = {"pixel_values": "image", "pixel_values_videos": "video"}
    features = kwargs.get("mm_encoder_outputs") or {}
    return {named[key] for key in named if kwargs.get(key) is not None} | set(features)


def test_appo_train_takes_a_dataset_by_name(tmp_path, untrained):
    annotations, videos = nextqa(tmp_path)
    files = ["--dataset", "nextqa", "--annotations", str(annotations), "--videos", str(videos), "--split", "val"]
    assert train(tmp_path, "--model", untrained, *files) == 0
    folder = RunFolder.open(tmp_path / "run")
    assert folder.config["script"]["dataset"] == "nextqa"
    (record,) = folder.read_rollouts()
    assert record.answer in "ABE"


MISTAKES = [
    (["--dataset", "nextqa"], "dataset nextqa is read from files: set `annotations`"),
    (["--videos", "clips"], "`videos` and `split` are about a dataset's files"),
    (["--dataset", "nextqua", "--annotations", "{here}"], "unknown dataset 'nextqua'; there are seed-bench-r1"),
    (["--dataset", "perception-test", "--annotations", "{here}", "--videos", "{here}/videos", "--split", "valid",
      "--response_format", "xml"], "response_format is 'xml': it must be one of answer, grounded"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[row[1][:30] for row in MISTAKES])
def test_mistakes_about_datasets_are_one_line(tmp_path, arguments, message, capsys):
    perception_test(tmp_path, cut=75)
    assert train(tmp_path, *(argument.format(here=tmp_path) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_grounded_questions_are_rewarded_for_the_true_spans(tmp_path):
    table = load("nextgqa", *nextgqa(tmp_path))
    assert table[0]["prompt"][0]["content"][-1]["text"].endswith(GROUNDED_INSTRUCTION)
    spoken = [", ".join(f"[{start}, {end}]" for start, end in spans) for spans in table["spans"]]
    completions = [
        f"<think>It lies down.</think><answer>{answer}</answer><time>{times}</time>"
        for answer, times in zip(table["answer"], spoken, strict=True)
    ]
    grounded = {"spans": table["spans"][:], "response_format": table["response_format"][:]}
    assert temporal_iou_reward(completions, **grounded) == [1.0, 1.0]
    assert format_reward(completions, response_format="grounded") == [1.0, 1.0]
    elsewhere = [re.sub(r"<time>.*</time>", "<time>[10, 12]</time>", completion) for completion in completions]
    assert temporal_iou_reward(elsewhere, **grounded) == [0.0, 0.0]
