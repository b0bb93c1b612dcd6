"""What an evaluation shows: how far it is, and tables that read alike in a terminal, a log, a README and a paper."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

LINES = 10  # of progress where there is no terminal


@dataclass(frozen=True)
class Sheet:
    """A table: titles, rows of cells, and remarks below. The first column holds names, all others figures."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    remarks: Sequence[str] = field(default_factory=list)

    def markdown(self) -> str:
        """As Markdown, to be pasted."""
        cells = [list(self.columns), ["---", *["---:"] * (len(self.columns) - 1)], *map(list, self.rows)]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
        return "\n".join([f"**{self.title}**", "", *lines, "", *(f"- {remark}" for remark in self.remarks)]) + "\n"

    def print(self, console: Console) -> None:
        """As a table where there is a terminal, as Markdown where a log would break it at 80 columns."""
        if not console.is_terminal:
            console.print(self.markdown(), markup=False, highlight=False, soft_wrap=True, end="")
            return
        table = Table(title=Text(self.title))
        for index, name in enumerate(self.columns):
            table.add_column(Text(name), justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*map(Text, row))
        console.print(table)
        for remark in self.remarks:
            console.print(remark, markup=False, highlight=False)


class Progressing:
    """A bar with questions a second and the time left; ten plain lines where there is no terminal.

    Use it in a ``with`` block, which takes the bar down however it ends.
    """

    def __init__(
        self, console: Console, total: int, done: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console, self._total, self._before, self._clock = console, total, done, clock
        self._start = clock()
        self._tenth = LINES * done // max(1, total)
        self._bar = Progress(
            TextColumn("answering"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("answering", total=total, completed=done, speed="")

    def __enter__(self) -> Progressing:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, done: int) -> None:
        """Show that so many questions are answered, those of earlier runs included."""
        seconds = max(1e-9, self._clock() - self._start)
        rate = (done - self._before) / seconds
        left = (self._total - done) / rate if rate else 0.0
        speed = f"{rate:.2f} questions/s, {duration(left)} left"
        self._bar.update(self._task, completed=done, speed=speed)
        tenth = LINES * done // self._total
        if not self._console.is_terminal and tenth > self._tenth:
            self._console.print(f"answered {done} of {self._total}: {speed}", highlight=False)
        self._tenth = tenth


def duration(seconds: float) -> str:
    """Seconds as people say them: ``12 s``, ``3 min``, ``2.1 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
