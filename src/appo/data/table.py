"""Questions -> a table that trains: one column schema for every dataset, so that tables can be concatenated."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from appo.rewards.templates import INSTRUCTIONS, build_messages
from appo.types import CLIP_KEYS, VideoQA, VideoSource

if TYPE_CHECKING:
    from datasets import Dataset

ROWS_AT_ONCE = 1000  # rows that exist as Python objects at the same time
PLAIN = ("answer", "kind", "response_format", "id", "question", "metadata")  # columns of one text a row
TEXTS = ("type", "video", "image", "text")
PART = (*TEXTS, *CLIP_KEYS)  # what a part of a message may have
_to_json = json.JSONEncoder(ensure_ascii=False, check_circular=False).encode


def rows_of(questions: Iterable[VideoQA], instruction: str | None = None, response_format: str = "answer") -> Dataset:
    """Questions as training rows: the prompt and what reward functions and records need.

    The table is written to a temporary file and mapped, so that its size is no memory of the process.

    Columns: ``prompt`` (messages), ``answer``, ``kind``, ``options``, ``response_format``, ``id``, ``question``,
    ``spans``, ``event_frames`` (null where the dataset does not know them) and ``metadata`` (as JSON text: datasets
    differ in what they say).

    Args:
        questions: what to ask.
        instruction: closes every prompt; None: the one that asks for `response_format`.
        response_format: one of :data:`appo.rewards.templates.FORMATS`; rewards read it.
    """
    from datasets import Dataset, DatasetInfo

    features = _features()
    descriptor, path = tempfile.mkstemp(suffix=".arrow")
    os.close(descriptor)
    try:
        instruction = INSTRUCTIONS[response_format] if instruction is None else instruction
        _write(path, questions, instruction, response_format, features.arrow_schema)
        table, digest = _mapped(path)
    finally:
        with contextlib.suppress(PermissionError):  # Windows keeps a mapped file
            os.unlink(path)  # what is mapped stays readable
    # Without a fingerprint `datasets` would copy the whole table to make one.
    return Dataset(table, info=DatasetInfo(features=features), fingerprint=digest)


def _write(path: str, questions: Iterable[VideoQA], instruction: str, response_format: str, schema: Any) -> None:
    import pyarrow as pa  # type: ignore[import-untyped]

    asked = iter(questions)
    with pa.ipc.new_stream(path, schema) as writer:
        while True:
            columns = _Columns()
            for question in islice(asked, ROWS_AT_ONCE):
                columns.add(question, build_messages(question, instruction=instruction), response_format)
            if not columns.plain["id"]:
                return
            writer.write_batch(columns.batch(schema))


class _Columns:
    """Rows as columns of plain values.

    Rows as dictionaries would be thousands of containers that live for a while: Python's garbage collector then walks
    over everything that is loaded, again and again, which took two fifths of the time.
    """

    def __init__(self) -> None:
        self.plain: dict[str, list[str]] = {name: [] for name in PLAIN}
        self._roles: list[str] = []
        self._parts: dict[str, list[Any]] = {name: [] for name in PART}
        self._options: list[str] = []
        self._seconds: list[float] = []
        self._event_frames: list[tuple[int, ...] | None] = []
        # Where each row's (or message's) share of a flat list begins; the last is where the next one will.
        self._messages_at, self._parts_at, self._options_at, self._spans_at = [0], [0], [0], [0]

    def add(self, question: VideoQA, messages: Sequence[Mapping[str, Any]], response_format: str) -> None:
        """One more row."""
        metadata = _to_json(question.metadata)
        values = question.answer, question.kind, response_format, question.id, question.question, metadata
        for name, value in zip(PLAIN, values, strict=True):
            self.plain[name].append(value)
        for message in messages:
            self._roles.append(message["role"])
            for part in message["content"]:
                for name, column in self._parts.items():
                    column.append(part.get(name))
            self._parts_at.append(len(self._parts["type"]))
        self._messages_at.append(len(self._roles))
        self._options += question.options
        self._options_at.append(len(self._options))
        for span in question.spans:
            self._seconds += span
        self._spans_at.append(len(self._seconds) // 2)
        self._event_frames.append(question.event_frames)

    def batch(self, schema: Any) -> Any:
        """The rows as Arrow's record batch."""
        import pyarrow as pa

        def lists(starts: list[int], values: Any) -> Any:
            return pa.ListArray.from_arrays(pa.array(starts, pa.int32()), values)

        part = [
            pa.array(column, pa.string() if name in TEXTS else pa.float64()) for name, column in self._parts.items()
        ]
        contents = lists(self._parts_at, pa.StructArray.from_arrays(part, list(PART)))
        messages = pa.StructArray.from_arrays([pa.array(self._roles, pa.string()), contents], ["role", "content"])
        spans = lists(list(range(0, len(self._seconds) + 1, 2)), pa.array(self._seconds, pa.float64()))
        columns = {name: pa.array(values, pa.string()) for name, values in self.plain.items()} | {
            "prompt": lists(self._messages_at, messages),
            "options": lists(self._options_at, pa.array(self._options, pa.string())),
            "spans": lists(self._spans_at, spans),
            "event_frames": pa.array(self._event_frames, pa.list_(pa.int64())),
        }
        return pa.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)


def _mapped(path: str) -> tuple[Any, str]:
    """The table of a file, mapped rather than read, and a digest of its content."""
    import pyarrow as pa

    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    with pa.memory_map(path) as source, pa.ipc.open_stream(source) as reader:
        return reader.read_all(), digest


def _features() -> Any:
    from datasets import Features, List, Value

    text, number = Value("string"), Value("float64")
    part = {name: text if name in TEXTS else number for name in PART}
    return Features({
        "prompt": List({"role": text, "content": List(part)}),
        "answer": text,
        "kind": text,
        "options": List(text),
        "response_format": text,
        "id": text,
        "question": text,
        "spans": List(List(number)),
        "event_frames": List(Value("int64")),
        "metadata": text,
    })  # fmt: skip


def question_of(row: Mapping[str, Any]) -> VideoQA:
    """The question of a row of `rows_of`; of a user's own row as much of one as it says.

    Args:
        row: with a column ``prompt``, a string or messages; all other columns may be missing.
    """
    prompt = row["prompt"] if isinstance(row["prompt"], list) else [{"content": row["prompt"]}]
    contents = [message["content"] for message in prompt]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    texts = [part["text"] for part in parts if part["type"] == "text"] or [t for t in contents if isinstance(t, str)]
    videos = [VideoSource.from_part(part) for part in parts if part["type"] == "video"]
    images = [part["image"] for part in parts if part["type"] == "image" and isinstance(part["image"], str)]
    frames = row.get("event_frames")
    return VideoQA(
        id=str(row.get("id", "")),
        video=next(iter(videos), None),
        question=str(row.get("question") or " ".join(texts)),
        answer=str(row.get("answer", "")),
        kind=str(row.get("kind", "")),
        options=tuple(row.get("options") or ()),
        image=next(iter(images), ""),
        event_frames=None if frames is None else tuple(frames),
    )
