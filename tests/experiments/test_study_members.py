"""Who takes part in a study, read from the command line; what cannot be meant is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from appo.cli.main import main
from appo.experiments.study.settings import Perceiver, Reasoner, perceiver_of, reasoner_of
from appo.world.world import TASKS


@pytest.mark.parametrize(
    ("text", "perceiver"),
    [
        ("truth", Perceiver("truth", "truth")),
        ("nothing", Perceiver("nothing", "nothing")),
        ("truth@0.4", Perceiver("truth@0.4", "truth", 0.4)),
        ("blurred=truth@1", Perceiver("blurred", "truth", 1.0)),
        ("spotlight", Perceiver("spotlight", "spotlight")),
        ("7b=Qwen/Qwen2.5-VL-7B-Instruct", Perceiver("7b", "Qwen/Qwen2.5-VL-7B-Instruct")),
        ("mine=runs/demo=3/policy@.25", Perceiver("mine", "runs/demo=3/policy", 0.25)),
        ("mine=runs/a@b/policy", Perceiver("mine", "runs/a@b/policy")),
    ],
)
def test_perceivers(text: str, perceiver: Perceiver) -> None:
    assert perceiver_of(text) == perceiver


@pytest.mark.parametrize(
    ("text", "reasoner"),
    [
        ("rules", Reasoner("rules", "rules", TASKS)),
        ("weak=rules:colour,when", Reasoner("weak", "rules", ("colour", "when"))),
        ("8b=Qwen/Qwen3-8B", Reasoner("8b", "Qwen/Qwen3-8B")),
        ("o3=openai:o3", Reasoner("o3", "o3", url="")),
        ("r=openai:meta/llama@v2@http://[::1]:8000/v1", Reasoner("r", "meta/llama@v2", url="http://[::1]:8000/v1")),
        ("r=openai:/a/b@https://host/v1", Reasoner("r", "/a/b", url="https://host/v1")),
    ],
)
def test_reasoners(text: str, reasoner: Reasoner) -> None:
    assert reasoner_of(text) == reasoner


WORLD = ["--perceiver", "truth", "--reasoner", "rules"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--reasoner", "rules"], "a study needs at least one --perceiver"),
        (["--perceiver", "truth"], "a study needs at least one --reasoner"),
        (["--perceiver", "a/b"], "write NAME=SOURCE, such as --perceiver vl7b="),
        (["--perceiver", "a__b=truth"], "no double _"),
        (["--perceiver", "../x=truth"], "write NAME=SOURCE"),
        (["--perceiver", "x="], "write NAME=SOURCE"),
        ([*WORLD, "--perceiver", "Truth=truth@0.1"], "--perceiver truth is there twice"),
        (["--reasoner", "r=rules:smell"], "there is no task 'smell'; there are colour, shape, first, when"),
        (["--reasoner", "r=openai:"], "names no model"),
        ([*WORLD, "--level", "L9"], "--level L9: there are L1, L2, L3"),
        ([*WORLD, "--dataset", "jsonl", "--annotations", "x"], "truth, noise and rules are of the embedded world"),
        ([*WORLD, "--price", "o3=1,2"], "--price o3: write NAME=..., of a reasoner behind an endpoint; there is none"),
        ([*WORLD, "--reasoner", "o=openai:m", "--price", "o=1"], "--price o=1: write dollars a million tokens"),
        ([*WORLD, "--reasoner", "o=openai:m", "--price", "o=1,-2"], "--price o=1,-2: write dollars a million tokens"),
        ([*WORLD, "--reasoner", "o=openai:m", "--key", "o="], "--key o: write NAME="),
        (
            [*WORLD, "--reasoner", "o=openai:m", "--budget", "3"],
            "--budget needs the prices of o: --price o=READ,WRITTEN",
        ),
        (["--perceiver", "p=/nowhere/at/all", "--reasoner", "rules"], "/nowhere/at/all"),
        ([*WORLD, "--smell"], "unknown argument --smell; `appo study --help`"),
    ],
)
def test_what_cannot_be_meant_is_refused(words: list[str], said: str, tmp_path: Path, capsys: Any) -> None:
    assert main(["study", "--output", str(tmp_path / "study"), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("appo: ")
    assert said in line
    assert not (tmp_path / "study" / "eval.json").exists()


def test_a_missing_key_fails_before_any_description(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    words = [*WORLD, "--reasoner", "o3=openai:o3", "--limit", "3"]
    assert main(["study", "--output", str(tmp_path / "study"), *words]) == 2
    assert capsys.readouterr().err == "appo: o3: $OPENAI_API_KEY is not set; set it, or name another by --key\n"
    assert not (tmp_path / "study").exists()


def test_help_shows_examples(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["study", "--help"])
    assert stop.value.code == 0
    assert "appo study --perceiver truth@0.4" in capsys.readouterr().out
