"""docs/data.md: the example of «Adding a benchmark» works as it stands there, and the table of datasets is true."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import concatenate_datasets

from appo.data import DATASETS, Benchmark, load, read
from appo.evaluation.scores import Answered, official_scores
from appo.rewards.functions import accuracy_reward
from appo.rewards.scorers import KINDS
from appo.rewards.templates import FORMATS
from appo.types import VideoSource
from tests.support.data_fixtures import CASES, nextqa, put_media

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return re.split(r"^## ", PAGE.partition(f"\n## {title}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def block(language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", section("Adding a benchmark"), re.DOTALL | re.MULTILINE)
    assert found, f"there is no block of {language}"
    return found[1]


@pytest.fixture
def kitchen(tmp_path: Path) -> Benchmark:
    """The class of the page, imported from a file, with its annotations and a real video beside it."""
    file = tmp_path / "kitchen.py"
    file.write_text(block("python"), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("kitchen", file)
    assert spec
    assert spec.loader
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "test.jsonl").write_text(block("json"), encoding="utf-8")
    put_media(tmp_path, "a.mp4")
    benchmark: Benchmark = module.Kitchen()
    return benchmark


def said(answer: str) -> str:
    return f"<think>I saw it.</think><answer>{answer}</answer>"


def test_the_example_reads_its_rows(kitchen: Benchmark, tmp_path: Path) -> None:
    first, second = read(kitchen, tmp_path, split="test")
    assert first.video == VideoSource(str(tmp_path / "a.mp4"), 0.0, 2.0)
    assert (first.answer, first.kind, first.options) == ("B", "letter", ("an onion", "a carrot"))
    assert (second.answer, second.kind, second.metadata) == ("3", "number", {"skill": "count"})
    with pytest.raises(ValueError, match=r"name the split \(train, test\)"):
        list(read(kitchen, tmp_path))
    with pytest.raises(ValueError, match="unknown split 'val'; kitchen has the splits train, test"):
        read(kitchen, tmp_path, split="val")
    rows = [json.loads(line) for line in block("json").splitlines()]
    (tmp_path / "train.jsonl").write_text(json.dumps(rows[0] | {"answer": 2}))
    with pytest.raises(ValueError, match=r"train\.jsonl, line 1: `answer` is 2; give the index of an option, 0 to 1"):
        list(read(kitchen, tmp_path, split="train"))


def test_rows_of_the_example_train(kitchen: Benchmark, tmp_path: Path) -> None:
    table = load(kitchen, tmp_path, split="test")
    part = table[0]["prompt"][0]["content"][0]
    assert (part["video"], part["video_start"], part["video_end"]) == (str(tmp_path / "a.mp4"), 0.0, 2.0)
    assert table["response_format"][:] == ["answer", "answer"]
    assert len(concatenate_datasets([table, load("nextqa", *nextqa(tmp_path / "nextqa"), "val")])) > 2


def test_reward_and_official_score_of_the_example_agree(kitchen: Benchmark, tmp_path: Path) -> None:
    table = load(kitchen, tmp_path, split="test")
    columns = {name: table[name][:] for name in ("answer", "kind", "options", "response_format")}
    questions = list(read(kitchen, tmp_path, split="test"))
    for texts in ([said("B"), said("3")], [said("a carrot"), said("4")], ["B", said("3.0")], [said("A"), ""]):
        rewards = accuracy_reward(texts, **columns)
        pairs = list(zip(questions, texts, strict=True))
        assert [kitchen.score(question, text) for question, text in pairs] == rewards
        scores = {score.name: score.value for score in official_scores(kitchen, [Answered(q, (t,)) for q, t in pairs])}
        assert scores == {"accuracy": sum(rewards) / 2, "order": rewards[0], "count": rewards[1]}


def test_a_kind_that_the_benchmark_does_not_have_is_refused(kitchen: Benchmark, tmp_path: Path) -> None:
    class LettersAlone(type(kitchen)):  # type: ignore[misc]
        kinds = ("letter",)

    with pytest.raises(ValueError, match=r"test\.jsonl, line 2: `kind` is 'number': it must be one of letter"):
        load(LettersAlone(), tmp_path, split="test")


@pytest.mark.parametrize("name", DATASETS)
def test_the_table_of_datasets_says_what_the_classes_say(name: str) -> None:
    (row,) = re.findall(rf"^\| `{name}` \|.*$", section("The datasets"), re.MULTILINE)
    *_, splits, kinds = (cell.strip() for cell in row.strip("|").split("|"))
    benchmark = DATASETS[name]
    if name == "mvbench":
        assert (len(benchmark.splits), splits) == (20, "the 20 tasks")
    else:
        assert tuple(re.findall("`(.+?)`", splits)) == benchmark.splits
    assert benchmark.kinds == (tuple(KINDS) if kinds == "any" else tuple(kinds.split(", ")))
    assert benchmark.response_format in FORMATS
    assert {gold.kind for case in CASES if case.name == name for gold in case.golds} <= set(benchmark.kinds)
