"""What every benchmark needs: interleaved timing, peak memory, tables, and a JSON that says where it was measured.

Import this module before torch: it sets how waiting OpenMP threads behave.
"""

from __future__ import annotations

import os

# Two OpenMP threads that spin on shared cores run many times slower than one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import contextlib
import gc
import json
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parents[1]))  # for `recipes`, also where a script is started from elsewhere
RESULTS = Path(__file__).parent / "results"
GB = 1e9


# --- command line ----------------------------------------------------------------------------------------------------


def base_parser(doc: str, name: str) -> argparse.ArgumentParser:
    """The flags all benchmarks share; ``doc`` is the script's docstring, which shows an example."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch (default 1)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; medians are reported (default 3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.json", help="the JSON to write")
    parser.set_defaults(script=name)
    return parser


def prepare(args: argparse.Namespace) -> None:
    """Apply ``--threads`` and ``--seed``; refuse a device that is not there."""
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(f"--device {args.device}: torch sees no CUDA device here")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)


# --- time ------------------------------------------------------------------------------------------------------------


@dataclass
class Timed:
    """Seconds of one measured thing, one entry a round: on the wall's clock, and on the processor's.

    The processor's clock stands still while another process has the core: on a shared machine it is the steadier one.
    """

    call: Callable[[], Any]
    rounds: int | None = None  # None: as many as the others
    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The reported number."""
        return statistics.median(self.seconds)

    def measure(self, device: str) -> None:
        """Call once more; everything launched on the device is waited for, the result is dropped."""
        synchronize(device)
        start, processor_start = time.perf_counter(), time.process_time()
        self.call()
        synchronize(device)
        self.seconds.append(time.perf_counter() - start)
        self.processor_seconds.append(time.process_time() - processor_start)

    def as_json(self) -> dict[str, Any]:
        """Every round and the medians."""
        return {
            "seconds": self.seconds,
            "median": self.median,
            "processor_seconds": self.processor_seconds,
            "processor_median": statistics.median(self.processor_seconds),
        }


def time_interleaved(
    timed: Mapping[str, Timed], repeats: int, device: str, on_round: Callable[[int], None] | None = None
) -> None:
    """Measure A B C, A B C, ..: what else the machine does then falls on all alike, and quotients of medians hold."""
    for number in range(repeats):
        gc.collect()
        for item in timed.values():
            if number < (item.rounds or repeats):
                item.measure(device)
        if on_round is not None:
            on_round(number + 1)


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


class TimeLeft:
    """Says how far a run is, and guesses when it ends from the work (any unit) that is done."""

    def __init__(self, total_work: float) -> None:
        self._total, self._done, self._start = total_work, 0.0, time.perf_counter()

    def step(self, what: str, work: float) -> None:
        """Print one progress line to standard error."""
        self._done += work
        elapsed = time.perf_counter() - self._start
        left = elapsed * max(self._total / self._done - 1, 0.0)
        print(f"{what}: {elapsed:.0f} s so far, about {left / 60:.1f} min left", file=sys.stderr, flush=True)


# --- memory ----------------------------------------------------------------------------------------------------------


def peak_memory(call: Callable[[], Any], device: str) -> int:
    """Bytes that a call needs at its peak beyond what was in use before it (weights, libraries).

    On CUDA: torch's allocator. On CPU: the kernel's high-water mark of resident memory, reset before the call; where
    it cannot be reset, that of the whole process, so measure in a fresh one.
    """
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated() - before
    before = reset_high_water_mark()
    call()
    return max(high_water_mark() - before, 0)


def reset_high_water_mark() -> int:
    """Bytes of resident memory now, from which :func:`high_water_mark` counts on; where it can be reset."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return high_water_mark()


def high_water_mark() -> int:
    """The most bytes of resident memory so far."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_of_fresh_process(script: Path, arguments: Sequence[str]) -> int:
    """Run ``script`` again with ``arguments``, which print ``{"peak_bytes": ..}`` as their last line."""
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed: {done.stderr.strip().splitlines()[-1:]}")
    return int(json.loads(done.stdout.strip().splitlines()[-1])["peak_bytes"])


def free_memory(device: str) -> int:
    """Bytes that a measurement may use: 60 % of what is free on a CPU, which others use too, 90 % on a device."""
    if device.startswith("cuda"):
        return int(0.9 * torch.cuda.mem_get_info()[0])
    return int(0.6 * available_memory())


def available_memory() -> int:
    """Bytes of main memory that the system could give now; 13 GiB where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 13 * 2**30


# --- what was measured where -----------------------------------------------------------------------------------------


def provenance(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """The command, versions and machine of a run, for its JSON."""
    return {
        "benchmark": args.script,
        "command": shlex.join(["python", f"benchmarks/{args.script}.py", *_without_output(argv)]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "versions": {name: version(name) for name in ("python", "appo", "torch", "transformers", "trl")},
        "git_commit": _commit(),
        "machine": _machine(args),
    }


def _without_output(argv: Sequence[str]) -> list[str]:
    """Where the JSON went is of no interest, and may name a folder of this machine."""
    kept, skip = [], False
    for word in argv:
        if not (skip or word.startswith("--output")):
            kept.append(word)
        skip = word == "--output"
    return kept


def version(name: str) -> str | None:
    """Of a package; None where it is not installed."""
    if name == "python":
        return platform.python_version()
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        import appo

        return appo.__version__ if name == "appo" else None


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _machine(args: argparse.Namespace) -> dict[str, Any]:
    machine: dict[str, Any] = {
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "device": args.device,
    }
    if args.device.startswith("cuda"):
        machine |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return machine


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a result, rounding seconds and ratios to 5 significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(data), indent=1) + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


# --- tables ----------------------------------------------------------------------------------------------------------


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table, columns aligned, under a title."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    print(f"\n{title}\n")
    for line in lines:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")


def shown(value: float | None, unit: str = "", digits: int = 3) -> str:
    """A number with its unit; a dash where nothing was measured."""
    return "-" if value is None else f"{value:#.{digits}g}".rstrip(".") + unit
