"""The command line: every end a user can reach, as (arguments, exit code, what it says)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from recipes.tiny_policy.build import build_policy

from appo.cli.main import main
from appo.reports.run_folder import RunFolder
from tests.support.clips import write_clip
from tests.support.runs import clips

RECIPE = Path(__file__).parents[2] / "recipes" / "spotlight.yaml"
TINY = ["--clips", "4", "--max_steps", "1", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1",
        "--num_generations", "4", "--max_completion_length", "10", "--instruction", ""]  # fmt: skip


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> str:
    """An untrained policy in a folder, loaded as any checkpoint is."""
    folder = tmp_path_factory.mktemp("untrained")
    model, processor = build_policy(0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def annotations_with(tmp_path: Path, **change: str) -> Path:
    """Annotations of real clips, one row of which is changed."""
    folder = tmp_path / "world"
    clips(folder, 4)
    file = folder / "annotations.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[1] |= change
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_train_writes_a_run_folder_with_a_loadable_policy(tmp_path, untrained, capsys):
    output = tmp_path / "run"
    assert main(["train", "--config", str(RECIPE), "--model", untrained, "--output_dir", str(output), *TINY]) == 0
    assert f"run folder: {output}" in " ".join(capsys.readouterr().out.split())
    folder = RunFolder.open(output)
    assert folder.config["training"]["method"] == "appo"
    assert folder.config["script"]["model"] == untrained
    assert folder.read_metrics()[0]["step"] == 1
    (record,) = folder.read_rollouts()
    assert len(record.responses) == 4
    assert len(record.timestamps) == len(record.responses[0].frame_attention[0]) == 8
    assert record.timestamps == sorted(record.timestamps)
    assert (output / "policy" / "model.safetensors").exists()


def test_rewards_are_chosen_by_name_or_by_path(tmp_path, untrained):
    output = tmp_path / "run"
    arguments = ["train", "--config", str(RECIPE), "--model", untrained, "--output_dir", str(output), *TINY]
    chosen = ["--rewards", "format", "tests.support.runs:accuracy_reward", "--reward_weights", "0.5", "2"]
    assert main([*arguments, *chosen]) == 0
    (record,) = RunFolder.open(output).read_rollouts()
    first = record.responses[0]
    assert list(first.rewards) == ["format_reward", "accuracy_reward", "soft_overlong_punishment_reward"]
    assert RunFolder.open(output).config["training"]["reward_weights"] == [0.5, 2.0]


ENDS = [
    (["train"], "give a configuration: appo train --config"),
    (["train", "--config", "no-such.yaml"], r"no-such\.yaml"),
    (["train", "--config", str(RECIPE), "--max_wieght", "2"], "max_wieght"),
    (["train", "--config", str(RECIPE), "--max_weight", "heavy"], "max_weight"),
    (["train", "--config", str(RECIPE), "--method", "ppo"], "method must be one of grpo, dapo, appo"),
    (["train", "--config", str(RECIPE), "--num_generations", "7"], "divisible by num_generations"),
    (["train", "--config", str(RECIPE), "--level", "L9"], "unknown level 'L9'"),
    (["train", "--config", str(RECIPE), "--model", "/no/such/model"], "/no/such/model"),
    (["train", "--config", str(RECIPE), "--annotations", "/no/such/file.jsonl"], "/no/such/file.jsonl"),
    (["train", "--config", str(RECIPE), "--rewards", "acuracy"], "acuracy"),
    (["demo", "--color"], "unknown argument --color"),
]


@pytest.mark.parametrize(("arguments", "message"), ENDS, ids=lambda value: " ".join(value[-2:]) if value else "")
def test_users_mistakes_end_with_code_2_and_one_line(tmp_path, arguments, message, capsys):
    if arguments[0] == "train" and len(arguments) > 1:
        arguments = [*arguments, "--output_dir", str(tmp_path / "run"), "--clips", "4"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("appo: ")
    assert error.count("\n") == 1, error
    assert re.search(message, error), error


def test_a_broken_yaml_is_one_line(tmp_path, capsys):
    config = tmp_path / "bad.yaml"
    config.write_text("method: [appo\n")
    assert main(["train", "--config", str(config)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "bad.yaml" in error


VIDEOS = [
    ("gone.mp4", None, "gone.mp4"),
    ("corrupt.mp4", b"this is no video at all" * 50, "corrupt.mp4"),
    ("empty.mp4", b"", "empty.mp4"),
]


@pytest.mark.parametrize(("name", "content", "message"), VIDEOS, ids=[row[0] for row in VIDEOS])
def test_bad_videos_end_with_code_2_and_name_the_file(tmp_path, untrained, name, content, message, capsys):
    annotations = annotations_with(tmp_path, video=name)
    if content is not None:
        (annotations.parent / name).write_bytes(content)
    arguments = ["train", "--config", str(RECIPE), "--model", untrained, "--output_dir", str(tmp_path / "run"), *TINY]
    arguments += ["--max_faulty_videos", "0"]
    code = main([*arguments, "--annotations", str(annotations), "--max_steps", "4"])
    *replaced, error = capsys.readouterr().err.splitlines()
    assert code == 2
    assert error.startswith("appo: ")
    assert message in error
    assert bool(replaced) == (content is not None), "a file that is gone is found before the run, others in it"
    assert all(line.startswith("appo: step ") and message in line for line in replaced)


def test_a_used_run_folder_is_not_written_into(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("precious")
    assert main(["train", "--config", str(RECIPE), "--output_dir", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_bug_of_ours_is_not_hidden(monkeypatch):
    import appo.experiments.demo

    def broken(*args):
        raise AssertionError("ours")

    monkeypatch.setattr(appo.experiments.demo, "run_demo", broken)
    with pytest.raises(AssertionError, match="ours"):
        main(["demo"])


def test_ctrl_c_ends_with_one_line(tmp_path, untrained):
    arguments = ["train", "--config", str(RECIPE), "--model", untrained, "--output_dir", str(tmp_path / "run"), *TINY]
    process = subprocess.Popen(
        [sys.executable, "-m", "appo", *arguments, "--max_steps", "10000"],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not metrics.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    assert metrics.exists(), process.communicate()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.strip().splitlines()[-1].startswith("appo: interrupted, with a checkpoint of step ")
    assert "Traceback" not in error


@pytest.mark.parametrize("command", [[], ["compare"], ["demo"], ["eval"], ["replay"], ["train"]])
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    assert "example:\n  appo " in capsys.readouterr().out


def test_frame_times_on_the_run_folder_come_from_the_file(tmp_path, untrained, capsys):
    """A 4 fps clip of 3 seconds: language-model frames are half-second pairs, at 0.25, 1.25, 2.25 s."""
    import numpy as np

    annotations = annotations_with(tmp_path)
    row = json.loads(annotations.read_text().splitlines()[0])
    frames = np.random.default_rng(0).integers(0, 255, (12, 64, 64, 3), dtype=np.uint8)
    write_clip(annotations.parent / "short.mp4", frames, fps=4)
    annotations.write_text("".join(json.dumps(row | {"video": "short.mp4", "id": str(i)}) + "\n" for i in range(2)))
    output = tmp_path / "run"
    arguments = ["train", "--config", str(RECIPE), "--model", untrained, "--output_dir", str(output), *TINY]
    assert main([*arguments, "--annotations", str(annotations)]) == 0
    (record,) = RunFolder.open(output).read_rollouts()
    assert record.timestamps == [0.25, 1.25, 2.25]
