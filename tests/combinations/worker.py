"""Runs cases of the matrix in processes of their own, forked from one that has imported everything.

    python combination_worker.py WORLD OUTPUT SECONDS

reads cases from its standard input, a line of JSON each, and answers each by a line. A case gets as many processes as
it asks for. One that does not end within SECONDS is ended, with the Python stacks of its processes; the folders of
cases that failed stay in OUTPUT.
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

import appo.training.trainer  # noqa: F401  # imported once, for all cases
from tests.combinations.cases import Case
from tests.combinations.invariants import run_case
from tests.combinations.world import World

PROCESSES = {"one": 1, "ddp": 2, "fsdp2": 2}
GRACE = 20.0  # seconds for the other process, once one has failed


def shard_on_cpu() -> None:
    """FSDP2 as recipes/accelerate/fsdp2.yaml has it: the model itself names the layers that are wrapped.

    accelerate reads FSDP settings on accelerators only; torch's own FSDP2 shards on CPU just as well.
    """
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        state_dict_type="FULL_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    start = AcceleratorState.__init__

    def sharded(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        self._shared_state["distributed_type"] = DistributedType.FSDP
        self._shared_state["fsdp_plugin"] = plugin

    AcceleratorState.__init__ = sharded  # type: ignore[method-assign]


# --- one process ------------------------------------------------------------------------------------------------------


def be_process(case: Case, rank: int, port: int, world: World, folder: Path) -> None:
    """The life of a forked process: runs the case and writes what came of it."""
    with (folder / f"{rank}.txt").open("w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    faulthandler.register(signal.SIGUSR1, (folder / f"{rank}.stacks").open("w"))
    if PROCESSES[case.processes] > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in names.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    if case.processes == "fsdp2":
        shard_on_cpu()
    try:
        result = run_case(case, world, folder)
    except BaseException as error:
        places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:400]} ({' < '.join(places[::-1][:5])})"
        result = {"outcome": "failed", "reason": reason, "asserted": {}}
        traceback.print_exc()
    times = os.times()
    result |= {"processor_seconds": times.user + times.system}
    (folder / f"{rank}.json").write_text(json.dumps(result), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(result["outcome"] == "failed")


# --- a case -----------------------------------------------------------------------------------------------------------


def run_apart(case: Case, world: World, folder: Path, seconds: float) -> dict[str, Any]:
    """The result of a case, run in processes of its own."""
    folder.mkdir(parents=True)
    begin, port, children = time.monotonic(), free_port(), {}
    for rank in range(PROCESSES[case.processes]):
        child = os.fork()
        if child == 0:
            try:
                be_process(case, rank, port, world, folder)
            finally:  # never go on as the parent
                os._exit(1)
        children[child] = rank
    late = wait_for(children, begin + seconds)
    results = [_read(folder / f"{rank}.json") for rank in range(PROCESSES[case.processes])]
    failures = [one for one in results if one and one["outcome"] == "failed"]
    # The process that fails takes the connection with it, of which the other says no more than that.
    failures.sort(key=lambda one: "gloo/transport" in one["reason"])
    result = next(iter(failures), results[0] or {})
    if late and result.get("outcome") != "failed":
        stacks = {rank: _stack(folder / f"{rank}.stacks") for rank in late}
        result = {"outcome": "hung", "reason": f"not ended after {seconds:.0f} s: {stacks}", "asserted": {}}
    result = result or {"outcome": "failed", "reason": "a process ended without a word", "asserted": {}}
    if len({one["outcome"] for one in results if one}) > 1 and result["outcome"] != "failed":
        result = {"outcome": "failed", "reason": f"the processes end differently: {results}", "asserted": {}}
    result["processor_seconds"] = sum(one["processor_seconds"] for one in results if one)
    if result["outcome"] in ("held", "refused"):
        shutil.rmtree(folder)
    return result | {"wall_seconds": time.monotonic() - begin}


def wait_for(children: dict[int, int], deadline: float) -> list[int]:
    """Wait until all have ended; returns the ranks of those that had to be ended, after writing down their stacks."""
    running = dict(children)
    while running and time.monotonic() < deadline:
        for child in list(running):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                del running[child]
                if status:  # the other waits for this one
                    deadline = min(deadline, time.monotonic() + GRACE)
        time.sleep(0.02)
    for child in running:
        os.kill(child, signal.SIGUSR1)
    time.sleep(1.0 if running else 0.0)
    for child in running:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return sorted(running.values())


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _stack(dump: Path) -> str:
    """The innermost frames of this repository and of TRL, of a dump by faulthandler."""
    text = dump.read_text(encoding="utf-8") if dump.exists() else ""
    lines = [line.split('"')[1:3] for line in text.splitlines() if "/appo/" in line or "/trl/" in line]
    return " < ".join(f"{Path(path).name}{rest}" for path, rest in lines[:6])


def main(world: World, output: Path, seconds: float) -> None:
    """Run the cases that come in, a line each; answer each by a line."""
    for number, line in enumerate(sys.stdin):
        result = run_apart(Case(**json.loads(line)), world, output / str(number), seconds)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(World(Path(sys.argv[1])), Path(sys.argv[2]), float(sys.argv[3]))
