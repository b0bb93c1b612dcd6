"""Videos that break while a run goes on: replaced, counted, named; the rest of the run is as if they had not been."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from appo import APPOTrainer
from appo.reports.run_folder import FAULTS, RunFolder
from appo.training.atomic_checkpoint import last_complete
from appo.training.faults import PATIENCE, FaultyVideosError, VideoFaults
from appo.types import VideoSource
from appo.video import reader as video
from appo.video.decode_worker import Decoder
from tests.support.runs import logged, rows_of
from tests.support.stand_ins import stuck_decode_frames
from tests.training.resume_cases import differences, go_on, killed_after, metrics_of, questions, recorded

SETTINGS = {"method": "dapo", "max_resampling_rounds": 1, "overlong_cache": 0}


class Breaking(TrainerCallback):
    """Does something to the world after a step."""

    def __init__(self, step: int, action: Callable[[], Any]) -> None:
        self._step, self._action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            self._action()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


WAYS: dict[str, Callable[[Path], Any]] = {
    "truncated": truncate,
    "replaced by text": lambda file: file.write_text("sorry, this video is gone\n"),
    "emptied": lambda file: file.write_bytes(b""),
    "deleted": Path.unlink,
}


def videos_of(rows: Dataset) -> list[Path]:
    return [Path(video_of(row)) for row in rows]


def video_of(row: dict[str, Any]) -> str:
    return str(row["prompt"][0]["content"][0]["video"])


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: Any) -> Path:
    """Seven clips that no test changes."""
    folder = tmp_path_factory.mktemp("clips")
    questions(folder)
    return folder


@pytest.fixture
def rows(healthy: Path, tmp_path: Path) -> Dataset:
    """Seven rows about copies of them."""
    shutil.copytree(healthy, tmp_path / "clips")
    return rows_of(
        [
            qa.__class__(**{**vars(qa), "video": VideoSource(str(tmp_path / "clips" / Path(qa.video.path).name))})
            for qa in questions(healthy)
        ]
    )


class Watched:
    """A run, and which videos each of its rollouts was about."""

    def __init__(self, folder: Path, rows: Dataset, breaks: Breaking | None = None, **settings: Any) -> None:
        RunFolder.create(folder, {})
        self.trainer: APPOTrainer = recorded(folder, rows, **{**SETTINGS, **settings})
        self.shown: list[tuple[int, list[str]]] = []
        record = self.trainer.on_rollout

        def watching(step: int, groups: Any) -> None:
            self.shown.append((step, [video_of(group.row) for group in groups]))
            record(step, groups)

        self.trainer.on_rollout = watching
        if breaks:
            self.trainer.add_callback(breaks)

    @property
    def log(self) -> list[dict[str, Any]]:
        file = Path(self.trainer.args.output_dir) / FAULTS
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def first_shown_late(folder: Path, rows: Dataset, **settings: Any) -> Path:
    """A video that an undisturbed run first asks for in its third rollout or later: read off the run itself."""
    run = Watched(folder, rows, **settings)
    asked: list[tuple[int, str]] = []
    read = run.trainer.encoder.videos.read

    def asking(source: Any) -> Any:
        asked.append((run.trainer.state.global_step, source.path))
        return read(source)

    run.trainer.encoder.videos.read = asking  # type: ignore[method-assign]
    run.trainer.train()
    early = {path for step, path in asked if step < 2}
    late = [path for step, path in asked if path not in early]
    again = [path for step, path in asked if step >= 2]
    return Path((late or again)[0])


@pytest.mark.parametrize("way", WAYS)
def test_a_video_that_breaks_is_replaced_counted_and_named(tmp_path, rows, way, capfd) -> None:
    file = first_shown_late(tmp_path / "before", rows)
    run = Watched(tmp_path / "run", rows, Breaking(2, lambda: WAYS[way](file)))
    run.trainer.train()
    assert run.trainer.state.global_step == 6
    assert all(str(file) not in shown for step, shown in run.shown if step >= 2)
    assert [len(shown) for _, shown in run.shown] == [2] * 6, "every rollout is as large as it was"
    assert run.log, "the broken video was never asked for: the test proves nothing"
    (row_id,) = [row["id"] for row in rows if video_of(row) == str(file)]
    for fault in run.log:
        assert (fault["file"], fault["id"]) == (str(file), row_id)
        assert fault["step"] >= 2
        assert str(file) in fault["reason"]
    counted = logged(run.trainer, "faults/videos")
    assert counted == sorted(counted)
    assert (counted[1], counted[-1]) == (0.0, float(len(run.log)))
    printed = [line for line in capfd.readouterr().err.splitlines() if line.startswith("appo: step ")]
    assert len(printed) == len(run.log)
    assert f"row {row_id} is replaced" in printed[0]


def test_the_rest_of_the_run_is_that_of_the_same_rows_with_good_videos(tmp_path, rows, monkeypatch) -> None:
    """The reference never meets a broken file: there the same row is refused for another reason."""
    file = first_shown_late(tmp_path / "before", rows)
    run = Watched(tmp_path / "run", rows, Breaking(2, file.unlink))
    saved = file.read_bytes()
    run.trainer.train()
    file.write_bytes(saved)
    reference = Watched(tmp_path / "reference", rows)
    can_read = reference.trainer._can_read

    def refusing(row: Any) -> bool:
        return can_read(row) and not (reference.trainer.state.global_step >= 2 and video_of(row) == str(file))

    monkeypatch.setattr(reference.trainer, "_can_read", refusing)
    reference.trainer.train()
    assert run.log
    assert reference.log == []
    assert run.shown == reference.shown
    assert logged(run.trainer, "loss") == logged(reference.trainer, "loss")
    assert any(logged(run.trainer, "loss"))
    assert logged(run.trainer, "grad_norm") == logged(reference.trainer, "grad_norm")
    for a, b in zip(run.trainer.model.parameters(), reference.trainer.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_with_faults_resumes_exactly(tmp_path, rows, step) -> None:
    file = first_shown_late(tmp_path / "before", rows)
    whole = Watched(tmp_path / "whole", rows, Breaking(2, file.unlink))
    whole.trainer.train()
    assert whole.log
    resumed = go_on(killed_after(tmp_path / "whole", tmp_path / "resumed", step), rows, **SETTINGS)
    assert differences(resumed, whole.trainer) == []
    assert (tmp_path / "resumed" / FAULTS).read_bytes() == (tmp_path / "whole" / FAULTS).read_bytes()


@pytest.mark.parametrize("sign", ["hang", "crash"])
def test_a_decoder_that_hangs_or_crashes_costs_one_row(tmp_path, rows, monkeypatch, sign) -> None:
    monkeypatch.setattr(video, "decode_frames", stuck_decode_frames)
    file = videos_of(rows)[3]
    file.with_suffix(f".{sign}").touch()
    run = Watched(tmp_path / "run", rows, decode_timeout=2.0, max_steps=4)
    run.trainer.train()
    assert run.log
    assert {fault["file"] for fault in run.log} == {str(file)}
    assert ("did not end within 2 s" if sign == "hang" else "ended the process") in run.log[0]["reason"]
    assert all(str(file) not in shown for _, shown in run.shown)


def test_too_many_faults_stop_with_a_checkpoint_that_resumes(tmp_path, rows) -> None:
    """Two of seven break, one is allowed; repaired, the run goes on, as it would with none allowed at all."""
    broken = videos_of(rows)[:2]
    saved = {file: file.read_bytes() for file in broken}
    settings = {"max_faulty_videos": 1, "save_strategy": "no", "max_steps": 12}
    run = Watched(tmp_path / "run", rows, Breaking(1, lambda: [file.unlink() for file in broken]), **settings)
    with pytest.raises(
        FaultyVideosError, match=r"2 videos cannot be shown, 1 are allowed \(max_faulty_videos\)"
    ) as error:
        run.trainer.train()
    stopped = run.trainer.state.global_step
    assert 1 < stopped < 12
    assert "\n" not in str(error.value)
    assert f"checkpoint of step {stopped} in {tmp_path / 'run'}" in str(error.value)
    assert last_complete(tmp_path / "run").path == tmp_path / "run" / f"checkpoint-{stopped}"
    assert {fault["file"] for fault in run.log} == {str(file) for file in broken}
    with pytest.raises(FaultyVideosError):
        recorded(tmp_path / "run", rows, **{**SETTINGS, **settings}).train(resume_from_checkpoint=True)
    for file, content in saved.items():
        file.write_bytes(content)
    trainer = recorded(tmp_path / "run", rows, **{**SETTINGS, **settings})
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 12
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [*range(1, 13), 12]


def test_when_no_video_is_left_the_last_step_is_saved(tmp_path, rows) -> None:
    """As when a disk is unmounted: nothing can take a row's place. Back again, the run is the undisturbed one."""
    settings = {**SETTINGS, "save_strategy": "no", "max_steps": 4}
    run = Watched(
        tmp_path / "run", rows, Breaking(2, lambda: (tmp_path / "clips").rename(tmp_path / "away")), **settings
    )
    with pytest.raises(
        FaultyVideosError, match=r"cannot be opened \(No such file or directory\).*checkpoint of step 2"
    ):
        run.trainer.train()
    (tmp_path / "away").rename(tmp_path / "clips")
    whole = Watched(tmp_path / "whole", rows, **settings)
    whole.trainer.train()
    resumed = go_on(tmp_path / "run", rows, **settings)
    assert resumed.state.global_step == 4
    names = ("parameters", "optimiser", "rollouts")
    assert not set(differences(resumed, whole.trainer)) & set(names)


def test_a_dataset_without_any_video_is_refused_at_once(tmp_path, rows) -> None:
    shutil.rmtree(tmp_path / "clips")
    run = Watched(tmp_path / "run", rows, max_faulty_videos=2)
    with pytest.raises(FaultyVideosError, match=r"7 videos|videos cannot be shown, 2 are allowed"):
        run.trainer.train()
    assert len(run.log) == 2 + PATIENCE + 1
    assert last_complete(tmp_path / "run").path is None


# --- bookkeeping, by hand ---------------------------------------------------------------------------------------------


class Files:
    """Videos of which some are bad."""

    def __init__(self, *bad: str) -> None:
        self.bad = set(bad)

    def read(self, source: Any) -> None:
        if source.path in self.bad:
            raise video.CorruptVideoError(source.path, "is\nbad", "leave it out")


def row(name: str) -> dict[str, Any]:
    return {"id": f"row {name}", "prompt": [{"role": "user", "content": [{"type": "video", "video": name}]}]}


def shown(faults: VideoFaults, files: Files, names: str, others: Any = ()) -> list[bool]:
    result: list[bool] = []
    faults.attempt(
        lambda: result.extend(faults.can_read(row(n), files, 0) for n in names) or [], lambda s: [s, *others]
    )
    return result


def test_files_count_once_and_a_repaired_one_no_longer(tmp_path) -> None:
    faults, files = VideoFaults(tmp_path, limit=1), Files("b", "c")
    assert shown(faults, files, "abb") == [True, False, False]
    assert (faults.count, faults.files, faults.stop) == (2, {"b"}, "")
    files.bad = {"c"}
    assert shown(faults, files, "bc") == [True, False]
    assert (faults.count, faults.files, faults.stop) == (3, {"c"}, ""), "b was repaired, one is bad at a time"
    files.bad = {"b", "c"}
    again = VideoFaults(tmp_path, limit=1)
    again.restore(json.loads(json.dumps(faults.state())))
    shown(again, files, "b")
    assert again.stop.startswith("2 videos cannot be shown, 1 are allowed")
    assert [json.loads(line)["file"] for line in (tmp_path / FAULTS).read_text().splitlines()] == list("bbcb")


def test_processes_agree_and_one_of_them_tells(tmp_path, capsys) -> None:
    """What the other process has found is known here; where it finds nothing, both stop."""
    quiet, files = VideoFaults(tmp_path, limit=0, is_main=False), Files("a")
    other = VideoFaults(tmp_path, limit=0)
    messages: list[Any] = []
    other.attempt(lambda: [other.can_read(row("a"), files, 7)], lambda said: messages.append(said) or [said])
    assert quiet.attempt(lambda: ["fine"], lambda said: [said, messages[0]]) == ["fine"]
    assert (quiet.files, quiet.count, bool(quiet.stop)) == ({"a"}, 1, True)
    assert len(capsys.readouterr().err.splitlines()) == 1, "only the one that tells"
    assert quiet.attempt(lambda: ["fine"], lambda said: [said, (messages[0][0], [], True)]) is None


def test_a_fault_is_one_line_however_the_error_is_written(tmp_path, capsys) -> None:
    shown(VideoFaults(tmp_path, limit=5), Files("a"), "a")
    assert capsys.readouterr().err == "appo: step 0, row row a is replaced: a: is bad; leave it out\n"


def test_settings_are_checked(tmp_path) -> None:
    from appo import APPOConfig
    from tests.support.runs import FAST

    for name, value in (("decode_timeout", 0.0), ("max_faulty_videos", -1)):
        with pytest.raises(ValueError, match=name):
            APPOConfig(str(tmp_path), **{**FAST, name: value})
    assert Decoder(3.0).limit == 3.0
