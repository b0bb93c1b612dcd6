"""Paired differences between two methods of `appo compare`, neither of them DAPO or GRPO, from the committed cells.

    python benchmarks/between.py
    python benchmarks/between.py oracle-tokens,raw-base

Without pairs: those that docs/results.md speaks of.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import harness

from appo.evaluation.tables import markdown_table
from appo.experiments.compare.report import interval
from appo.experiments.compare.summaries import Cells, difference, paired_seeds

PAIRS = (
    "appo,lr-control", "appo,appo-shuffled", "appo,appo+normalize_weights=true", "appo-hard,appo", "appo-k3,appo",
    "raw-base,appo", "raw-base,lr-control", "raw-base,random-frames", "raw-base,oracle-frames",
    "oracle-frames,appo-relative",
)  # fmt: skip
MEASURES = ("learning", "L1", "L2", "L3")


def read_cells() -> Cells:
    """The committed cells."""
    files = sorted((harness.RESULTS / "compare" / "cells").glob("*.json"))
    cells = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return {(cell["method"], cell["seed"]): cell for cell in cells}


def rows(cells: Cells, pairs: Sequence[str]) -> list[list[str]]:
    """A row a pair: names, seeds that both have finished, differences."""
    made = []
    for pair in pairs:
        one, other = pair.split(",")
        seeds = paired_seeds(cells, [one, other])
        found = [interval(difference(cells, one, other, measure, seeds)) for measure in MEASURES]
        made.append([f"{one} minus {other}", str(len(seeds)), *found])
    return made


def main(pairs: Sequence[str]) -> None:
    """Print the table."""
    print(
        "\n".join(
            markdown_table(["", "seeds", "reward, all steps", "L1", "L2", "L3"], rows(read_cells(), pairs or PAIRS))
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])
