"""What a run shows while it trains: a progress bar on a terminal, plain lines without one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

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
