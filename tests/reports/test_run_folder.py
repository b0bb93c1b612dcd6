"""The run folder: killed runs can go on, what is damaged is named. Rollouts are in test_record_rollouts.py."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from appo.reports.jsonl import RecordError, TornLineWarning
from appo.reports.run_folder import RunFolder
from tests.reports.record_cases import RECORD


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", {"seed": 1})


# --- config.json --------------------------------------------------------------------------------------------


class Colour(Enum):
    RED = "red"


@dataclass
class Nested:
    size: int
    path: Path


def test_create_writes_what_the_run_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["appo", "train"])
    config = {
        "lr": 1e-6,
        "nan": math.nan,
        "dtype": torch.bfloat16,
        "nested": Nested(3, Path("a/b")),
        "colour": Colour.RED,
        "array": np.arange(3),
        5: {"x"},
        "none": None,
    }
    run = RunFolder.create(tmp_path / "deep" / "run", config)
    assert RunFolder.open(str(run.path)) == run
    assert run.config == {
        "lr": 1e-6,
        "nan": None,
        "dtype": "torch.bfloat16",
        "nested": {"size": 3, "path": str(Path("a/b"))},
        "colour": "red",
        "array": [0, 1, 2],
        "5": ["x"],
        "none": None,
    }
    info = run.describe()
    assert list(info) == ["config", "versions", "git_commit", "argv", "started", "platform"]
    assert info["argv"] == ["appo", "train"]
    assert info["versions"]["python"].split(".")[0] == "3"
    assert info["versions"]["torch"] == metadata.version("torch")
    assert set(info["versions"]) == {"python", "appo", "torch", "transformers", "trl", "accelerate", "av"}
    assert info["started"].endswith("+00:00"), "UTC"
    assert run.frames.is_dir()
    assert run.read_metrics() == []
    assert list(run.read_rollouts()) == []


def test_the_commit_is_that_of_the_current_directory_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert RunFolder.create("outside", {}).describe()["git_commit"] is None
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert RunFolder.create("unborn", {}).describe()["git_commit"] is None, "a repository without a commit"
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip()
    assert RunFolder.create("inside", {}).describe()["git_commit"] == head
    monkeypatch.setenv("PATH", str(tmp_path))
    assert RunFolder.create("without_git", {}).describe()["git_commit"] is None


def test_create_takes_an_empty_folder_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    run = RunFolder.create(tmp_path / "run", {})
    for _ in range(2):
        with pytest.raises(RecordError, match=r"run: the run folder is not empty; choose another one"):
            RunFolder.create(run.path, {"other": 1})
    assert run.config == {}, "the old run is untouched"


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}", '{"config": 3}', "\ud800", "[" * 100_000])
def test_open_names_a_damaged_config(run: RunFolder, content: str) -> None:
    (run.path / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(RecordError, match=r"config\.json: damaged .*; restore it"):
        RunFolder.open(run.path)


def test_open_of_what_is_no_run(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(RecordError, match=r"no run folder .* give the folder that a run wrote"):
            RunFolder.open(path)


# --- metrics.jsonl ------------------------------------------------------------------------------------------


def test_metrics_come_back_and_every_line_is_strict_json(run: RunFolder) -> None:
    run.append_metrics({"step": 1, "loss": 0.1234567890123, "nan": math.nan, "nested": {"inf": [-math.inf, 1]}})
    run.append_metrics({"tensor": torch.tensor(2.5), "array": np.float32(0.5), "flag": np.bool_(True), "é": "\n"})
    expected = [
        {"step": 1, "loss": 0.1234567890123, "nan": None, "nested": {"inf": [None, 1]}},
        {"tensor": 2.5, "array": 0.5, "flag": True, "é": "\n"},
    ]
    assert run.read_metrics() == expected

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (run.path / "metrics.jsonl").read_text().split("\n")
    assert [json.loads(line, parse_constant=refuse) for line in lines[:-1]] == expected
    assert lines[-1] == ""


def test_a_line_is_on_disk_as_soon_as_it_is_written(run: RunFolder) -> None:
    code = (
        "import os, sys; from appo.reports.run_folder import RunFolder; run = RunFolder.open(sys.argv[1]);"
        "run.append_metrics({'step': 1}); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run.path)], check=False)
    assert done.returncode == 9, "killed without any clean-up"
    assert run.read_metrics() == [{"step": 1}]


def written(run: RunFolder, steps: int = 3) -> Path:
    for step in range(steps):
        run.append_metrics({"step": step, "text": "é"})
    return run.path / "metrics.jsonl"


def test_a_file_cut_anywhere_can_be_read_and_continued(run: RunFolder) -> None:
    """Every length a killed run could leave: whole lines survive, a torn one is reported, the next is sound."""
    file = written(run)
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    for size in range(len(whole) + 1):
        file.write_bytes(whole[:size])
        # A line that lacks its line end only is complete.
        complete = sum(len(b"".join(lines[: i + 1])) - 1 <= size for i in range(len(lines)))
        torn = size not in {len(b"".join(lines[:i])) - end for i in range(len(lines) + 1) for end in (0, 1)}
        for action in (run.read_metrics, lambda: run.append_metrics({"step": 99})):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                result = action()
            assert [w.category for w in caught] == [TornLineWarning] * torn
            assert all("metrics.jsonl" in str(w.message) for w in caught)
            if result is not None:
                assert [m["step"] for m in result] == list(range(complete))
        assert [m["step"] for m in run.read_metrics()] == [*range(complete), 99]


@pytest.mark.parametrize("bad", [b"{", b"garbage", b"3", b"[]", b"null", b"\xff\xfe", b"\0\0\0\0", b'{"a": 1}{"b": 2}'])
def test_a_damaged_line_in_the_middle_is_named(run: RunFolder, bad: bytes) -> None:
    file = written(run)
    lines = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([lines[0], bad, lines[2]]) + b"\n")
    with pytest.raises(RecordError, match=r"metrics\.jsonl, line 2: damaged .*; delete this line or restore"):
        run.read_metrics()
    file.write_bytes(b"\n".join([lines[0], lines[1], bad]) + b"\n\n")
    with pytest.warns(TornLineWarning, match="line 3: the last line is torn"):
        assert len(run.read_metrics()) == 2


def test_blank_lines_are_skipped(run: RunFolder) -> None:
    file = written(run)
    file.write_bytes(file.read_bytes().replace(b"\n", b"\n\n \r\n"))
    assert [m["step"] for m in run.read_metrics()] == [0, 1, 2]


# --- what cannot be written ---------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RecordError, match=r"file.*: cannot be written \(.*\); check") as raised:
            RunFolder.create(path, {})
        assert "\n" not in str(raised.value)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk(run: RunFolder) -> None:
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        (run.path / name).symlink_to("/dev/full")
    for append in (lambda: run.append_metrics({"a": 1}), lambda: run.append_rollout(RECORD)):
        with pytest.raises(RecordError, match=r"jsonl: cannot be written \(No space left on device\)") as raised:
            append()
        assert "\n" not in str(raised.value)


def test_no_right_to_write_or_read(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    written(run)

    def refuse(self: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(RecordError, match=r"metrics\.jsonl: cannot be written \(Permission denied\); check its rights"):
        run.append_metrics({"a": 1})
    with pytest.raises(RecordError, match=r"metrics\.jsonl: cannot be read \(Permission denied\); check the path"):
        run.read_metrics()
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(RecordError, match=r"other: cannot be written \(Permission denied\)"):
        RunFolder.create(run.path / "other", {})


# --- layering -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["rewards.templates", "rewards.functions", "reports.run_folder"])
def test_these_modules_need_the_standard_library_only(module: str) -> None:
    heavy = ("torch", "transformers", "trl", "datasets", "numpy", "av")
    code = f"import sys, appo.{module}; print([name for name in {heavy!r} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
