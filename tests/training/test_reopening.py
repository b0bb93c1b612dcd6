"""A run that fails before it recorded anything leaves nothing, so that the corrected command can be given."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from appo.cli.main import main
from appo.reports.run_folder import CONFIG, RunFolder
from appo.training.arguments import parse
from appo.training.resume import Found, undone_on_error
from appo.training.run import train

RECIPE = str(Path(__file__).parents[2] / "recipes" / "spotlight.yaml")
FAST = ["--clips", "4", "--max_steps", "1", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1",
        "--num_generations", "4", "--max_completion_length", "8"]  # fmt: skip


def not_yet(completions: list[object], **kwargs: object) -> list[float]:
    raise RuntimeError("not written yet")


STARTS = [
    ["--reward_weights", "1", "2", "3"],  # found when the trainer is built
    ["--limit", "5"],  # more rows than there are
    ["--video_min_pixels", "9999", "--video_max_pixels", "784"],  # contradicts, known with the processor
    ["--rewards", "test_reopening:not_yet"],  # found in the first step
]


@pytest.mark.parametrize("wrong", STARTS, ids=lambda words: words[0])
def test_the_corrected_command_works_after_a_start_that_failed(tmp_path, wrong):
    output = tmp_path / "deep" / "run"
    command = ["train", "--config", RECIPE, "--output_dir", str(output), *FAST]
    assert main([*command, *wrong]) == 2
    assert not output.exists()
    if wrong is STARTS[-1]:
        assert main(command) == 0
        assert RunFolder.open(output).read_metrics()


def test_nothing_is_written_until_the_trainer_is_built(tmp_path, monkeypatch):
    """A killed start cannot take anything back."""
    output = tmp_path / "run"

    def killed(*args: object, **kwargs: object) -> None:
        assert not output.exists()
        raise SystemExit(9)

    monkeypatch.setattr("appo.training.run.make_trainer", killed)
    with pytest.raises(SystemExit):
        train(*parse(["--config", RECIPE, "--output_dir", str(output), *FAST]), Console(quiet=True))
    assert not output.exists()


def fails_in(found: Found) -> None:
    with pytest.raises(RuntimeError, match="first"), undone_on_error(found):
        raise RuntimeError("first")


def started(path: Path) -> RunFolder:
    folder = RunFolder.create(path, {})
    (path / "clips").mkdir()
    (path / "clips" / "a.mp4").write_text("")
    return folder


def test_what_a_start_made_is_taken_back(tmp_path):
    fails_in(Found(started(tmp_path / "new"), is_new=True, existed=False))
    assert not (tmp_path / "new").exists()
    fails_in(Found(started(tmp_path / "there"), is_new=True, existed=True))
    assert list((tmp_path / "there").iterdir()) == []
    fails_in(Found(RunFolder(tmp_path / "never"), is_new=True, existed=False))


@pytest.mark.parametrize(
    "kept", ["metrics.jsonl", "rollouts.jsonl", "faults.jsonl", "checkpoint-0/x", "frames/x.webp", "mine"]
)
def test_whatever_else_is_there_keeps_everything(tmp_path, kept):
    folder = started(tmp_path / "run")
    (folder.path / kept).parent.mkdir(exist_ok=True)
    (folder.path / kept).write_text("x")
    before = sorted(folder.path.rglob("*"))
    fails_in(Found(folder, is_new=True, existed=False))
    assert sorted(folder.path.rglob("*")) == before


def test_of_a_run_that_is_gone_on_with_nothing_is_taken(tmp_path):
    folder = started(tmp_path / "run")
    fails_in(Found(folder, is_new=False))
    assert (folder.path / CONFIG).exists()
