"""Whether a first step foretells training: gains of `benchmarks/credit.py` beside differences of `appo compare`.

    python benchmarks/foretold.py

Nothing is measured here; both are read from the committed results. The two share the starting policy and the level, but
neither clips nor random numbers.
"""

from __future__ import annotations

import json
from typing import Any

import harness
import numpy as np

BASELINE = "dapo"


def pairs(credit: dict[str, Any], comparison: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Method -> (gain of a first step over DAPO's, points over DAPO while training), where both are known."""
    trained = comparison["differences"][BASELINE]
    both = [name for name in credit["ways"] if name in trained and name != BASELINE]
    return {name: (credit["ways"][name]["gain"], 100 * trained[name]["learning"]["mean"]) for name in both}


def rank_correlation(found: dict[str, tuple[float, float]]) -> float:
    """Spearman's, for values without ties."""
    ranks = [np.argsort(np.argsort(column)) for column in zip(*found.values(), strict=True)]
    return float(np.corrcoef(ranks)[0, 1])


def read(name: str) -> dict[str, Any]:
    """One of the committed results."""
    return dict(json.loads((harness.RESULTS / name).read_text(encoding="utf-8")))


def main() -> None:
    """Print the pairs from weak to strong, and how far their orders agree."""
    found = pairs(read("credit.json"), read("compare/summary.json"))
    rows = [
        [name, f"{gain:.2f}", f"{points:+.1f}"] for name, (gain, points) in sorted(found.items(), key=lambda p: p[1])
    ]
    harness.print_table("against dapo", ["method", "first step", "training, points"], rows)
    print(f"rank correlation of {len(found)} methods: {rank_correlation(found):.2f}")


if __name__ == "__main__":
    main()
