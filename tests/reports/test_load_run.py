"""Whole, partial and damaged run folders: what is sound is shown, what is missing is said, nothing raises."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from appo.reports.jsonl import RecordError
from appo.reports.page import page_data, write_page
from appo.reports.run_folder import RunFolder, load_run
from tests.reports import page_cases


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return page_cases.folder(tmp_path / "run", [page_cases.group(i) for i in range(3)]).path


def test_a_whole_run_has_nothing_to_note(folder: Path) -> None:
    run = load_run(folder)
    assert (run.name, run.notes, len(run.groups), len(run.metrics)) == ("run", [], 3, 2)
    assert run.groups == list(RunFolder.open(folder).read_rollouts())
    assert set(run.films) == {group.film for group in run.groups}
    assert run.settings == {"method": "appo", "max_weight": 1.7}


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str, part: float) -> Callable[[Path], object]:
    return lambda folder: os.truncate(folder / name, int((folder / name).stat().st_size * part))


def drop_frames(folder: Path) -> None:
    for file in (folder / "frames").iterdir():
        file.unlink()
    (folder / "frames").rmdir()


DAMAGE: dict[str, tuple[Callable[[Path], object], str, int]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing", 3),
    "empty config": (write("config.json", b""), "config.json is damaged", 3),
    "cut config": (cut("config.json", 0.5), "config.json is damaged", 3),
    "deep config": (write("config.json", b"[" * 100_000), "config.json is damaged", 3),
    "list config": (write("config.json", b"[1]"), "config.json is damaged (no JSON object)", 3),
    "no metrics": (lambda f: (f / "metrics.jsonl").unlink(), "metrics.jsonl is missing", 3),
    "empty metrics": (write("metrics.jsonl", b""), "metrics.jsonl is empty", 3),
    "torn metrics": (cut("metrics.jsonl", 0.9), "metrics.jsonl: line 2 is no record", 3),
    "binary metrics": (write("metrics.jsonl", b"\xff\xfe\x00\n" * 5), "5 lines (1, 2, 3, …) are no records", 3),
    "no rollouts": (lambda f: (f / "rollouts.jsonl").unlink(), "rollouts.jsonl is missing", 0),
    "empty rollouts": (write("rollouts.jsonl", b"\n\n"), "rollouts.jsonl is empty", 0),
    "torn rollouts": (cut("rollouts.jsonl", 0.8), "rollouts.jsonl: line 3 is no record", 2),
    "other rollouts": (write("rollouts.jsonl", b'{"step": 1}\n{"step": {}}\n'), "2 lines (1, 2) are no records", 0),
    "huge number": (write("rollouts.jsonl", b'{"step": ' + b"9" * 10_000 + b"}\n"), "line 1 is no record", 0),
    "no frames": (drop_frames, "no picture for 3 of 3 groups", 3),
}


@pytest.mark.parametrize(("damage", "says", "groups"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_gives_a_page_with_notes(
    folder: Path, damage: Callable[[Path], object], says: str, groups: int
) -> None:
    damage(folder)
    run = load_run(folder)
    assert any(says in note for note in run.notes), run.notes
    data = json.loads(write_page(folder / "spotlight.html", [run]).with_suffix(".json").read_text())
    assert len(data["groups"]) == groups
    assert any(says in note for note in data["runs"][0]["notes"])


def test_rollouts_cut_anywhere_give_a_page(folder: Path) -> None:
    file = folder / "rollouts.jsonl"
    whole = file.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(0, len(whole), 997):
        file.write_bytes(whole[:size])
        assert len(page_data([load_run(folder)])["groups"]) == sum(end - 1 <= size for end in ends)


@pytest.mark.parametrize(
    "change",
    [
        {"timestamps": []},
        {"timestamps": [1.0] * 2},
        {"crucial_frames": [-5, 10**30]},
        {"event_frames": [77]},
        {"responses": []},
        {"film": "../config.json"},
        {"film": "/etc/hostname"},
        {"film": "\x00"},
        {"film": "a" * 5000},
        {"film": ".."},
    ],
    ids=str,
)
def test_records_that_contradict_themselves_are_rendered_as_far_as_they_go(folder: Path, change: dict) -> None:
    line = json.loads((folder / "rollouts.jsonl").read_text().splitlines()[0])
    (folder / "rollouts.jsonl").write_text(json.dumps({**line, **change}) + "\n")
    data = page_data([load_run(folder)])
    (group,) = data["groups"]
    frames = len(group["times"])
    assert all(0 <= frame < frames for frame in [*group["crucial"], *group["event"]])
    assert all(len(one["heat"]) == frames for one in group["responses"])
    if "film" in change:
        assert group["film"] is None, "a record names pictures of its own folder only"
        assert data["films"] == {}


def test_a_picture_that_is_none_is_left_out(folder: Path) -> None:
    for file in (folder / "frames").iterdir():
        file.write_bytes(b"<svg onload=alert(1)>")
    data = page_data([load_run(folder)])
    assert data["films"] == {}
    assert [group["film"] for group in data["groups"]] == [None] * 3


def test_of_many_groups_the_films_and_an_even_choice_are_rendered(tmp_path: Path) -> None:
    filmed = [page_cases.group(1000 + i, id="film", question="?", video="v", tokens=2) for i in range(5)]
    others = [page_cases.group(i, tokens=2) for i in range(50)]
    run = RunFolder.create(tmp_path / "run", {})
    for one in [*others[:25], *filmed, *others[25:]]:
        run.append_rollout(one)
    seen = load_run(run.path, 15)
    assert [one.step for one in seen.groups if one.id == "film"] == [1000, 1001, 1002, 1003, 1004]
    assert [one.step for one in seen.groups if one.id != "film"] == list(range(0, 50, 5))
    assert any("15 of 55 recorded groups are shown" in note for note in seen.notes)


def test_what_is_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no such folder; give the folder that a run wrote"):
        load_run(tmp_path / "none")
    with pytest.raises(RecordError, match=r"no run folder \(config\.json is missing; metrics\.jsonl is missing; "):
        load_run(tmp_path)


def test_a_picture_is_saved_once_and_no_picture_has_no_name(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", {})
    names = {run.save_film(b"picture"), run.save_film(b"picture"), run.save_film(b"other")}
    assert len(names) == len(list(run.frames.iterdir())) == 2
    assert run.save_film(b"") == ""
