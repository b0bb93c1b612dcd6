"""`appo spotlight`: flags, exit codes, the page of a video without a run, and the same in the terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from appo.cli.main import main
from appo.reports.console import print_runs
from appo.reports.run_folder import RunFolder, load_run
from appo.video.frame_sampling import SampledVideo
from appo.video.thumbnails import TILE, WIDEST, filmstrip
from appo.world import generate
from tests.reports import page_cases
from tests.reports.page_cases import RECORDED
from tests.support.full_disk import largest_file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return page_cases.folder(tmp_path / "run", [page_cases.group(i) for i in range(3)]).path


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give run folders, or --model, --video and --question"),
        (["runs/none"], "runs/none: no such folder; give the folder that a run wrote"),
        (["runs/none", "--model", "m"], "give run folders, or --model"),
        (["--model", "m"], "--model, --video and --question go together: give --video as well"),
        (["--video", "v", "--question", "q"], "go together: give --model as well"),
        (
            ["--model", "m", "--video", "v", "--question", "q", "--num-generations", "0"],
            "--num-generations is 0: it must be at least 1",
        ),
        (["--model", "m", "--video", "v", "--question", "q", "--answer", ""], "--answer is empty"),
        (["runs/none", "--output", "page.json"], "page.json: name a page that ends in .html"),
        (["runs/none", "--fast"], "unknown argument --fast"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["spotlight", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("appo: ")
    assert error.count("\n") == 1
    assert says in error


def test_the_page_of_a_run_lies_in_its_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["spotlight", str(folder)]) == 0
    assert f"page: {folder / 'spotlight.html'}" in capsys.readouterr().out.replace("\n", "")
    assert len(json.loads((folder / "spotlight.json").read_text())["groups"]) == 3
    assert main(["spotlight", str(folder)]) == 0, "it is made anew"


MODEL_CONFIG = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"}


@pytest.mark.parametrize("config", [json.dumps(MODEL_CONFIG), "[1]", '{"config": 1', ""])
def test_a_folder_without_a_run_is_an_error_that_names_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: str
) -> None:
    """A model's folder has a config.json as well."""
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "rollouts.jsonl").write_text("\n")
    assert main(["spotlight", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{tmp_path}: no run folder (config.json" in error
    assert "metrics.jsonl is missing; rollouts.jsonl is empty); give one that a run wrote" in error
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "rollouts.jsonl"}


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", {"training": {"method": "appo"}})
    assert main(["spotlight", str(run.path)]) == 0
    assert (run.path / "spotlight.html").exists()


def test_on_a_full_disk_the_page_is_the_old_one_or_none(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file.name for file in folder.iterdir()}
    with largest_file(30_000):
        assert main(["spotlight", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "spotlight.html: cannot be written (File too large); check its rights and the free space" in error
    assert {file.name for file in folder.iterdir()} - {"spotlight.json"} == before
    assert main(["spotlight", str(folder)]) == 0
    whole = (folder / "spotlight.html").read_bytes()
    with largest_file(30_000):
        assert main(["spotlight", str(folder)]) == 2
    assert (folder / "spotlight.html").read_bytes() == whole


def test_pages_of_several_or_damaged_runs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "metrics.jsonl").unlink()
    page = tmp_path / "deep" / "both.html"
    assert main(["spotlight", str(folder), str(RECORDED), "--output", str(page)]) == 0
    assert "run: metrics.jsonl is missing" in capsys.readouterr().out
    data = json.loads(page.with_suffix(".json").read_text())
    assert [run["name"] for run in data["runs"]] == ["run", "recorded_run"]


def test_any_checkpoint_and_video_give_a_page(tmp_path: Path) -> None:
    (question,) = generate(tmp_path / "clips", "L1", 1, 5)
    asked = ["--model", "spotlight", "--video", question.video.path, "--question", question.question]
    page = tmp_path / "one.html"
    flags = ["--num-generations", "3", "--max-completion-length", "20", "--output", str(page)]
    assert main(["spotlight", *asked, *flags]) == 0
    (group,) = json.loads(page.with_suffix(".json").read_text())["groups"]
    assert (group["judged"], len(group["responses"])) == (0, 3)
    assert len(group["crucial"]) >= 2
    assert group["film"] is not None
    assert main(["spotlight", *asked, "--answer", question.answer, *flags]) == 0
    (group,) = json.loads(page.with_suffix(".json").read_text())["groups"]
    assert (group["judged"], group["answer"]) == (3, question.answer)


def test_the_terminal_prints_the_most_interesting_groups() -> None:
    console = Console(file=io.StringIO(), width=160, force_terminal=True, color_system="truecolor")
    run = load_run(RECORDED)
    print_runs(console, [run])
    screen = console.file.getvalue()
    best = max(run.groups, key=lambda group: sum(group.id == other.id for other in run.groups))
    assert best.question in screen
    assert "won over" in screen
    assert "7 of 8 right" in screen
    assert "48;2;255;244;214" in screen, "the brightest cell of the heat map"


def test_hostile_texts_do_not_reach_the_terminal(tmp_path: Path) -> None:
    """Neither escape sequences of a response nor markup of rich are obeyed."""
    bad = "\x1b[2J\x1b]0;title\x07 [bold red]x[/] [/nothing]"
    one = page_cases.replace(page_cases.group(1).responses[0], text=bad, tokens=[bad] * 12)
    console = Console(file=io.StringIO(), width=200)
    print_runs(console, [page_cases.run([page_cases.group(1, question=bad, answer=bad, responses=[one])], name=bad)])
    screen = console.file.getvalue()
    assert "\x1b" not in screen
    assert "[bold red]x[/]" in screen


def sampled(*shape: int) -> SampledVideo:
    frames_THWC = np.full(shape, 200, np.uint8)
    frames_THWC[::2] = 20  # the first of each pair is the one shown
    return SampledVideo("a", frames_THWC, tuple(map(float, range(shape[0]))), 1.0, shape[0], tuple(range(shape[0])))


def test_a_film_has_a_tile_for_each_frame_the_model_sees() -> None:
    with Image.open(io.BytesIO(filmstrip([sampled(6, 240, 320, 3), sampled(3, 320, 160, 3)], 2))) as picture:
        assert picture.size == (5 * TILE[0], TILE[1])
        assert max(np.asarray(picture)[:, : 3 * TILE[0]].mean(axis=(0, 2))) < 30
    with Image.open(io.BytesIO(filmstrip([sampled(600, 24, 96, 3)], 2))) as picture:
        assert picture.width <= WIDEST
        assert picture.width % 300 == 0
    assert filmstrip([], 2) == b""
