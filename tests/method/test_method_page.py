"""docs/method.md is true: its worked example runs, holds by hand, and the functions it names exist."""

from __future__ import annotations

import doctest
import inspect
import math
import re
from dataclasses import fields
from pathlib import Path

import torch

from appo import APPOConfig
from appo.method import perception
from appo.method.perception import token_weights
from appo.models.log_probs import score_group

METHOD_PAGE = Path(__file__).parents[2] / "docs" / "method.md"


def test_the_worked_example_of_the_method_page_holds() -> None:
    blocks = re.findall(r"```python\n(.*?)```", METHOD_PAGE.read_text(encoding="utf-8"), re.DOTALL)
    example = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, METHOD_PAGE.name, METHOD_PAGE.name, 0)
    results = doctest.DocTestRunner().run(example)
    assert results.failed == 0
    assert results.attempted >= 14


def test_the_worked_example_by_hand() -> None:
    """The page's numbers once more from fractions and logarithms, without the library."""
    log = math.log
    q_pair = (log(3 / 2) + 2 * (log(3 / 4) + log(3 / 2)) / 2) / 3  # 1, 1/2, 1/2 to their mean 2/3
    q_parted = 2 * log(2) / 3  # 1/2, 1, 0 to their mean 1/2
    level = q_pair / q_parted
    expected = [[1 + 0.7 * level, 1.35, 1.7, 1.0], [1 + 0.35 * level, 1.7, 1.0, 1.0]]
    assert [[round(w, 4) for w in row] for row in expected] == [[1.2642, 1.35, 1.7, 1.0], [1.1321, 1.7, 1.0, 1.0]]

    first_GN = torch.tensor([[1, 1 / 2, 1, 1 / 4], [1 / 2, 1, 0, 0], [1 / 2, 0, 0, 0]], dtype=torch.float64)
    frame_0 = [[0.30, 0.20, 0.05, 0.10], [0.10, 0.15, 0, 0], [0.05, 0.15, 0, 0]]
    frame_1 = [[0.05, 0.10, 0.20, 0.15], [0.30, 0.20, 0, 0], [0.20, 0.10, 0, 0]]
    frame_2 = [[0.05] * 4, [0.05] * 4, [0.10] * 4]
    group = token_weights(
        torch.tensor([frame_0, frame_1, frame_2]).permute(1, 2, 0),
        torch.arange(4) < torch.tensor([4, 2, 2])[:, None],
        torch.tensor([1.0, 0.9, 0.1]),
        torch.stack([first_GN, 1 - first_GN], dim=2).log(),
        score_tokens=2,
        top_frames=1,
        frame_tokens=3,
    )
    torch.testing.assert_close(group.weights_GN, torch.tensor([*expected, expected[1]]), rtol=0, atol=1e-6)


def test_every_function_the_method_page_names_exists() -> None:
    table = METHOD_PAGE.read_text(encoding="utf-8").split("## Equations and functions")[1].split("## Decisions")[0]
    rows = [line for line in table.splitlines() if re.match(r"\| [2-8]\. ", line)]
    names = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[3])}
    assert len(names) >= 10
    assert all(callable(getattr(perception, name)) for name in names)


def test_the_numbers_of_the_method_page_are_the_defaults() -> None:
    """The paper's, written once more: neither the page nor a default can move by itself."""
    page = METHOD_PAGE.read_text(encoding="utf-8").split("The paper's numbers")[1].split("## Equations")[0]
    rows = re.findall(r"^\| `(\w+)`.*\| ([\d.]+) \|$", page, re.MULTILINE)
    numbers = {name: float(number) for name, number in rows}
    assert numbers == {
        "attention_layers": 3, "score_tokens": 15, "top_frames": 3, "threshold": 0.5, "frame_tokens": 64,
        "max_weight": 1.7,
    }  # fmt: skip
    config = {field.name: field.default for field in fields(APPOConfig)}
    assert {name: config[name] for name in numbers} == numbers
    assert inspect.signature(score_group).parameters["capture_layers"].default == numbers.pop("attention_layers")
    of_function = inspect.signature(token_weights).parameters
    assert {name: of_function[name].default for name in numbers} == numbers
