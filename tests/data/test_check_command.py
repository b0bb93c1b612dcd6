"""appo data check: exit codes, what is printed and written, paths that can be mended, decoders that hang or crash."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoProcessor

from appo.cli.data_check import run_check
from appo.cli.main import main
from appo.data import validation as checking
from appo.data.validation import CATEGORIES, check, find_fix
from appo.types import VideoSource
from appo.video.decode_worker import WorkerFailure, run_tasks
from appo.video.frame_cache import FrameCache
from appo.video.reader import FrameSampling
from appo.world import policy_path
from tests.data.check_cases import QUESTION, good_rows, put_good, run_here
from tests.support import stand_ins
from tests.support.data_fixtures import nextqa, put_lines, put_media


def own(folder: Path, *videos: str) -> Path:
    """One's own questions about these videos."""
    rows = [QUESTION | {"question": f"{number}?", "video": video} for number, video in enumerate(videos)]
    return put_lines(folder / "rows.jsonl", rows)


# --- exit codes, output, report ----------------------------------------------------------------------------------


def test_a_clean_dataset_ends_with_0(tmp_path, capsys):
    annotations, videos = nextqa(tmp_path)
    arguments = ["--annotations", str(annotations), "--videos", str(videos), "--split", "val", "--workers", "1"]
    assert main(["data", "check", "nextqa", *arguments]) == 0
    assert capsys.readouterr().out == "3 rows, 1 files: 3 rows good, 0 faults\n"


FAULTY = ["good.mp4", "gone.mp4", "gone.mp4", "empty.mp4", "also gone.mp4"]


def faulty(folder: Path) -> list[str]:
    put_good(folder)
    (folder / "empty.mp4").touch()
    path = own(folder, *FAULTY)
    with path.open("a") as file:
        file.write("nonsense\n")
    return ["data", "check", "jsonl", "--annotations", str(path), "--workers", "1", "--report"]


@pytest.mark.parametrize(("allow", "code"), [(None, 2), (3, 2), (4, 0), (5, 0)])
def test_allow_says_how_many_faults_are_no_failure(tmp_path, allow, code, capsys):
    arguments = [*faulty(tmp_path / "data"), str(tmp_path / "report.json")]
    assert main([*arguments, *([] if allow is None else ["--allow", str(allow)])]) == code
    error = capsys.readouterr().err
    expected = f"appo: 4 faults in {tmp_path}/data/rows.jsonl, {allow or 0} are allowed (--allow)\n"
    assert error == (expected if code else "")


def test_the_report_holds_what_is_printed_and_all_of_it(tmp_path, capsys):
    report = tmp_path / "new" / "report.json"
    main([*faulty(tmp_path / "data"), str(report)])
    lines = capsys.readouterr().out.splitlines()
    written = json.loads(report.read_text())
    assert lines[0] == "6 rows, 4 files: 1 rows good, 4 faults"
    assert lines[-1] == f"all of it: {report}"
    assert (written["rows"], written["files"], written["good"], len(written["faults"])) == (6, 4, 1, 4)
    printed = {match[2]: int(match[1]) for line in lines if (match := re.fullmatch(r" *(\d+) ([a-z -]+)", line))}
    assert printed == {category: count for category, count in written["counts"].items() if count}
    assert list(written["counts"]) == list(CATEGORIES)
    shown = [line.strip() for line in lines if line.startswith("        ")]
    assert shown == [fault["message"] for fault in written["faults"]]
    gone = next(fault for fault in written["faults"] if fault["path"].endswith("/gone.mp4"))
    assert [row.rsplit(", ")[-1] for row in gone["rows"]] == ["line 2", "line 3"]


def test_only_the_first_faults_of_a_category_are_printed(tmp_path, capsys):
    path = own(tmp_path, *(f"{number}.mp4" for number in range(9)))
    assert main(["data", "check", "jsonl", "--annotations", str(path)]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if "there is no video" in line]) == 3
    assert lines[-1].strip() == "... and 6 more (--report lists all)"


MISTAKES = [
    (["jsonl"], "--annotations"),
    (["jsonl", "--annotations", "no-such.jsonl"], "no-such.jsonl: there is no such file"),
    (["jsonle", "--annotations", "x.jsonl"], "unknown dataset 'jsonle'; there are"),
    (["jsonl", "--annotations", "x.jsonl", "--color"], "unknown argument --color"),
    (["jsonl", "--annotations", "x.jsonl", "--split", "val"], "unknown split 'val'"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[row[1] for row in MISTAKES])
def test_mistakes_end_with_2(arguments, message, capsys):
    try:
        code = main(["data", "check", *arguments])
    except SystemExit as end:  # argparse
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", [["data"], ["data", "check"]])
def test_help_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    assert "example:\n  appo data check " in capsys.readouterr().out


def test_the_bar_is_for_terminals_only(tmp_path, capsys):
    path = own(tmp_path / "data", "good.mp4")
    put_good(tmp_path / "data2")
    shutil.copy(tmp_path / "data2" / "good.mp4", tmp_path / "data")
    how = {"quick": False, "workers": 1, "report": None}
    for terminal in (False, True):
        assert run_check(Console(force_terminal=terminal), "jsonl", str(path), None, None, **how) == 0
        out = capsys.readouterr().out
        assert ("checking" in out, "\x1b[" in out) == (terminal, terminal)


# --- the cache of frames -----------------------------------------------------------------------------------------


def test_the_cache_is_filled_with_what_training_and_evaluation_ask_for(tmp_path, capsys):
    put_media(tmp_path, "x.mp4", "y.mp4")
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    path = own(tmp_path, "x.mp4", "y.mp4", "y.mp4", "bad.mp4")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[2] |= {"metadata": {"clip": [1, 2.5]}}
    put_lines(path, rows)
    arguments = ["data", "check", "jsonl", "--annotations", str(path), "--workers", "1", "--allow", "1"]
    assert main([*arguments, "--frame-cache", str(tmp_path / "cache"), "--model", "spotlight", "--video-fps", "1"]) == 0
    processor = AutoProcessor.from_pretrained(policy_path()).video_processor
    cache, sampling = FrameCache(tmp_path / "cache"), FrameSampling(1.0, 16, 4)
    x, y = str(tmp_path / "x.mp4"), str(tmp_path / "y.mp4")
    for source in (VideoSource(x), VideoSource(y), VideoSource(y, 1.0, 2.5)):
        assert cache.read(source, processor, sampling)[1], "was not there"
    assert len([entry for entry in (tmp_path / "cache").rglob("*") if entry.is_file()]) == 3
    assert main([*arguments, "--frame-cache", str(tmp_path / "cache")]) == 2
    assert "--frame-cache and --model go together" in capsys.readouterr().err


# --- paths -------------------------------------------------------------------------------------------------------

# what the annotations say; where the files lie; `--videos`; what is suggested (with {d} for the folder)
PATHS = [
    ("one deeper", "a/x.mp4", "release/a/x.mp4", "", "set --videos {d}/release"),
    ("one less deep", "videos/a/x.mp4", "videos/a/x.mp4", "videos", "set --videos {d}"),
    ("misspelt", "a/x.mp4", "videos/a/x.mp4", "vidoes", "set --videos {d}/videos"),
    ("beside", "a/x.mp4", "other/a/x.mp4", "videos", "set --videos {d}/other"),
    (
        "prefix too much",
        "data/videos/a/x.mp4",
        "a/x.mp4",
        "",
        "replace `data/videos/` at the start of paths by nothing",
    ),
    (
        "prefix of many",
        "data/videos/a/x.mp4",
        "videos/a/x.mp4",
        "videos",
        "`data/videos/` at the start of paths by noth",
    ),
    ("other prefix", "old/a/x.mp4", "new/b/a/x.mp4", "", "replace `old/` at the start of paths by `new/b/`"),
    ("another machine", "/mnt/them/a/x.mp4", "us/a/x.mp4", "", "replace `/mnt/them/` at the start of paths by `us/`"),
    (
        "a URL",
        "file:///mnt/them/a/x.mp4",
        "us/a/x.mp4",
        "",
        "replace `file:///mnt/them/` at the start of paths by `us",
    ),
    ("a dot", "./old/a/x.mp4", "new/a/x.mp4", "", "replace `./old/` at the start of paths by `new/`"),
    ("a dot within", "old/./a/x.mp4", "new/a/x.mp4", "", "replace `old/./` at the start of paths by `new/`"),
    ("two slashes", "old//a/x.mp4", "new/a/x.mp4", "", "replace `old//` at the start of paths by `new/`"),
    ("absolute", "{d}/old/a/x.mp4", "new/a/x.mp4", "", "replace `{d}/old/` at the start of paths by `new/`"),
    (
        "absolute, deeper",
        "{d}/a/x.mp4",
        "release/a/x.mp4",
        "",
        "replace `{d}/` at the start of paths by `release/`",
    ),
    ("a dot, one deeper", "./a/x.mp4", "release/a/x.mp4", "", "set --videos {d}/release"),
]


@pytest.fixture
def here(monkeypatch) -> list[Any]:
    return run_here(monkeypatch)


@pytest.mark.parametrize(("says", "lies", "videos", "suggestion"), [r[1:] for r in PATHS], ids=[r[0] for r in PATHS])
def test_a_wrong_prefix_is_found_and_the_suggestion_works(tmp_path, says, lies, videos, suggestion, here):
    folder = tmp_path / "d"
    names = ["x.mp4", "y.mp4", "c/x.mp4"]  # two of one name: the longer path in common decides
    for name in names:
        put_media(folder, lies.replace("x.mp4", name))
    (folder / "videos").mkdir(exist_ok=True)
    annotations = own(tmp_path, *(says.format(d=folder).replace("x.mp4", name) for name in names))
    before = check("jsonl", str(annotations), str(folder / videos))
    assert before.counts["missing"] == 3
    assert suggestion.format(d=folder) in str(before.fix)
    assert "(3 of 3 files are then there)" in str(before.fix)
    root = before.fix.videos or str(folder / videos)
    text = annotations.read_text()
    if not before.fix.videos:
        assert text.count(f'"video": "{before.fix.prefix}') == 3
        annotations.write_text(text.replace(f'"video": "{before.fix.prefix}', f'"video": "{before.fix.replacement}'))
    assert check("jsonl", str(annotations), root).faults == []


def test_the_printed_suggestion_can_be_copied(tmp_path, capsys):
    put_media(tmp_path, "deep/x.mp4")
    path = own(tmp_path, "x.mp4")
    arguments = ["data", "check", "jsonl", "--annotations", str(path)]
    assert main(arguments) == 2
    setting = re.search(r"missing files: set (--videos \S+) \(1 of 1", capsys.readouterr().out)
    assert setting
    assert main([*arguments, *setting[1].split()]) == 0


def test_a_setting_that_would_lose_more_than_it_finds_is_not_suggested(tmp_path):
    put_media(tmp_path, "a.mp4", "b.mp4", "deep/c.mp4")
    there, root = [str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4")], str(tmp_path)
    assert find_fix([str(tmp_path / "c.mp4")], there, root) is None
    assert find_fix([str(tmp_path / "c.mp4")], [], root) is not None


def test_files_that_could_be_either_of_two_are_left_alone(tmp_path):
    put_media(tmp_path, "one/x.mp4", "two/x.mp4")
    assert find_fix([str(tmp_path / "x.mp4")], [], str(tmp_path)) is None
    assert "replace `/old/` at the start of paths by nothing" in str(find_fix(["/old/two/x.mp4"], [], str(tmp_path)))


# --- processes ---------------------------------------------------------------------------------------------------


def test_files_that_hang_or_crash_the_decoder_are_reported_and_the_walk_goes_on(tmp_path, monkeypatch):
    names = ["good.mp4", "hang.mp4", "crash.mp4", "fine.mp4", "crash too.mp4", "last.mp4"]
    put_media(tmp_path, *names)
    monkeypatch.setattr(checking, "probe_media", stand_ins.misbehaving)
    found = check("jsonl", str(own(tmp_path, *names)), workers=2)
    assert found.good == 3
    problems = {Path(fault.path).name: fault.message for fault in found.faults}
    assert set(problems) == {"hang.mp4", "crash.mp4", "crash too.mp4"}
    assert re.search("line 2: .*hang.mp4: cannot be decoded .it did not end within .* s.; ", problems["hang.mp4"])
    assert re.search("line 3: .*crash.mp4: cannot be decoded .its decoder ended the process", problems["crash.mp4"])
    assert found.counts["undecodable"] == 3
    assert [pid for pid in process_ids(tmp_path) if is_alive(pid)] == []


def test_tasks_are_all_answered_once_and_may_ask_for_time():
    results = dict(run_tasks(stand_ins.double, range(20), 3, limit=1.0))
    assert results == {number: 2 * number for number in range(20)}
    assert list(run_tasks(stand_ins.double, [], 3, limit=1.0)) == []


def test_a_walk_that_is_left_leaves_no_process(tmp_path):
    put_media(tmp_path, "a.mp4", "b.mp4")
    tasks = [(VideoSource(str(tmp_path / name)), (), False) for name in ("a.mp4", "hang.mp4", "hang2.mp4")]
    walk = run_tasks(stand_ins.misbehaving, tasks, 2, limit=0.1)
    _, first = next(walk)
    assert not isinstance(first, WorkerFailure)
    walk.close()
    assert [pid for pid in process_ids(tmp_path) if is_alive(pid)] == []


ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from tests.support import stand_ins
from appo.data import validation as checking
from appo.cli.main import main
from appo.video.frame_cache import FrameCache
checking.probe_media = stand_ins.endless
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(not Path("/proc").exists(), reason="processes are listed on Linux only")
@pytest.mark.parametrize("how", ["ctrl-c", "kill"])
def test_no_process_outlives_the_check(tmp_path, how):
    put_media(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    (tmp_path / "program.py").write_text(PROGRAM)
    arguments = ["data", "check", "jsonl", "--annotations", str(own(tmp_path, "a.mp4", "b.mp4", "c.mp4")),
                 "--workers", "2"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while len(process_ids(tmp_path)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    workers = process_ids(tmp_path)
    assert len(workers) == 2, process.communicate()
    if how == "kill":
        process.kill()
    else:  # a terminal sends it to all
        os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    while any(map(is_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_alive, workers))
    if how == "ctrl-c":
        assert process.returncode == 130
        assert error == "appo: interrupted\n"


def process_ids(folder: Path) -> set[int]:
    """The processes that have looked at files of the folder."""
    return {int(path.suffix.removeprefix(".pid")) for path in folder.glob("*.pid*")}


def is_alive(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_good_rows_are_endless_and_differ():
    rows = good_rows()
    assert len({next(rows) for _ in range(100)}) == 100
