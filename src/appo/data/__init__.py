"""Benchmarks: their annotation files become questions and tables that train, responses become their official scores.

In goes a name (`DATASETS`) or a `Benchmark` of your own, and where annotations and videos lie; out comes
:class:`appo.types.VideoQA` one after the other (`read`), or a checked table of prompts and reward columns (`load`).
The same object is asked in training and in evaluation, and the same function scores the answer in both. One
benchmark is one file with one class (docs/data.md, «Adding a benchmark»).
"""

from appo.data.benchmark import Benchmark, Mark, Measure
from appo.data.loading import (
    DATASETS,
    answerable,
    asked_format,
    get_benchmark,
    load,
    media_folder,
    read,
    read_each,
)
from appo.data.media import media_of
from appo.data.row import Row, RowError
from appo.data.table import rows_of

__all__ = [
    "DATASETS",
    "Benchmark",
    "Mark",
    "Measure",
    "Row",
    "RowError",
    "answerable",
    "asked_format",
    "get_benchmark",
    "load",
    "media_folder",
    "media_of",
    "read",
    "read_each",
    "rows_of",
]
