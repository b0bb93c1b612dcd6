"""Rows of one's own questions (`jsonl`), each bad (or good though it looks bad) in one way, for the check of data.

A case writes its files into the folder and returns its line of the annotations, as bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from appo.data import validation as checking
from tests.support import clips
from tests.support.data_fixtures import clip, put_media

QUESTION = {"video": "good.mp4", "question": "Which?", "options": ["red", "blue"], "answer": "blue"}
CLEAN = ""


class Case(NamedTuple):
    """What a row must come to: a category (or CLEAN), and what its one line says."""

    name: str
    write: Callable[[Path], bytes]
    category: str
    says: str = ""


def good_rows() -> Iterator[bytes]:
    """Rows with which nothing is wrong, no two the same."""
    number = 0
    while True:
        yield json.dumps(QUESTION | {"question": f"Is it number {number}?", "id": f"good {number}"}).encode()
        number += 1


def line(name: str, **change: Any) -> Callable[[Path], bytes]:
    """The good row with other fields; those that are None are left out."""
    return lambda folder: _encoded(name, change)


def raw(data: bytes) -> Callable[[Path], bytes]:
    return lambda folder: data


def video(name: str, make: Callable[[Path], Any], **change: Any) -> Callable[[Path], bytes]:
    """A row about a file that `make` puts at a path: ``{name}.mp4``, or what ``video`` says."""
    path = change.pop("video", f"{name}.mp4")

    def write(folder: Path) -> bytes:
        make(folder / path)
        return _encoded(name, {"video": path, **change})

    return write


def image(path: str, make: Callable[[Path], Any]) -> Callable[[Path], bytes]:
    """A row about an image alone."""

    def write(folder: Path) -> bytes:
        make(folder / path)
        return _encoded(path, {"video": None, "image": path})

    return write


def _encoded(name: str, change: dict[str, Any]) -> bytes:
    row = QUESTION | {"id": name, "question": f"{name}?"} | change
    return json.dumps({key: value for key, value in row.items() if value is not None}).encode()


# --- files -------------------------------------------------------------------------------------------------------


def whole(path: Path) -> None:
    put_media(path.parent, path.name)


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def encoded(frames: int = 12, fps: float = 4, **how: Any) -> Callable[[Path], Any]:
    size = {key: how.pop(key) for key in ("height", "width") if key in how}
    return lambda path: clips.write_clip(path, clips.counted_frames(frames, **size), fps, **how)


def noisy(path: Path) -> Path:
    return clips.write_clip(path, clips.noise_frames(40), 20, container_options={"movflags": "faststart"})


def cut(path: Path) -> None:
    clips.cut_file(path, noisy(path.with_suffix(".whole.mp4")), 0.6)


def damaged(path: Path) -> None:
    clips.damage_file(path, noisy(path.with_suffix(".whole.mp4")), 0.7, 0.75)


def locked(path: Path) -> None:
    whole(path)
    path.chmod(0)


def pictures(count: int, last: str = "") -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.mkdir()
        put_media(path, *(f"{number:03d}.png" for number in range(count)))
        if last:
            (path / f"{count:03d}.png").write_text(last)

    return make


def cut_picture(path: Path) -> None:
    Image.fromarray(clips.noise_frames(1)[0]).save(path)
    path.write_bytes(path.read_bytes()[:2000])


def grey(path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), dtype=np.uint8)).save(path)


# --- the rows ----------------------------------------------------------------------------------------------------

ROW, OPTION, TWICE = "unreadable row", "options without the answer", "duplicate"
ROWS = [
    Case("no JSON", raw(b"video: x.mp4"), ROW, "no JSON"),
    Case("cut off", raw(b'{"video": "good.mp4", "quest'), ROW, "no JSON"),
    Case("two on a line", raw(b'{"a": 1} {"a": 2}'), ROW, "no JSON"),
    Case("a list", raw(b"[1, 2]"), ROW, r"holds \[1, 2\], which is no object"),
    Case("a number", raw(b"3"), ROW, "holds 3, which is no object"),
    Case("null", raw(b"null"), ROW, "holds null, which is no object"),
    Case("empty object", raw(b"{}"), ROW, "neither `video` nor `image`"),
    Case("nested too deeply", raw(b"[" * 100_000), ROW, "no JSON"),
    Case("Latin-1", raw('{"video": "good.mp4", "question": "Café?", "answer": "x"}'.encode("latin-1")), ROW,
         r"not UTF-8 text \(byte 0xe9\); convert the file to UTF-8"),
    Case("half a character", raw(b'{"video": "good.mp4", "question": "\\ud800?", "answer": "x"}'), ROW,
         "`question` holds half a character"),
    Case("unknown column", line("unknown", anwser="blue"), ROW, "unknown column `anwser`"),
    Case("no question", line("-", question=None), ROW, "there is no field `question`"),
    Case("no answer", line("no answer", answer=None), ROW, "there is no field `answer`"),
    Case("no video", line("no video", video=None), ROW, "neither `video` nor `image`"),
    Case("empty question", line("-", question=""), ROW, "`question` is empty"),
    Case("blank question", line("-", question=" \n"), ROW, "`question` holds "),
    Case("question is a list", line("-", question=["Why?"]), ROW, r"`question` holds \['Why\?'\]"),
    Case("answer is true", line("true", answer=True), ROW, "`answer` holds True"),
    Case("answer is an object", line("object", answer={"is": "blue"}), ROW, "`answer` holds"),
    Case("options are a text", line("options", options="red, blue"), ROW, "write it as a list of texts"),
    Case("an option is null", line("option", options=["red", None]), ROW, "`options` holds None"),
    Case("27 options", line("27", options=[f"o{n}" for n in range(27)], answer="o3"), ROW, "27 options"),
    Case("unknown kind", line("kind", options=None, kind="wrod"), ROW, "`kind` is 'wrod'"),
    Case("number in words", line("words", options=None, kind="number", answer="many"), ROW, "which is not a number"),
    Case("spans are one pair", line("pair", spans=[0, 1]), ROW, r"write it as a list of \[start, end\]"),
    Case("span from 2 to 1", line("back", spans=[[2, 1]]), ROW, "put its start before its end"),
    Case("span is nan", line("nan", spans=[[0, float("nan")]]), ROW, "write a number"),
    Case("metadata are a list", line("list", metadata=[1]), ROW, "write an object"),
    Case("clip of no time", line("clip", metadata={"clip": [1, 1]}), ROW, "which is no time"),
    Case("negative rate", line("rate", metadata={"frames_fps": -1}), ROW, "write frames per second"),
    Case("event frames are texts", line("event", metadata={"event_frames": ["1"]}), ROW, "list of frame indices"),
    Case("huge and wrong", line("huge", options="red" * 500_000), ROW, "write it as a list of texts"),
    Case("huge", line("-", question="why " * 250_000, id="huge but fine"), CLEAN),
    Case("Windows line end", lambda folder: line("CRLF")(folder) + b"\r", CLEAN),
    Case("answer not there", line("green", answer="green"), OPTION, "`answer` is 'green', which names no single one"),
    Case("letter beyond", line("E", answer="E"), OPTION, "`answer` is 'E'"),
    Case("id twice", line("-", question="Twice?", id="good 0"), TWICE, r"id 'good 0' was there before \(.*line 1\)"),
    Case("asked twice", line("-", id="another", question="Is it number 0?"), TWICE,
         r"question, video and answer were there before \(.*line 1\)"),
]  # fmt: skip

# --- the files ---------------------------------------------------------------------------------------------------

MISSING, BROKEN, SHORT, OUTSIDE, LENGTH, IMAGE = (
    "missing", "undecodable", "too short", "span outside", "mismatched duration", "image",
)  # fmt: skip
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
FILES = [
    Case("missing", line("gone", video="gone.mp4"), MISSING, "there is no video .*gone.mp4; check --videos"),
    Case("absolute, elsewhere", line("abs", video="/no/such/disk/x.mp4"), MISSING, "no video /no/such/disk/x.mp4"),
    Case("absolute", lambda folder: line("here", video=str(folder / "good.mp4"))(folder), CLEAN),
    Case("up and down", line("updown", video="sub/../good.mp4"), CLEAN),
    Case("up and away", line("upaway", video="../../../../../../x.mp4"), MISSING, "there is no video"),
    Case("an address", line("url", video="https://example.org/x.mp4"), MISSING, "there is no video"),
    Case("Windows path", line("windows", video="sub\\x.mp4"), MISSING, "there is no video"),
    Case("link", video("link", link("good.mp4")), CLEAN),
    Case("link to nothing", video("dangling", link("nothing.mp4")), MISSING, "dangling.mp4: cannot be opened"),
    Case("link in a circle", video("circle", link("circle.mp4")), MISSING, "circle.mp4: cannot be opened"),
    Case("folder", video("folder", Path.mkdir), MISSING, "folder.mp4: is a folder"),
    Case("locked", video("locked", locked), CLEAN if ROOT else MISSING, "" if ROOT else "Permission denied"),
    Case("0 bytes", video("zero", Path.touch), BROKEN, r"zero.mp4: is empty \(0 bytes\)"),
    Case("cut off", video("cut", cut), BROKEN, "cut.mp4: is cut off"),
    Case("damaged", video("damaged", damaged), BROKEN, "damaged.mp4: (frame|cannot|only|is)"),
    Case("a web page", video("page", lambda path: path.write_text("<html>404</html>")), BROKEN, "cannot be decoded"),
    Case("sound only", video("sound", clips.write_sound), BROKEN, "has no video stream"),
    Case("one frame", video("one", encoded(1)), SHORT, "one.mp4: has one frame"),
    Case("changing rate", video("vfr", encoded(times=[0.04 * n**1.5 for n in range(12)])), CLEAN),
    Case("turned", video("turned", encoded(rotation=90)), CLEAN),
    Case("odd size", video("odd", encoded(height=47, width=63, pix_fmt="yuv444p")), CLEAN),
    Case("odd name", video("odd name", whole, video="ü : x's.mp4"), CLEAN),
    Case("long ago", video("ago", whole, metadata={"duration": 30}), LENGTH, "said to last 30 s, but .* lasts 3.00 s"),
    Case("rounded", video("rounded", whole, metadata={"duration": 2}), CLEAN),
    Case("span", video("span", whole, spans=[[0, 2.5], [2, 3.9]]), CLEAN),
    Case("span outside", video("out", whole, spans=[[0, 1], [2, 4.1]]), OUTSIDE, r"span \[2, 4.1\] s is not within"),
    Case("clip", video("clip", whole, metadata={"clip": [1, 2]}), CLEAN),
    Case("span in a clip", video("clip5", whole, metadata={"clip": [1.5, 3]}, spans=[[0, 1.5]]), CLEAN),
    Case("span behind a clip", video("clip6", whole, metadata={"clip": [2, 3]}, spans=[[1.5, 2]]), OUTSIDE,
         r"span \[1.5, 2\] s is not within the 1.00 s that are shown"),
    Case("clip outside", video("clip2", whole, metadata={"clip": [7, 8]}), OUTSIDE, r"clip \[7, 8\] s starts behind"),
    Case("clip too long", video("clip4", whole, metadata={"clip": [1, 9]}), OUTSIDE, r"clip \[1, 9\] s is not within"),
    Case("short clip", video("clip3", whole, metadata={"clip": [1, 1.2]}), SHORT, r"clip \[1, 1.2\] s has one frame"),
    Case("frames", video("frames", pictures(6), video="frames", metadata={"frames_fps": 3}), CLEAN),
    Case("no frames", video("f0", pictures(0), video="f0", metadata={"frames_fps": 3}), BROKEN, "holds no pictures"),
    Case("one picture", video("f1", pictures(1), video="f1", metadata={"frames_fps": 3}), SHORT, "has one frame"),
    Case("bad picture", video("f2", pictures(3, "no"), video="f2", metadata={"frames_fps": 3}), BROKEN, "003.png"),
    Case("no folder", line("f3", video="f3", metadata={"frames_fps": 3}), MISSING, "there is no folder"),
    Case("picture", image("grey.png", grey), CLEAN),
    Case("no picture", line("png", video=None, image="gone.png"), IMAGE, "there is no image"),
    Case("no picture at all", image("b.png", lambda path: path.write_text("<html>")), IMAGE, "b.png: cannot be read"),
    Case("cut picture", image("c.png", cut_picture), IMAGE, "c.png: cannot be read"),
]  # fmt: skip


def put_good(folder: Path) -> None:
    """What the good rows and the links need."""
    (folder / "sub").mkdir(parents=True)
    (folder / "good.mp4").write_bytes(clip().read_bytes())


def run_here(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """From now on files are looked at in this process; returns the list of what was."""
    seen: list[Any] = []

    def run(function: Any, tasks: Any, workers: int, limit: float) -> Any:
        for task in tasks:
            seen.append(task)
            yield task, function(task, lambda seconds: None)

    monkeypatch.setattr(checking, "run_tasks", run)
    return seen
