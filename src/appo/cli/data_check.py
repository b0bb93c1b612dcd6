"""What `appo data check` prints: a bar while files are decoded, then counts, examples and the fix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from appo.data.validation import Fault, Report, check
from appo.video.frame_cache import FrameCaching

EXAMPLES_SHOWN = 3  # faults of a category that are shown


class _Rate(ProgressColumn):
    """Files a second."""

    def render(self, task: Task) -> Text:
        """The rate over the last while."""
        return Text(f"{task.speed:.1f} files/s" if task.speed else "")


def run_check(
    console: Console,
    name: str,
    annotations: str,
    videos: str | None,
    split: str | None,
    *,
    quick: bool,
    workers: int,
    report: Path | None,
    frame_caching: FrameCaching | None = None,
) -> int:
    """Check, print, write; returns how many faults there are.

    Raises:
        ValueError, OSError: as :func:`appo.data.validation.check`, or the report cannot be written.
    """
    columns = TextColumn("checking"), BarColumn(bar_width=24), MofNCompleteColumn(), _Rate()
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("checking", total=None)

        def on_progress(done: int, files: int) -> None:
            bar.update(task, completed=done, total=files)

        where = name, annotations, videos, split
        found = check(*where, quick=quick, workers=workers, frame_caching=frame_caching, on_progress=on_progress)
    print_report(console, found)
    if report is not None:
        found.write(report)
        _line(console, f"all of it: {report}")
    return len(found.faults)


def print_report(console: Console, report: Report) -> None:
    """Counts, the first faults of each category, and which change makes missing files resolve."""
    how = " (one frame of each video)" if report.quick else ""
    size = f"{report.rows} rows, {report.files} files{how}"
    _line(console, f"{size}: {report.good} rows good, {len(report.faults)} faults")
    for category, faults in report.counts.items():
        if faults:
            _line(console, f"{faults:>7} {category}")
            _print_examples(console, [fault for fault in report.faults if fault.category == category])
    if report.fix:
        _line(console, f"missing files: {report.fix}")


def _print_examples(console: Console, faults: Sequence[Fault]) -> None:
    for fault in faults[:EXAMPLES_SHOWN]:
        _line(console, f"        {fault.message}")
    if len(faults) > EXAMPLES_SHOWN:
        _line(console, f"        ... and {len(faults) - EXAMPLES_SHOWN} more (--report lists all)")


def _line(console: Console, text: str) -> None:
    """One line, however long: it may be searched for."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
