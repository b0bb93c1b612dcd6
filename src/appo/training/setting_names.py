"""How the settings of `appo train` are called, read from the classes' source: importing TRL takes twenty seconds.

The source is that of the installed transformers and TRL, so the names are theirs in any version.
`tests/training/test_setting_names.py` compares them with the parser that is made of the classes themselves.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

# Each class's package, file, name and base. Where a version of a library has them otherwise, nothing is known.
_CLASSES = (
    ("transformers", "training_args.py", "TrainingArguments", None),
    ("trl", "trainer/base_config.py", "_BaseConfig", "TrainingArguments"),
    ("trl", "trainer/grpo_config.py", "GRPOConfig", "_BaseConfig"),
    ("appo", "training/config.py", "APPOConfig", "GRPOConfig"),
    ("appo", "training/lora.py", "AdapterSettings", None),
    ("appo", "training/arguments.py", "TrainScript", "AdapterSettings"),
)


def setting_flags() -> dict[str, str] | None:
    """Every flag of a setting -> the setting's name; None if the source is not as it is known to be.

    A setting has the flags that transformers' parser gives it: ``--max_weight``, ``--max-weight``, and for a switch
    that is on by default ``--no_shared_prefix`` and ``--no-shared-prefix``.
    """
    off_by: dict[str, bool] = {}
    for package, file, name, base in _CLASSES:
        found = _class(package, file, name)
        if found is None or [ast.unparse(one) for one in found.bases] != ([] if base is None else [base]):
            return None
        off_by.update(_fields(found))
    flags: dict[str, str] = {}
    for name, has_no in off_by.items():
        for flag in (f"--{name}", f"--no_{name}") if has_no else (f"--{name}",):
            flags |= {flag: name, f"--{flag[2:].replace('_', '-')}": name}
    return flags


def meant(word: str, known: Collection[str]) -> str:
    """The known name that a misspelt or shortened one stands for, "" if none is near."""
    alike = word.replace("-", "_")
    longer = sorted((name for name in known if name.replace("-", "_").startswith(alike)), key=len)
    return next(iter([*longer[:1], *get_close_matches(word, known, 1, 0.75)]), "")


def _class(package: str, file: str, name: str) -> ast.ClassDef | None:
    spec = find_spec(package)  # of a package itself: nothing is imported
    path = Path(spec.origin).parent / file if spec and spec.origin else None
    if path is None or not path.is_file():
        return None
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return next((node for node in body if isinstance(node, ast.ClassDef) and node.name == name), None)


def _fields(found: ast.ClassDef) -> Iterator[tuple[str, bool]]:
    """The names of a dataclass's settings, each with whether it is a switch that is on by default."""
    for node in found.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        kind = ast.unparse(node.annotation)
        options = {one.arg: one.value for one in node.value.keywords} if isinstance(node.value, ast.Call) else {}
        if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "setting":
            options["default"] = node.value.args[0]
        if kind.startswith("ClassVar") or _is(options.get("init"), False):
            continue
        yield node.target.id, kind in ("bool", "bool | None") and _is(options.get("default", node.value), True)


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value
