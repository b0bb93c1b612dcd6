"""Rules of the source: what modules load, budgets, docstrings, README, tracked files. Imports: `lint-imports`."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from appo.cli.main import command_parser

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"

LONGEST_FUNCTION = 60
LONGEST_FILE = 400


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in python_files("src")}


# --- layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("types method.perception rewards.templates rewards.functions data models.frame_tokens reports.run_folder",
         "transformers trl accelerate datasets"),
        ("rewards.templates rewards.temporal_iou rewards.scorers rewards.functions", "torch numpy rouge_score nltk"),
        ("rewards.answer_parsing data.benchmark evaluation.statistics evaluation.scores",
         "torch transformers trl datasets rouge_score"),
        ("models.frame_attention models.log_probs rollout.generation evaluation.inference", "trl datasets"),
        ("world.world world.teacher", "torch numpy transformers trl"),
        ("reports.page reports.console cli.spotlight", "torch numpy transformers trl av"),  # a page needs no model
        ("training.start_checks training.setting_rules models.names", "torch numpy transformers trl datasets"),
        ("cli.main", "torch transformers trl datasets numpy rich"),  # --help and a user's mistake are answered at once
    ],
)  # fmt: skip
def test_modules_load_no_more_than_they_need(modules: str, absent: str) -> None:
    imports = ", ".join(f"appo.{module}" for module in modules.split())
    program = f"import sys, {imports}; print([name for name in {absent.split()} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]", f"importing {imports} loads what it must not"


# --- budgets and docstrings --------------------------------------------------------------------------------------


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


CODE = python_files("src", "tests", "examples", "recipes")


def test_no_file_is_longer_than_a_reader_can_hold() -> None:
    assert len(CODE) > 50, "the files were not found"
    lengths = {shown(path): len(path.read_text(encoding="utf-8").splitlines()) for path in CODE}
    assert {path: lines for path, lines in lengths.items() if lines > LONGEST_FILE} == {}


def test_no_function_is_longer_than_a_screen() -> None:
    lengths = {
        f"{shown(path)}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in CODE
        for node in functions(parsed(path))
    }
    assert len(lengths) > 500, "the functions were not found"
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FUNCTION} == {}


def undocumented(node: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[str]:
    """Public functions, classes and methods without a docstring. Code inside functions is nobody's interface."""
    for child in node.body:
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or child.name.startswith("_"):
            continue
        if ast.get_docstring(child) is None:
            yield prefix + child.name
        if isinstance(child, ast.ClassDef):
            yield from undocumented(child, f"{prefix}{child.name}.")


# What a base class of another library documents, and calls.
INHERITED = {
    "APPOTrainer.training_step",
}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_everything_public_has_a_docstring(module: str) -> None:
    tree = parsed(MODULES[module])
    assert ast.get_docstring(tree), f"{module} does not say what it is for"
    assert set(undocumented(tree)) - INHERITED == set()


# --- README ------------------------------------------------------------------------------------------------------


@cache
def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def readme_commands() -> list[list[str]]:
    """The commands of README.md's shell blocks, without what starts them (`$`, `uv run --extra dev`)."""
    blocks = re.findall(r"^```(?:bash|console)\n(.*?)^```", readme(), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(part.removeprefix("$ "), comments=True) for line in lines for part in line.split("&&")]
    return [list(_without_runner(words)) for words in commands if words]


def _without_runner(words: list[str]) -> list[str]:
    if words[:2] != ["uv", "run"]:
        return words
    start = next(i for i, word in enumerate(words) if word in ("appo", "pytest", "python"))
    return words[start:]


def test_the_readme_shows_how_to_try_and_how_to_test() -> None:
    commands = readme_commands()
    assert ["appo", "demo"] in [command[:2] for command in commands]
    assert any("pytest" in command for command in commands)


def test_every_command_of_the_readme_is_understood() -> None:
    inline = [shlex.split(code) for code in re.findall(r"`(appo [^`]+)`", readme())]
    calls = [command[1:] for command in [*readme_commands(), *inline] if command[0] == "appo"]
    assert calls
    for call in calls:
        arguments, rest = command_parser().parse_known_args(call)
        assert arguments.command == "train" or not rest, f"appo {shlex.join(call)}: {rest}"
        if getattr(arguments, "config", None):
            assert (ROOT / arguments.config).is_file(), f"{arguments.config} is not in the repository"


def test_every_link_of_the_readme_leads_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", readme()) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


# --- what is tracked ---------------------------------------------------------------------------------------------


@cache
def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in names.split("\0") if (ROOT / name).is_file()]


def test_no_lock_file_is_tracked() -> None:
    """Which versions and which registry are used is for whoever installs; the bounds are in pyproject.toml."""
    locks = {"uv.lock", "package-lock.json", "poetry.lock", "yarn.lock", "Pipfile.lock"}
    assert ROOT / "pyproject.toml" in tracked()
    assert [shown(path) for path in tracked() if path.name in locks] == []


def test_no_registry_is_written_down() -> None:
    hosts = re.compile("|".join([r"index[-_]url", r"pypi\.org", r"files\.pythonhosted"]).encode())
    assert hosts.search(b"--index-" + b"url x")
    assert [shown(path) for path in tracked() if hosts.search(path.read_bytes())] == []


# --- the way of a row --------------------------------------------------------------------------------------------

MOST_MODULES = 20


def imported_by(module: str) -> set[str]:
    """The modules of appo that a module imports from, wherever the import stands."""
    nodes = [node for node in ast.walk(parsed(MODULES[module])) if isinstance(node, ast.ImportFrom) and node.module]
    return {name for node in nodes for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))}


def test_the_way_of_a_row_is_the_one_on_the_page() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    way = re.findall(r"^\| `(appo\.[\w.]+)` \| `(\w+)` \|", text, re.MULTILINE)
    modules = [module for module, _ in way]
    assert len(way) == len(set(modules)) <= MOST_MODULES
    for module, name in way:
        names = {node.name for node in parsed(MODULES[module]).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert name in names, f"{module} has no {name}"
    imports = {module: imported_by(module) for module in modules}
    packages = {module: module.rpartition(".")[0] for module in modules}
    for module in modules:
        others = [other for other in modules if other != module]
        touched = any(module in imports[other] or other in imports[module] for other in others)
        assert touched or packages[module] in ("appo.data", "appo.reports"), f"{module} is apart from the others"


def test_there_are_at_most_twelve_packages_of_twenty_modules() -> None:
    packages = {module.split(".")[1] for module, path in MODULES.items() if path.parent != SOURCE / "appo"}
    assert len(packages) <= 12
    loose = {path.name for path in (SOURCE / "appo").glob("*.py")}
    assert loose == {"__init__.py", "__main__.py", "files.py", "types.py"}
    for folder in {path.parent for path in MODULES.values()}:
        assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= 22, folder


# --- collectives -------------------------------------------------------------------------------------------------

COLLECTIVE = re.compile(
    r"\b(gather_object|broadcast_object_list|all_reduce|all_gather\w*|wait_for_everyone)\b|accelerator\.gather\b"
)


def test_one_module_makes_the_collective_calls() -> None:
    """A call that only some processes make hangs all of them, so there is one place to look for it."""
    found = {module for module, path in MODULES.items() if COLLECTIVE.search(path.read_text(encoding="utf-8"))}
    assert found == {"appo.rollout.collectives"}
