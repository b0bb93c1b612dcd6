"""Train the tiny policy in every combination of three settings or kinds of rows, and assert what must hold in all.

    python benchmarks/combinations.py                        # the matrix: every three values of any three kinds
    python benchmarks/combinations.py --strength 2 --seed 1  # every two, another choice
    python benchmarks/combinations.py --cases 300            # the matrix, and more cases at random

What is combined is in tests/combinations/cases.py, what is asserted in tests/combinations/invariants.py.
docs/reliability.md explains both. Each case is a run of two steps in one or two processes of its own. One that fails
or hangs is named and the others go on; its folder is kept, with what its processes have said.
"""

from __future__ import annotations

import harness  # first: it sets OpenMP's waiting before torch loads

# isort: split
import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

os.environ["HF_HUB_OFFLINE"] = "1"

from tests.combinations.cases import DIMENSIONS, Case, all_tuples, covering_array, random_cases, tuples_of
from tests.combinations.worker import run_apart
from tests.combinations.world import World, build_world

Results = list[dict[str, Any]]


def chosen(strength: int, seed: int, count: int | None) -> list[Case]:
    """The covering array; as many as are asked for, cut or with random ones behind."""
    cases = covering_array(strength, seed)
    return cases if count is None else [*cases, *random_cases(max(0, count - len(cases)), seed, cases)][:count]


def in_child(world: Path) -> World:
    """The world, made in a process that ends: those forked later must find no thread of a decoder here."""
    child = os.fork()
    if child == 0:
        try:
            build_world(world)
        finally:
            os._exit(not (world / "oracle.pt").exists())
    if os.waitpid(child, 0)[1]:
        raise SystemExit("what is trained on could not be made; see above")
    return World(world)


def run(cases: Sequence[Case], work: Path, seconds: float) -> Results:
    """Run all cases, with a line of progress each; folders of those that held are gone."""
    results: Results = []
    world, begun = in_child(work / "world"), time.perf_counter()

    for number, case in enumerate(cases):
        result = run_apart(case, world, work / "cases" / str(number), seconds)
        results.append({"case": asdict(case), **result})
        left = (time.perf_counter() - begun) / (number + 1) * (len(cases) - number - 1)
        told = f"{number + 1} of {len(cases)}: {case}: {result['outcome']}"
        print(f"{told} ({result['wall_seconds']:.1f} s, about {left / 60:.0f} min left)", flush=True)
        if result["outcome"] not in ("held", "refused"):
            print(f"    {result['reason']}\n    {work / 'cases' / str(number)}", flush=True)
    return results


# --- tables -----------------------------------------------------------------------------------------------------------


def summary(results: Results, strength: int) -> dict[str, Any]:
    """Numbers of cases, by outcome, by what was asserted, and by value."""
    done = [Case(**one["case"]) for one in results]
    covered = {one for case in done for one in tuples_of(case, strength)}
    return {
        "strength": strength,
        "tuples": len(all_tuples(strength)),
        "tuples_covered": len(covered),
        "outcomes": Counter(one["outcome"] for one in results),
        "asserted": Counter(name for one in results for name, value in one["asserted"].items() if value is not False),
        "vision_rows_compared": sum(one["asserted"].get("rows with their own features", 0) for one in results),
        "largest_difference_of_max_weight_1_and_dapo": max(
            (one["asserted"].get("max_weight 1 is dapo, within", 0.0) for one in results), default=0.0
        ),
        "processor_seconds": sum(one["processor_seconds"] for one in results),
        "wall_seconds": sum(one["wall_seconds"] for one in results),
    }


def print_tables(results: Results, numbers: dict[str, Any]) -> None:
    """Outcomes by value, and what was asserted how often."""
    rows = []
    for name, values in DIMENSIONS.items():
        for value in values:
            outcomes = Counter(one["outcome"] for one in results if one["case"][name] == value)
            others = sum(count for outcome, count in outcomes.items() if outcome not in ("held", "refused"))
            rows.append([name, value, *map(str, (outcomes["held"], outcomes["refused"], others))])
    harness.print_table("cases by value", ["dimension", "value", "held", "refused", "failed or hung"], rows)
    asserted = [[name, str(count)] for name, count in sorted(numbers["asserted"].items())]
    harness.print_table("cases by what was asserted", ["invariant", "cases"], asserted)
    print(
        f"\n{len(results)} cases, {numbers['tuples_covered']} of {numbers['tuples']} {numbers['strength']}-tuples: "
        + ", ".join(f"{count} {outcome}" for outcome, count in numbers["outcomes"].items())
        + f"; {numbers['processor_seconds']:.0f} s of the processor, {numbers['wall_seconds']:.0f} s"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the matrix, write the JSON; 0 if every case held or was refused in a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strength", type=int, default=3, choices=(1, 2, 3), help="values together (default 3)")
    parser.add_argument("--cases", type=int, help="so many: the first of the matrix, or random ones beside it")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of cases (default 0)")
    parser.add_argument("--seconds", type=float, default=180.0, help="after which a case counts as hung (default 180)")
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "combinations.json", help="the JSON to write")
    parser.set_defaults(script="combinations", device="cpu")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(prefix="combinations-"))
    (work / "world").mkdir()
    results = run(chosen(args.strength, args.seed, args.cases), work, args.seconds)
    numbers = summary(results, args.strength)
    given = sys.argv[1:] if arguments is None else arguments
    harness.write_json(args.output, harness.provenance(args, given) | numbers | {"cases": results})
    print_tables(results, numbers)
    if set(numbers["outcomes"]) <= {"held", "refused"}:
        shutil.rmtree(work)
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
