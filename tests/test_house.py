"""The rules of the house, checked on the source: layers, reading order, budgets, docstrings, README, tracked files."""

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

import appo
import appo.spotlight
from appo.cli import _parser

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"

# Reading order = import order = the order data flows: a room imports from rooms above it only.
ROOMS = [
    "appo",
    "appo.types", "appo.perception", "appo.relative", "appo.prompts", "appo.intervals", "appo.answers", "appo.rewards",
    "appo.data.row", "appo.data.files", "appo.data.media", "appo.data.choices", "appo.data.table",
    "appo.data.seed_bench_r1", "appo.data.video_r1",
    "appo.data.nextqa", "appo.data.nextgqa", "appo.data.perception_test", "appo.data.vsi_bench", "appo.data.mvbench",
    "appo.data.spotlight", "appo.data.jsonl", "appo.data",
    "appo.extraction", "appo.measures", "appo.statistics", "appo.official",
    "appo.whole_files", "appo.lines", "appo.workers", "appo.numbers_given", "appo.model_names",
    "appo.sampling", "appo.decoder", "appo.decoding", "appo.frame_folders", "appo.video", "appo.frame_cache",
    "appo.probing", "appo.caching", "appo.relocating", "appo.checking", "appo.check_command",
    "appo.spans", "appo.positions", "appo.attention", "appo.packing", "appo.scoring", "appo.rollout",
    "appo.groups", "appo.resampling", "appo.batches", "appo.sight", "appo.stopwatch", "appo.vision_tower",
    "appo.encoding", "appo.weighing",
    "appo.vllm_prompts", "appo.vllm_server", "appo.vllm_rollout",
    "appo.sharding", "appo.processes",
    "appo.models",
    "appo.checkpointing_names", "appo.checkpoints", "appo.model_card", "appo.resuming",
    "appo.faults", "appo.reward_faults", "appo.replays", "appo.steady",
    "appo.setting_rules", "appo.config", "appo.out_of_memory", "appo.trainer",
    "appo.records", "appo.seen_run", "appo.strips", "appo.curves", "appo.report", "appo.terminal", "appo.filmstrip",
    "appo.recording", "appo.predictions", "appo.evaluate", "appo.inspection",
    "appo.display", "appo.scoreboard", "appo.scorecard", "appo.paired",
    "appo.spotlight",
    "appo.spotlight.world", "appo.spotlight.drawing", "appo.spotlight.clips", "appo.spotlight.teacher",
    "appo.spotlight.dataset", "appo.spotlight.processor", "appo.spotlight.policy",
    "appo.spotlight.lessons", "appo.spotlight.measure", "appo.spotlight.warmstart",
    "appo.spotlight.retelling",
    "appo.evaluating", "appo.inspecting", "appo.spotlighting",
    "appo.setting_names", "appo.dry_run", "appo.start_checks",
    "appo.adapters", "appo.sft", "appo.script", "appo.stopping", "appo.reopening",
    "appo.training", "appo.replaying", "appo.demo",
    "appo.comparing", "appo.comparing.descriptions", "appo.comparing.controls", "appo.comparing.methods",
    "appo.comparing.held_out", "appo.comparing.perceiving", "appo.comparing.cells", "appo.comparing.summaries",
    "appo.comparing.tables", "appo.comparing.plots", "appo.comparing.ablations", "appo.comparing.compare",
    "appo.comparing.command",
    "appo.studying", "appo.studying.words", "appo.studying.scenes", "appo.studying.rules", "appo.studying.members",
    "appo.studying.folder", "appo.studying.describing", "appo.studying.text_models", "appo.studying.endpoints",
    "appo.studying.settings", "appo.studying.answering", "appo.studying.gains", "appo.studying.summary",
    "appo.studying.pages", "appo.studying.study", "appo.studying.command", "appo.studying.tiny_reasoner",
    "appo.architecture", "appo.memory", "appo.phases", "appo.planning", "appo.cli",
]  # fmt: skip

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
    ("rooms", "absent"),
    [
        ("types perception prompts rewards data spans records", "transformers trl accelerate datasets"),
        ("prompts intervals answers rewards", "torch numpy rouge_score nltk"),
        ("extraction measures statistics official", "torch transformers trl datasets rouge_score"),
        ("attention scoring rollout evaluate", "trl datasets"),
        ("spotlight.world spotlight.teacher", "torch numpy transformers trl"),
        ("report terminal spotlighting", "torch numpy transformers trl av"),  # a page needs no model
        ("start_checks setting_rules model_names", "torch numpy transformers trl datasets"),  # so are wrong settings
        ("cli", "torch transformers trl"),  # --help and a user's mistake are answered at once
    ],
)
def test_rooms_load_no_more_than_they_need(rooms: str, absent: str) -> None:
    imports = ", ".join(f"appo.{room}" for room in rooms.split())
    program = f"import sys, {imports}; print([name for name in {absent.split()} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]", f"importing {imports} loads what it must not"


# --- reading order -----------------------------------------------------------------------------------------------


class Imports(ast.NodeVisitor):
    """The rooms a module imports from, wherever the import stands; those for type checkers only are exempt."""

    def __init__(self) -> None:
        self.found: list[tuple[int, str]] = []

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" not in ast.unparse(node.test):
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [(node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "appo"]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, f"line {node.lineno}: imports are absolute here"
        if node.module and node.module.split(".")[0] == "appo":
            self.found += [(node.lineno, home_of(node.module, alias.name)) for alias in node.names]


def home_of(module: str, name: str) -> str:
    """Where `from module import name` ends up: a module, or behind the two packages that look names up lazily."""
    if f"{module}.{name}" in MODULES:
        return f"{module}.{name}"
    if module == "appo":
        return appo._ROOMS.get(name, module)
    if module == "appo.spotlight" and name in appo.spotlight._HOME:
        return f"{module}.{appo.spotlight._HOME[name]}"
    return module


def imports_of(tree: ast.Module) -> list[tuple[int, str]]:
    visitor = Imports()
    visitor.visit(tree)
    return visitor.found


def test_every_module_has_its_place_in_the_reading_order() -> None:
    assert len(ROOMS) == len(set(ROOMS))
    assert set(MODULES) - set(ROOMS) == set(), "give new modules a place in ROOMS"
    assert set(ROOMS) - set(MODULES) == set(), "ROOMS names modules that are gone"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_imports_from_a_room_further_down(module: str) -> None:
    place = {room: number for number, room in enumerate(ROOMS)}
    wrong = [
        f"{shown(MODULES[module])}:{line} imports {other}"
        for line, other in imports_of(parsed(MODULES[module]))
        if place.get(other, len(ROOMS)) >= place.get(module, -1)
    ]
    assert not wrong


def test_the_import_reader_sees_what_is_hidden_and_spares_what_is_for_types() -> None:
    tree = ast.parse(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from appo.trainer import APPOTrainer\n"
        "def late():\n    from appo.video import read_video\n"
        "from appo import APPOConfig\nfrom appo import records\nimport appo.rollout as r\n"
        "from appo.spotlight import generate\nimport torch\n"
    )
    rooms = ["appo.video", "appo.config", "appo.records", "appo.rollout", "appo.spotlight.dataset"]
    assert [room for _, room in imports_of(tree)] == rooms


# --- budgets and docstrings --------------------------------------------------------------------------------------


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


CODE = python_files("src", "tests", "examples")


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
        arguments, rest = _parser().parse_known_args(call)
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
