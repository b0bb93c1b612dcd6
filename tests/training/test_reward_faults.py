"""A reward function that raises is named in one line, with its error, the step and the rows; it is called once."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerState

from appo.cli.main import main
from appo.training.atomic_checkpoint import last_complete
from appo.training.faults import SHOWN_CHARACTERS, RewardError, watched
from tests.support.runs import accuracy_reward, clips, make_trainer, rows_of

ARGUMENTS: dict[str, Any] = {
    "prompts": ["p"] * 3,
    "completions": ["1", "two\x1b[31m\n", "3"],
    "completion_ids": [[1], [2], [3]],
    "id": ["a", "b", "c"],
    "trainer_state": TrainerState(global_step=4),
}
calls: list[int] = []


def number_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """A mistake that is easily made: it trusts the policy to say a number."""
    return [float(text) for text in completions]


def fails_at_third_call(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """Works twice."""
    calls.append(len(completion_ids))
    if len(calls) >= 3:
        raise KeyError("answer")
    return accuracy_reward(completion_ids)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: Any) -> Dataset:
    return rows_of(clips(tmp_path_factory.mktemp("clips")))


def test_function_error_place_step_rows_and_completion_are_named() -> None:
    with pytest.raises(RewardError) as error:
        watched(number_reward, "number_reward")(**ARGUMENTS)
    line = number_reward.__code__.co_firstlineno + 2
    assert str(error.value).replace(r"could not convert string to float: 'two\x1b[31m\n'", "WHAT") == (
        f"reward function number_reward raises ValueError: WHAT (test_reward_faults.py, line {line}) in step 5 "
        "for one of 3 rows, the first is row a, completion '1'; correct it, then resume from the last checkpoint"
    )
    assert isinstance(error.value.__cause__, ValueError), "the traceback is there for those who look"
    with pytest.raises(RewardError, match=r"raises RuntimeError: a b \\x1b\[2Jc \("):
        watched(lambda **kwargs: exec("raise RuntimeError('a\\nb \\x1b[2Jc')"), "r")(**ARGUMENTS)
    assert "\n" not in str(error.value)
    assert "\x1b" not in str(error.value)


def test_rows_without_ids_and_steps_that_are_not_known() -> None:
    without = {name: value for name, value in ARGUMENTS.items() if name not in ("id", "trainer_state")}
    with pytest.raises(RewardError, match=r"py, line \d+\) for one of 3 rows, the first is row 0 of the call, comp"):
        watched(number_reward, "r")(**without)


def test_it_is_called_once() -> None:
    """A reward function may cost money, or write down what it was asked."""
    logged: list[Any] = []

    def logging(completions: list[Any], log_extra: Any, log_metric: Any, **kwargs: Any) -> list[float]:
        log_extra("column", completions)
        log_metric("metric", 1.0)
        return number_reward(completions)

    own = {**ARGUMENTS, "log_extra": lambda *said: logged.append(said), "log_metric": lambda *said: logged.append(said)}
    with pytest.raises(RewardError, match="reward function logging raises ValueError"):
        watched(logging, "logging")(**own)
    assert logged == [("column", ARGUMENTS["completions"]), ("metric", 1.0)]


@pytest.mark.parametrize(
    ("completion", "shown"),
    [
        ("x" * 500, repr("x" * SHOWN_CHARACTERS) + "..."),
        ([{"role": "assistant", "content": "a\tb"}], r"'a\tb'"),
        ("那是红色", "'那是红色'"),
    ],
)
def test_completions_are_short_and_on_one_line(completion, shown) -> None:
    with pytest.raises(RewardError) as error:
        watched(number_reward, "r")(completions=[completion], prompts=["p"], id=["a"])
    assert f"completion {shown}; correct" in str(error.value)


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_infinite_rewards_are_refused_and_abstentions_are_not(value) -> None:
    def some(completions: list[Any], **kwargs: Any) -> list[Any]:
        return [None, float("nan"), value]

    with pytest.raises(RewardError, match=rf"reward function some returns {value} for row c, completion '3'"):
        watched(some, "some")(**ARGUMENTS)
    assert watched(lambda **kwargs: torch.tensor([1.0, 2.0]), "t")(**ARGUMENTS) == [1.0, 2.0]
    assert watched(lambda **kwargs: [None, 1.0, 0.0], "n")(**ARGUMENTS) == [None, 1.0, 0.0]


def test_async_functions_are_named_too_and_stay_async() -> None:
    async def later(completions: list[Any], **kwargs: Any) -> list[float]:
        return number_reward(completions)

    function = watched(later, "later")
    assert asyncio.iscoroutinefunction(function)
    with pytest.raises(RewardError, match="reward function later raises ValueError"):
        asyncio.run(function(**ARGUMENTS))
    assert asyncio.run(watched(later, "later")(completions=["1", "2"])) == [1.0, 2.0]


def test_names_stay_what_they_were_and_models_are_left_alone(tmp_path, dataset) -> None:
    scaled = functools.partial(accuracy_reward, scale=2)
    trainer = make_trainer(tmp_path, dataset, rewards=[accuracy_reward, scaled], accuracy_reward="accuracy_reward")
    assert trainer.reward_func_names[0] == "accuracy_reward"
    model = torch.nn.Linear(1, 1)
    assert watched(model, "model") is model


def test_a_run_ends_with_the_line_and_keeps_its_checkpoint(tmp_path, dataset) -> None:
    calls.clear()
    settings = {"max_resampling_rounds": 0, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path / "run", dataset, rewards=fails_at_third_call, method="dapo", **settings)
    line = r"reward function fails_at_third_call raises KeyError: 'answer' .* in step 3 for one of 8 rows, .* row l1-"
    with pytest.raises(RewardError, match=line):
        trainer.train()
    assert calls == [8, 8, 8]
    assert last_complete(tmp_path / "run").path == tmp_path / "run" / "checkpoint-2"


def test_the_command_exits_with_2_and_one_line(tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "broken_rewards.py").write_text(
        "def always(completions, **kwargs):\n    raise ValueError('no\\nway')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run = ["train", "--tiny", "--output_dir", str(tmp_path / "run"), "--rewards", "broken_rewards:always"]
    assert main(run) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(
        "appo: reward function always raises ValueError: no way (broken_rewards.py, line 2) in step 1 for one of "
    )
    assert not (tmp_path / "run").exists(), "nothing was recorded, so the corrected command may use the folder"
