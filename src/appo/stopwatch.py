"""Where the seconds of a step go: named parts, accumulated between two reads."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Accumulates seconds by part; a part's time excludes that of parts measured inside it, so parts add up."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._inner = [0.0]

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Measure a ``with`` block as ``part``."""
        start = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self._seconds[part] += elapsed - self._inner.pop()
            self._inner[-1] += elapsed

    def read(self) -> dict[str, float]:
        """Seconds of each part since the last read."""
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds
