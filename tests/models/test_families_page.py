"""docs/families.md, followed to the letter: its family is written to a file and loaded, and its test is run."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

from appo.models.families import has_family
from appo.models.families.base import FAMILIES, Family

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_the_example_conforms(tmp_path: Path) -> None:
    family, test = blocks()
    for name, code in (("family.py", family), ("check.py", test)):
        (tmp_path / name).write_text(code, encoding="utf-8")
    check = runpy.run_path(str(tmp_path / "check.py"))
    assert not has_family(check["build"]("sdpa")), "the page shows what is there already"
    known = dict(FAMILIES)
    try:
        runpy.run_path(str(tmp_path / "family.py"))
        assert has_family(check["build"]("sdpa"))
        check["test_conformance"]()
    finally:
        FAMILIES.clear()
        FAMILIES.update(known)


def test_the_page_lists_every_family_and_every_member() -> None:
    text = PAGE.read_text(encoding="utf-8")
    files = {path.name for path in (PAGE.parents[1] / "src/appo/models/families").glob("*.py")} - {
        "__init__.py",
        "base.py",
    }
    assert set(re.findall(r"^\| \[`(\w+\.py)`\]", text, re.MULTILINE)) == files
    members = {name for name in vars(Family) if not name.startswith("_")}
    own = {"captured_layers", "check_time", "encode_vision", "start_generation", "repeat_generation"}
    assert members - own == set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| .*\? \|(.*?)\|", text, re.MULTILINE))))
