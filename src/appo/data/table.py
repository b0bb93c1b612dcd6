"""Questions -> a table that trains: one column schema for every dataset, so that tables can be concatenated."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from appo.prompts import INSTRUCTIONS, build_messages
from appo.types import VideoQA

if TYPE_CHECKING:
    from datasets import Dataset

ROWS_AT_ONCE = 1000  # rows that exist as Python objects at the same time


def rows_of(questions: Iterable[VideoQA], instruction: str | None = None, response_format: str = "answer") -> Dataset:
    """Questions as training rows: the prompt and what reward functions and records need.

    The table is written to a temporary file and mapped, so that its size is no memory of the process.

    Columns: ``prompt`` (messages), ``answer``, ``kind``, ``options``, ``response_format``, ``id``, ``question``,
    ``spans``, ``event_frames`` (null where the dataset does not know them) and ``metadata`` (as JSON text: datasets
    differ in what they say).

    Args:
        questions: what to ask.
        instruction: closes every prompt; None: the one that asks for `response_format`.
        response_format: one of :data:`appo.prompts.FORMATS`; rewards read it.
    """
    from datasets import Dataset, DatasetInfo

    features = _features()
    descriptor, path = tempfile.mkstemp(suffix=".arrow")
    os.close(descriptor)
    try:
        instruction = INSTRUCTIONS[response_format] if instruction is None else instruction
        _write(path, _batches(questions, instruction, response_format), features.arrow_schema)
        table, digest = _mapped(path)
    finally:
        with contextlib.suppress(PermissionError):  # Windows keeps a mapped file
            os.unlink(path)  # what is mapped stays readable
    # Without a fingerprint `datasets` would copy the whole table to make one.
    return Dataset(table, info=DatasetInfo(features=features), fingerprint=digest)


def _write(path: str, batches: Iterable[list[dict[str, Any]]], schema: Any) -> None:
    import pyarrow as pa  # type: ignore[import-untyped]

    with pa.ipc.new_stream(path, schema) as writer:
        for rows in batches:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))


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
    shown = {"video_start": number, "video_end": number, "raw_fps": number}
    part = {"type": text, "video": text, "image": text, "text": text, **shown}
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


def _batches(questions: Iterable[VideoQA], instruction: str, response_format: str) -> Iterator[list[dict[str, Any]]]:
    rows = (_row(question, instruction, response_format) for question in questions)
    while batch := list(islice(rows, ROWS_AT_ONCE)):
        yield batch


def _row(question: VideoQA, instruction: str, response_format: str) -> dict[str, Any]:
    return {
        "prompt": build_messages(question, instruction=instruction),
        "answer": question.answer,
        "kind": question.kind,
        "options": list(question.options),
        "response_format": response_format,
        "id": question.id,
        "question": question.question,
        "spans": [list(span) for span in question.spans],
        "event_frames": question.metadata.get("event_frames"),
        "metadata": json.dumps(question.metadata, ensure_ascii=False),
    }
