"""Callbacks of a run: ctrl-C and SIGTERM end it after a step, with a checkpoint; a bar or lines show how far it is."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from types import FrameType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from appo.rollout.collectives import max_over_processes

# What each signal does by itself. A parent process may make its children ignore SIGINT (a script's background jobs).
_AT_ONCE: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
_NOTICE = b"appo: stopping after this step, with a checkpoint; once more stops at once\n"


class Interrupted(KeyboardInterrupt):
    """A run was stopped by a signal and can go on. One line that says from where and how.

    ``exit_code`` is what shells expect of a command that a signal ended: 130 for ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class StopOnSignal(TrainerCallback):
    """Within ``with``, the first SIGINT or SIGTERM ends training after the current step; the second acts at once.

    Processes agree after each step, so all of them write the same checkpoint whichever received the signal.

    Attributes:
        received: number of the signal that ended training, 0 if none did.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._before = {signum: signal.signal(signum, self._on_signal) for signum in _AT_ONCE}
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End training here, with a checkpoint, if a signal came."""
        self.received = max_over_processes(self.received)
        if self.received:
            control.should_save = control.should_training_stop = True

    def raise_if_stopped(self, trainer: Any) -> None:
        """After training: raise `Interrupted` if a signal ended it before its last step."""
        step = trainer.state.global_step
        if self.received and step < trainer.state.max_steps:
            message = f"interrupted, with a checkpoint of step {step} in {trainer.args.output_dir}"
            fix = "to go on: the same command and --resume_from_checkpoint true"
            raise Interrupted(f"{message}; {fix}", self.received)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.received = signum
        for one, handler in self._before.items():
            signal.signal(one, _AT_ONCE[one] if handler is signal.SIG_IGN else handler)
        os.write(2, _NOTICE)  # print is not safe within a signal handler


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
