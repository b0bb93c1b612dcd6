"""The folder of an evaluation: the questions, the model's replies, the seconds they took.

    eval.json           the settings that decide the answers, versions, commit, command line, start
    questions.jsonl     the questions with their gold answers, so that the folder can be scored and compared alone
    predictions.jsonl   one `Reply` per question; nothing in it varies from run to run
    timing.jsonl        one line per batch: its seconds

Questions are answered in batches fixed by position, and each batch is written by one append. So an evaluation that was
killed at any moment leaves whole batches and at most one broken one, which is repeated: none is lost or doubled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from appo.files import PART, atomic_write
from appo.reports.jsonl import RecordError, damaged, parse_line, unwritable
from appo.reports.run_folder import describe_run
from appo.types import VideoQA, VideoSource

EVAL, QUESTIONS, PREDICTIONS, TIMING = "eval.json", "questions.jsonl", "predictions.jsonl", "timing.jsonl"
CLIPS = "clips"  # generated ones lie in the folder before anything else does
_MAX_VALUE_LENGTH = 60
Item = TypeVar("Item")


@dataclass(frozen=True)
class Reply:
    """A model's responses to one question."""

    id: str  # of the question
    texts: tuple[str, ...] = ()  # K responses without special tokens; none if the video or image could not be read
    tokens: tuple[int, ...] = ()  # (K,) their lengths, the end of sequence counted
    error: str = ""  # why there is none, else empty: one line that names the file

    def to_line(self) -> str:
        """One line of predictions.jsonl."""
        fields = {"error": self.error} if self.error else {"texts": self.texts, "tokens": self.tokens}
        return json.dumps({"id": self.id, **fields}) + "\n"

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Reply:
        """Inverse of `to_line`. Raises ValueError for anything else."""
        texts, tokens = tuple(data.get("texts", ())), tuple(data.get("tokens", ()))
        reply = cls(data.get("id", ""), texts, tokens, data.get("error", ""))
        if reply.to_line() != json.dumps(data) + "\n" or len(reply.texts) != len(reply.tokens):
            raise ValueError("no prediction")
        return reply


@dataclass(frozen=True)
class EvaluationFolder:
    """An evaluation on disk; get one by `start` or `open`."""

    path: Path

    @classmethod
    def check(cls, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> EvaluationFolder:
        """The folder, if an evaluation with these settings may start or be resumed there. Writes nothing.

        Raises:
            RecordError: it holds something else, or an evaluation with other settings, which are named.
        """
        folder = cls(Path(path))
        try:
            names = {file.name for file in folder.path.iterdir()} if folder.path.exists() else set()
        except OSError as error:
            raise RecordError(f"{path}: cannot be read ({error.strerror}); choose another --output") from error
        if EVAL in names:
            folder._check_settings(settings)
        elif any(name not in (CLIPS, QUESTIONS) and not name.endswith(PART) for name in names):
            raise RecordError(f"{path}: is not empty and holds no evaluation; choose another --output")
        return folder

    @classmethod
    def start(
        cls, path: str | os.PathLike[str], settings: Mapping[str, Any], questions: Sequence[VideoQA]
    ) -> EvaluationFolder:
        """Start an evaluation, or resume the one that is there. `settings`: all that decides the answers.

        Raises:
            RecordError: see `check`; or the folder cannot be written.
        """
        lines = [_line(asdict(question)) for question in questions]
        settings = {**settings, "questions": len(lines), "questions_digest": questions_digest(questions)}
        folder = cls.check(path, settings)
        if (folder.path / EVAL).exists():
            return folder
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecordError(f"{path}: cannot be made ({error.strerror}); choose another --output") from error
        folder.write(QUESTIONS, "".join(lines))
        folder.write(EVAL, json.dumps(describe_run(settings), indent=2) + "\n")
        return folder

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> EvaluationFolder:
        """The folder of an evaluation. Raises RecordError if there is none."""
        folder = cls(Path(path))
        folder.describe()
        return folder

    def describe(self) -> dict[str, Any]:
        """All of eval.json: ``config`` (the settings), ``versions, git_commit, argv, started, platform``."""
        file = self.path / EVAL
        try:
            data = json.loads(file.read_bytes())
            if not isinstance(data["config"], dict) or not isinstance(data["versions"], dict):
                raise ValueError("no settings")
        except OSError as error:
            raise RecordError(f"{self.path}: no evaluation ({EVAL}: {error.strerror}); give its folder") from error
        except (ValueError, KeyError, TypeError) as error:
            raise RecordError(f"{file}: damaged ({error}); restore it, or evaluate into another folder") from error
        return dict(data)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings given to `start`, with ``questions`` (how many) and ``questions_digest``."""
        return dict(self.describe()["config"])

    def questions(self) -> list[VideoQA]:
        """The questions in their order. Raises RecordError."""
        rows = [data for _, data in self._lines(QUESTIONS)]
        if _digest(rows) != self.settings["questions_digest"]:
            raise RecordError(f"{self.path / QUESTIONS}: was changed since the evaluation; restore it")
        return [_question(data) for data in rows]

    def replies(self, questions: Sequence[VideoQA]) -> list[Reply | None]:
        """The replies so far, in the order of the questions; a torn last line is left out.

        Raises:
            RecordError: a line is damaged, answers none of the questions, or answers one again.
        """
        place = {question.id: index for index, question in enumerate(questions)}
        found: list[Reply | None] = [None] * len(questions)
        for number, data in self._lines(PREDICTIONS):
            try:
                reply = Reply.from_json(data)
                if reply.id not in place:
                    raise ValueError(f"there is no question {reply.id!r}")
                if found[place[reply.id]] is not None:
                    raise ValueError(f"{reply.id!r} was answered before")
            except (ValueError, TypeError) as error:
                raise damaged(self.path / PREDICTIONS, number, str(error)) from None
            found[place[reply.id]] = reply
        return found

    def resume(self, questions: Sequence[VideoQA], batch_size: int, *, retry: bool = False) -> dict[int, list[Reply]]:
        """The whole batches so far, by their index; whatever else a kill left is removed.

        With `retry`, batches with an error are removed as well, so that they are repeated.
        """
        replies = self.replies(questions)
        whole = {}
        for index, start in enumerate(range(0, len(replies), batch_size)):
            batch = [reply for reply in replies[start : start + batch_size] if reply is not None]
            is_whole = len(batch) == len(replies[start : start + batch_size])
            if is_whole and not (retry and any(reply.error for reply in batch)):
                whole[index] = batch
        self._replace(PREDICTIONS, "".join(reply.to_line() for batch in whole.values() for reply in batch))
        times = {data["batch"]: data for _, data in self._lines(TIMING)}
        self._replace(TIMING, "".join(_line(times[index]) for index in whole if index in times))
        return whole

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the evaluation; the system unlocks it after a kill. No lock on Windows and some network drives.

        Raises:
            RecordError: another process has locked it.
        """
        with (self.path / EVAL).open("rb") as handle:
            try:
                import fcntl

                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                problem = "another process is answering this evaluation"
                raise RecordError(f"{self.path}: {problem}; wait for it, or choose another --output") from None
            except (ImportError, OSError):
                pass
            yield

    def append(self, batch: int, replies: Sequence[Reply], seconds: float) -> None:
        """Write a batch to the disk. Raises RecordError."""
        self._append(PREDICTIONS, "".join(reply.to_line() for reply in replies))
        self._append(TIMING, _line({"batch": batch, "questions": len(replies), "seconds": round(seconds, 3)}))

    def seconds(self) -> tuple[float, int]:
        """Seconds of all batches, and how many questions they hold."""
        times = [data for _, data in self._lines(TIMING)]
        return sum(data["seconds"] for data in times), sum(data["questions"] for data in times)

    def write(self, name: str, text: str) -> None:
        """Write a whole file atomically. Raises RecordError."""
        try:
            atomic_write(self.path / name, text)
        except OSError as error:
            raise unwritable(self.path / name, error) from error

    def _append(self, name: str, text: str) -> None:
        try:
            with (self.path / name).open("ab") as handle:
                handle.write(text.encode())
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            raise unwritable(self.path / name, error) from error

    def _replace(self, name: str, text: str) -> None:
        file = self.path / name
        if (file.read_bytes() if file.exists() else b"") != text.encode():
            self.write(name, text)

    def _lines(self, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number and object of each line that ends; one that does not was torn by a kill."""
        file = self.path / name
        if not file.exists():
            return
        with file.open("rb") as handle:
            for number, line in enumerate(handle, start=1):
                if not line.endswith(b"\n"):
                    return
                data = parse_line(line)
                if data is None:
                    raise damaged(file, number, "no JSON object")
                yield number, data

    def check_versions(self) -> None:
        """Raise RecordError if the remaining questions would be answered by other versions than those before."""
        old, new = self.describe()["versions"], describe_run({})["versions"].items()
        if others := [f"{name} {old.get(name)}, here {version}" for name, version in new if version != old.get(name)]:
            fix = "go on with the same versions, or choose another --output"
            raise RecordError(f"{self.path}: was begun with {'; '.join(others)}; {fix}")

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        there = self.settings
        if "questions_digest" in settings and there.get("questions_digest") != settings["questions_digest"]:
            there["questions_digest"] = questions_digest(self.questions())  # they may be written in the older form
        if others := [name for name in settings if name not in there or there[name] != settings[name]]:
            values = ((name, _shortened(there.get(name)), _shortened(settings[name])) for name in others)
            named = "; ".join(f"{name} is {old} there, {new} here" for name, old, new in values)
            fix = "choose another --output, or the same settings to go on with this one"
            raise RecordError(f"{self.path}: holds an evaluation with other settings ({named}); {fix}")


def batches(items: Sequence[Item], size: int) -> Iterator[tuple[int, list[Item]]]:
    """The items in batches, each with its index."""
    return enumerate(list(items[start : start + size]) for start in range(0, len(items), size))


def questions_digest(questions: Iterable[VideoQA]) -> str:
    """Digest of questions and gold answers; of videos and images only the names, for folders may be moved."""
    return _digest(map(asdict, questions))


def _digest(rows: Iterable[Mapping[str, Any]]) -> str:
    """`questions_digest` of questions as they are written."""
    digest = hashlib.sha256()
    for row in rows:
        video = row["video"]
        named = video | {"path": Path(video["path"]).name} if isinstance(video, dict) else video and Path(video).name
        digest.update(_line({**row, "video": named, "image": Path(row["image"]).name}).encode())
    return digest.hexdigest()[:16]


def _question(data: Mapping[str, Any]) -> VideoQA:
    """Inverse of `asdict` for a question; also of the older form, with clip and frame rate in the metadata."""
    fields = dict(data)
    if isinstance(data["video"], str):
        metadata = dict(data["metadata"])
        start, end = metadata.pop("clip", None) or (None, None)
        fps = metadata.pop("frames_fps", None)
        video = VideoSource(data["video"], start, end, fps) if data["video"] else None
        fields |= {"video": video, "metadata": metadata, "event_frames": metadata.pop("event_frames", None)}
    elif data["video"]:
        fields["video"] = VideoSource(**data["video"])
    spans = tuple((float(start), float(end)) for start, end in data["spans"])
    events = fields["event_frames"]
    fields |= {"options": tuple(data["options"]), "spans": spans, "event_frames": events and tuple(events)}
    return VideoQA(**fields)


def _line(data: Any) -> str:
    return json.dumps(data) + "\n"


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _MAX_VALUE_LENGTH else f"{text[:_MAX_VALUE_LENGTH]}..."
