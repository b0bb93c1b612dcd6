"""Questions -> a table that trains: one column schema for every dataset, so that tables can be concatenated."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from appo.prompts import INSTRUCTION, build_messages
from appo.types import VideoQA

if TYPE_CHECKING:
    from datasets import Dataset

ROWS_AT_ONCE = 1000  # rows that exist as Python objects at the same time


def rows_of(questions: Iterable[VideoQA], instruction: str = INSTRUCTION) -> Dataset:
    """Questions as training rows: the prompt and what reward functions and records need.

    Columns: ``prompt`` (messages), ``answer``, ``kind``, ``options``, ``id``, ``question``, ``spans``, ``event_frames``
    (null where the dataset does not know them) and ``metadata`` (as JSON text: datasets differ in what they say).
    """
    import pyarrow as pa  # type: ignore[import-untyped]
    from datasets import Dataset, DatasetInfo

    features = _features()
    schema = features.arrow_schema
    batches = [pa.RecordBatch.from_pylist(rows, schema=schema) for rows in _batches(questions, instruction)]
    # One piece, for datasets are slow to read row by row from many; a copy of the table for a moment.
    table = pa.Table.from_batches(batches, schema=schema).combine_chunks()
    return Dataset(table, info=DatasetInfo(features=features))


def _features() -> Any:
    from datasets import Features, List, Value

    text = Value("string")
    part = {"type": text, "video": text, "image": text, "text": text}
    return Features({
        "prompt": List({"role": text, "content": List(part)}),
        "answer": text,
        "kind": text,
        "options": List(text),
        "id": text,
        "question": text,
        "spans": List(List(Value("float64"))),
        "event_frames": List(Value("int64")),
        "metadata": text,
    })  # fmt: skip


def _batches(questions: Iterable[VideoQA], instruction: str) -> Iterator[list[dict[str, Any]]]:
    rows = (_row(question, instruction) for question in questions)
    while batch := list(islice(rows, ROWS_AT_ONCE)):
        yield batch


def _row(question: VideoQA, instruction: str) -> dict[str, Any]:
    return {
        "prompt": build_messages(question, instruction=instruction),
        "answer": question.answer,
        "kind": question.kind,
        "options": list(question.options),
        "id": question.id,
        "question": question.question,
        "spans": [list(span) for span in question.spans],
        "event_frames": question.metadata.get("event_frames"),
        "metadata": json.dumps(question.metadata, ensure_ascii=False),
    }
