"""What a run shows in the terminal: a progress bar, a table of accuracies, and all of it as a picture."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback

from appo.evaluation.inference import Accuracy
from appo.files import atomic_write
from appo.reports.group_view import Reading
from appo.reports.run_folder import RolloutRecord
from appo.reports.terminal import print_group

PICTURE_WIDTH = 120

# name in TRL's logs -> name on screen
SHOWN = {
    "resampling/first_round_reward": "reward",
    "rewards/accuracy_reward/mean": "accuracy",
    "mean_token_accuracy": "token accuracy",
    "entropy": "entropy",
    "appo/mean_weight": "weight",
    "step_time": "s/step",
}


class TrainingBar(TrainerCallback):
    """A progress bar with the numbers that say whether training works; plain lines where there is no terminal."""

    def __init__(self, console: Console, lines_every: int = 5) -> None:
        self._console, self._lines_every = console, lines_every
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar."""
        self._task = self._progress.add_task("training", total=state.max_steps, numbers="")
        self._progress.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kw: Any) -> None:
        """Show the numbers of the latest step."""
        if not logs or "loss" not in logs:
            return
        numbers = "  ".join(
            f"{name} {float(logs[key]):.2f}" for key, name in SHOWN.items() if logs.get(key) is not None
        )
        self._progress.update(self._task, completed=state.global_step, numbers=numbers)
        last = state.global_step == state.max_steps
        if not self._console.is_terminal and (state.global_step % self._lines_every == 0 or last):
            self._console.print(f"step {state.global_step}/{state.max_steps}  {numbers}", highlight=False)

    def close(self) -> None:
        """Leave the bar as it is on screen and give the cursor back."""
        self._progress.stop()


def write_picture(
    path: Path, groups: Sequence[tuple[str, RolloutRecord]], table: Table, reading: Reading | None = None
) -> None:
    """Groups and table as an SVG picture of the terminal, to look at later or to show around."""
    console = Console(record=True, file=io.StringIO(), width=PICTURE_WIDTH, force_terminal=True)
    for title, record in groups:
        print_group(console, title, record, reading)
    console.print(table)
    svg = console.export_svg(title="appo demo")
    # The picture must not fetch fonts: viewers use their own monospaced one.
    atomic_write(path, re.sub(r"@font-face {.*?}\s*", "", svg, flags=re.DOTALL))


def accuracy_table(before: Mapping[str, Accuracy], after: Mapping[str, Accuracy]) -> Table:
    """Accuracy of each level before and after training, with 95 % Wilson intervals."""
    table = Table(title="greedy accuracy on held-out questions")
    for name in ("level", "questions", "before", "after", "gain", "format before", "format after"):
        table.add_column(name, justify="left" if name == "level" else "right")
    for level, old in before.items():
        new = after[level]
        gain = Text(f"{100 * (new.mean - old.mean):+.1f}", style="bold green" if new.mean > old.mean else "bold red")
        formats = [f"{100 * result.parsed:.0f} %" for result in (old, new)]
        table.add_row(level, str(new.questions), _interval(old), _interval(new), gain, *formats)
    return table


def _interval(accuracy: Accuracy) -> str:
    return f"{100 * accuracy.mean:.1f} % ({100 * accuracy.low:.0f}-{100 * accuracy.high:.0f})"
