"""Benchmarks: annotation files become questions and tables that train; responses become official scores.

In: a name of `DATASETS`, or a `Benchmark` of your own, and where annotations and videos lie. Out:
:class:`appo.types.VideoQA` one by one (`read`), or a checked table of prompts and reward columns (`load`). Training and
evaluation use the same object, and the same function scores the answer in both. One benchmark is one file with one
class (docs/data.md, «Adding a benchmark»).
"""

from appo.data.benchmark import Benchmark, Mark, Measure
from appo.data.loading import (
    DATASETS,
    answerable,
    get_benchmark,
    load,
    load_dataset,
    media_folder,
    media_of,
    read,
    read_each,
    response_format_of,
)
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
    "get_benchmark",
    "load",
    "load_dataset",
    "media_folder",
    "media_of",
    "read",
    "read_each",
    "response_format_of",
    "rows_of",
]
