"""Decoders that hang or crash, in place of :func:`appo.probing.probe`; of a module, for processes import them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from appo.probing import Probe


def misbehaving(task: Any, allow: Callable[[float], None]) -> Probe:
    """Does what the name of the file says; writes down its process, so that a test can see it gone."""
    path = Path(task[0].path)
    path.with_suffix(f".pid{os.getpid()}").touch()
    if "hang" in path.name:
        allow(0.5)
        time.sleep(1000)
    if "crash" in path.name:
        os.kill(os.getpid(), getattr(signal, "SIGSEGV", signal.SIGTERM))
    return Probe(seconds=3.0)


def endless(task: Any, allow: Callable[[float], None]) -> Probe:
    """Hangs at every file, and may."""
    allow(1000)
    return misbehaving((type(task[0])(task[0].path + ".hang"), *task[1:]), lambda seconds: None)


def double(task: int, allow: Callable[[float], None]) -> int:
    """2 x; needs longer than its limit at 3, and says so."""
    if task == 3:
        allow(60)
        time.sleep(1.5)
    return 2 * task
