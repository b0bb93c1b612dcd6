"""Where the seconds of a step go: named parts, accumulated between two reads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


class Stopwatch:
    """Accumulates seconds by part; a part's time excludes that of parts measured inside it, so parts add up.

    ``parts`` are reported even when nothing was measured: processes that gather them must have the same ones.
    ``clock`` gives seconds; it may be exchanged for another while nothing is being measured.
    """

    def __init__(self, parts: Sequence[str] = (), clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._parts = tuple(parts)
        self._seconds = dict.fromkeys(self._parts, 0.0)
        self._inner = [0.0]

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Measure a ``with`` block as ``part``."""
        start = self.clock()
        self._inner.append(0.0)
        try:
            yield
        finally:
            elapsed = self.clock() - start
            self._seconds[part] = self._seconds.get(part, 0.0) + elapsed - self._inner.pop()
            self._inner[-1] += elapsed

    def read(self) -> dict[str, float]:
        """Seconds of each part since the last read."""
        seconds, self._seconds = self._seconds, dict.fromkeys(self._parts, 0.0)
        return seconds
