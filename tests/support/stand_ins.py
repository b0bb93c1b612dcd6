"""Decoders that hang or crash, in place of `appo.video.probing.probe_media`; of a module, for processes import them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from appo.video.probing import MediaProbe
from appo.video.reader import decode_frames


def misbehaving(task: Any, allow: Callable[[float], None]) -> MediaProbe:
    """Does what the name of the file says; writes down its process, so that a test can see it gone."""
    path = Path(task[0].path)
    path.with_suffix(f".pid{os.getpid()}").touch()
    if "hang" in path.name:
        allow(0.5)
        time.sleep(1000)
    if "crash" in path.name:
        os.kill(os.getpid(), getattr(signal, "SIGSEGV", signal.SIGTERM))
    return MediaProbe(seconds=3.0)


def endless(task: Any, allow: Callable[[float], None]) -> MediaProbe:
    """Hangs at every file, and may."""
    allow(1000)
    return misbehaving((type(task[0])(task[0].path + ".hang"), *task[1:]), lambda seconds: None)


def double(task: int, allow: Callable[[float], None]) -> int:
    """2 x; needs longer than its limit at 3, and says so."""
    if task == 3:
        allow(60)
        time.sleep(1.5)
    return 2 * task


def stuck_decode_frames(source: Any, probed: Any, chosen: Any) -> Any:
    """In place of `appo.video.reader.decode_frames`: what the name of the file says, else the real function."""
    path = Path(probed.path)
    with path.with_suffix(".asked").open("a") as file:
        file.write(f"{os.getpid()}\n")
    if (path.parent / f"{path.stem}.hang").exists():
        time.sleep(1000)
    if (path.parent / f"{path.stem}.crash").exists():
        os.kill(os.getpid(), getattr(signal, "SIGSEGV", signal.SIGTERM))
    return decode_frames(source, probed, chosen)


def own_process(source: Any) -> int:
    """Which process this is."""
    return os.getpid()


def unguarded(source: Any) -> Any:
    """What a process knows of its main module, and which heavy libraries it has loaded."""
    import sys

    return {"main": getattr(sys.modules["__main__"], "__file__", None), "torch": "torch" in sys.modules}
