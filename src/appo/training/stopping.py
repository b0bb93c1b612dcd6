"""Stopping a run: ctrl-C and SIGTERM end it after the current step, with a checkpoint to go on from."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

# What each signal does by itself. A parent may have told its children to ignore SIGINT (a script's background jobs).
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

    Processes agree after each step, so all of them write the same checkpoint whichever was told.

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
        if args.world_size > 1:
            told = torch.tensor(self.received, device=args.device)
            torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
            self.received = int(told)
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
