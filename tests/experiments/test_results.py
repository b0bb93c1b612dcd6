"""docs/results.md says what the committed measurements say, and those can be made again from their raw cells."""

from __future__ import annotations

import json
import re
import sys
from io import StringIO
from pathlib import Path
from shutil import copytree

import pytest
from rich.console import Console

from appo.experiments.compare.compare import Comparison, compare
from appo.experiments.compare.report import markdown
from appo.experiments.compare.summaries import summary

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import between
import foretold

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results"
FOLDER = RESULTS / "compare"
PAGE = (REPOSITORY / "docs" / "results.md").read_text(encoding="utf-8")


def rows(text: str) -> list[list[str]]:
    """Cells of all table rows, without rules."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[part.strip() for part in line.strip("|").split("|")] for line in lines if not line.startswith("| ---")]


def marked(name: str) -> str:
    """The part of the page between two marks of this name."""
    parts = re.findall(rf"<!-- {re.escape(name)} -->\n(.*?)<!-- end -->", PAGE, flags=re.DOTALL)
    assert len(parts) == 1, name
    return str(parts[0])


def test_the_committed_table_is_made_of_the_committed_cells() -> None:
    found, settings = between.read_cells(), json.loads((FOLDER / "settings.json").read_text(encoding="utf-8"))
    for cell in found.values():
        assert {key: cell[key] for key in settings} == settings
    committed = (FOLDER / "table.md").read_text(encoding="utf-8")
    methods = list(json.loads((FOLDER / "summary.json").read_text(encoding="utf-8"))["means"])
    page = markdown(summary(found, methods), settings, [])
    assert rows(page) == rows(committed)


@pytest.mark.parametrize("part", ["", " the rest"])
def test_the_page_shows_rows_of_the_committed_table(part: str) -> None:
    committed = rows((FOLDER / "table.md").read_text(encoding="utf-8"))
    shown = rows(marked(f"benchmarks/results/compare/table.md{part}"))
    assert len(shown) > 10
    assert [row for row in shown if row not in committed] == []


@pytest.mark.parametrize(
    "mark",
    [
        "credit.json", "credit.json one at a time", "credit-blunt.json", "credit-L3.json",
        "credit-G4.json", "credit-G16.json",
    ],
)  # fmt: skip
def test_the_page_shows_the_numbers_of_first_steps(mark: str) -> None:
    ways = json.loads((RESULTS / mark.split()[0]).read_text(encoding="utf-8"))["ways"]
    head, *shown = rows(marked(f"benchmarks/results/{mark}"))
    assert len(shown) >= 5
    for way, *values in shown:
        own = ways[way.strip("`")]
        expected = {"gain": f"{own['gain']:.2f} ({own['low']:.2f}, {own['high']:.2f})"}
        for key, digits in (("cosine", 2), ("signal", 3), ("credit", 3)):
            expected[key] = f"{own.get(key, float('nan')):.{digits}f}"
        assert values == [expected[key] for key in head[1:]], way


def test_the_page_shows_the_differences_between_two_others() -> None:
    cells = between.read_cells()
    assert rows(marked("benchmarks/between.py"))[1:] == between.rows(cells, between.PAIRS)
    # By hand, of each seed's share of ones.
    ones = {name: [cells[name, seed]["levels"]["L1"]["right"].count("1") for seed in range(5)]
            for name in ("raw-base", "random-frames")}  # fmt: skip
    points = (sum(ones["raw-base"]) - sum(ones["random-frames"])) / 5 / 1000 * 100
    assert between.rows(cells, ["raw-base,random-frames"])[0][3].startswith(f"{points:+.1f} (")


def test_the_page_reports_how_far_first_steps_foretell_training() -> None:
    found = foretold.pairs(foretold.read("credit.json"), foretold.read("compare/summary.json"))
    assert len(found) == 14
    said = re.findall(r"rank correlation over (\d+) methods is \*\*(0\.\d+)\*\*", PAGE)
    assert said == [(str(len(found)), f"{foretold.rank_correlation(found):.2f}")]
    by_hand = {"a": (1.0, 10.0), "b": (2.0, 30.0), "c": (3.0, 20.0), "d": (9.0, 99.0)}
    assert foretold.rank_correlation(by_hand) == pytest.approx(1 - 6 * 2 / (4 * 15)), "two neighbours are exchanged"


def test_nothing_is_run_again_where_all_cells_are_there(tmp_path) -> None:
    """The command that made the table, on a copy of what is committed."""
    copytree(FOLDER, tmp_path / "compare")
    done = json.loads((FOLDER / "summary.json").read_text(encoding="utf-8"))
    console = Console(file=StringIO(), width=300)
    for seeds in {len(own) for own in done["seeds"].values()}:
        methods = tuple(name for name, own in done["seeds"].items() if len(own) >= seeds)
        compare(Comparison(tmp_path / "compare", methods, seeds=seeds), console, None)
    assert console.file.getvalue().count(", 0 to run") == len({len(own) for own in done["seeds"].values()})  # type: ignore[attr-defined]
    again = json.loads((tmp_path / "compare" / "summary.json").read_text(encoding="utf-8"))
    assert {**again, "unfinished": []} == {**done, "unfinished": []}
    cells = between.read_cells()
    own = [cell["levels"]["L1"]["right"].count("1") / 1000 for (name, _), cell in cells.items() if name == "dapo"]
    assert again["means"]["dapo"]["L1"] == pytest.approx(sum(own) / len(own))
