"""A loss or gradient that is not finite stops a run before the step is applied: a replay shows where it is from."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.modeling_outputs import BaseModelOutputWithPooling

from appo.cli.main import main
from appo.training.atomic_checkpoint import last_complete
from appo.training.fault_tolerance import REPLAY_FILE as FILE
from appo.training.fault_tolerance import NotFiniteError, write_description, write_tensors
from appo.training.nan_debugging import Findings, _figures, read_replay, replay
from appo.training.trainer_state import plain
from tests.support.runs import accuracy_reward, clips, make_trainer, rows_of

SETTINGS: dict[str, Any] = {"max_resampling_rounds": 0, "overlong_cache": 0, "save_strategy": "steps", "save_steps": 1}
MODULE = "model.language_model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: Any) -> Dataset:
    return rows_of(clips(tmp_path_factory.mktemp("clips")))


def huge_at_third_step(completion_ids: list[list[int]], trainer_state: Any, **kwargs: Any) -> list[float]:
    """A reward that is too large for float32 to square in the third rollout."""
    return [reward * (1e38 if trainer_state.global_step == 2 else 1.0) for reward in accuracy_reward(completion_ids)]


HUGE: dict[str, Any] = {**SETTINGS, "scale_rewards": "none", "accuracy_reward": "huge_at_third_step"}


class AtStep(TrainerCallback):
    """Does something to the policy after a step."""

    def __init__(self, step: int, action: Any) -> None:
        self._step, self._action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            self._action()


def stopped(trainer: Any) -> tuple[str, dict[str, torch.Tensor]]:
    """Train until the error; it, and the parameters that were there when it came."""
    with pytest.raises(NotFiniteError) as error:
        trainer.train()
    return str(error.value), {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize("method", ["dapo", "appo"])
def test_a_huge_reward_stops_the_run_before_anything_is_applied(tmp_path, dataset, method) -> None:
    trainer = make_trainer(tmp_path / "run", dataset, rewards=huge_at_third_step, method=method, **HUGE)
    message, parameters = stopped(trainer)
    run = tmp_path / "run"
    assert message == f"the gradient norm of step 3 is inf: nothing was applied; where it comes from: appo replay {run}"
    assert last_complete(run).path == run / "checkpoint-2"
    kept = load_file(run / "checkpoint-2" / "model.safetensors")
    saved = load_file(run / "replay" / "step-2" / "policy" / "model.safetensors")
    assert kept.keys() == saved.keys()
    assert all(torch.equal(kept[name], saved[name]) for name in kept), "the weights before the step"
    assert all(bool(torch.isfinite(value).all()) for value in parameters.values())
    found = replay(run)
    assert found.reproduced
    assert found.gradient_norm == math.inf
    assert (found.weights, len(found.micro_batches)) == ([], 2)
    assert [one.module for one in found.micro_batches] == ["", ""], "the policy itself is healthy"


def test_a_broken_weight_is_found_in_the_module_that_has_it(tmp_path, dataset) -> None:
    """One weight becomes infinite after the second step, as by a bit that flips."""
    trainer = make_trainer(tmp_path / "run", dataset, method="grpo", **SETTINGS)
    weight = trainer.model.get_submodule(MODULE).weight

    def flip() -> None:
        with torch.no_grad():
            weight[0, 0] = math.inf

    # Behind generation and scoring: generation refuses to sample from what is not finite.
    trainer.on_rollout = lambda step, groups: flip() if step == 2 else None
    message, _ = stopped(trainer)
    assert message.startswith("the loss of step 3 is nan")
    found = replay(tmp_path / "run")
    assert found.weights == [f"{MODULE}.weight"]
    assert found.micro_batches[0].module == MODULE
    figures = found.micro_batches[0].groups[0]
    assert figures.bad["log-prob"] == figures.tokens
    assert figures.bad["advantage"] == 0
    text = "\n".join(found.lines())
    assert f"first module with an output that is not finite: {MODULE}" in text
    assert f"not finite: {MODULE}.weight" in text


def test_a_gradient_that_is_not_finite_stops_and_says_when_it_cannot_be_reproduced(tmp_path, dataset) -> None:
    """A hook breaks the gradient: it is no part of weights or batch, so the replay is finite and equals the step."""
    trainer = make_trainer(tmp_path / "run", dataset, method="appo", **SETTINGS)
    norms: list[float] = []
    losses: list[float] = []
    weight = trainer.model.get_submodule(MODULE).weight
    weight.register_hook(lambda grad: grad * math.nan if trainer.state.global_step == 2 else grad)
    compute = trainer._compute_loss

    def watching(model: Any, inputs: Any) -> Any:
        loss = compute(model, inputs)
        if trainer.state.global_step == 2:
            losses.append(float(loss.detach()))
        return loss

    trainer._compute_loss = watching  # type: ignore[method-assign]
    weight.register_post_accumulate_grad_hook(lambda p: norms.append(float(p.grad.norm())))
    before = {}
    trainer.add_callback(AtStep(2, lambda: before.update({n: p.clone() for n, p in trainer.model.named_parameters()})))
    message, parameters = stopped(trainer)
    assert message.startswith("the gradient norm of step 3 is nan: nothing was applied")
    assert math.isnan(norms[-1])
    assert all(torch.equal(before[name], parameters[name]) for name in before)
    found = replay(tmp_path / "run")
    assert not found.reproduced
    assert [one.loss for one in found.micro_batches] == pytest.approx(losses, rel=1e-5)
    assert any(losses)
    assert found.gradient_norm > 0
    assert "everything is finite here" in list(found.lines())[-1]


def test_what_stopped_the_run_is_said_although_nothing_can_be_kept(tmp_path, dataset) -> None:
    """Something else lies where the replay would."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "replay").write_text("")
    message, _ = stopped(make_trainer(run, dataset, rewards=huge_at_third_step, method="dapo", **HUGE))
    assert message.startswith("the gradient norm of step 3 is inf: nothing was applied; no replay is kept, for ")
    assert f"{run / 'replay' / 'step-2'}: cannot be written" in message
    assert last_complete(run).path == run / "checkpoint-2"


def test_the_command_prints_what_is_found_and_says_what_is_missing(tmp_path, dataset, capsys) -> None:
    run = tmp_path / "run"
    assert main(["replay", str(run)]) == 2
    assert capsys.readouterr().err == (
        f"appo: {run}: nothing to replay; replay/ is written when a loss or gradient is not finite\n"
    )
    stopped(make_trainer(run, dataset, rewards=huge_at_third_step, method="grpo", **HUGE))
    assert main(["replay", str(run)]) == 0
    out = capsys.readouterr().out
    assert f"{run / 'replay' / 'step-2'}: the loss of step 3 is nan\nmicro-batch 1: loss nan\n" in out
    assert "tokens, advantages up to 5e+37, not finite: none\n" in out, "what overflows is their product"
    assert main(["replay", str(run), "--process", "1"]) == 2
    assert "there is no process 1, choose from 0 to 0" in capsys.readouterr().err


def test_figures_count_response_tokens_only_and_name_the_first() -> None:
    """Two groups of two responses of up to three tokens; what is padded may be anything."""
    nan = math.nan
    batch = {
        "completion_mask": torch.tensor([[[1, 1, 0], [1, 1, 1]], [[1, 0, 0], [1, 1, 0]]]),
        "advantages": torch.tensor([[[1.0, -2, nan], [nan, nan, nan]], [[1, 1, 1], [1, 1, 1]]]),
        "old_per_token_logps": None,
    }
    log_probs = torch.tensor([[-1.0, math.inf, nan], [-1, -1, -1], [-1, nan, nan], [-2, nan, nan]])
    one, other = _figures(batch, log_probs)
    assert (one.tokens, one.bad, one.first) == (5, {"advantage": 3, "log-prob": 1}, ("advantage", 1, 0))
    assert (one.largest_advantage, other.largest_advantage) == (2.0, 1.0)
    assert (other.tokens, other.bad, other.first) == (3, {"advantage": 0, "log-prob": 1}, ("log-prob", 1, 1))
    whole = _figures(
        {"completion_mask": batch["completion_mask"][0], "advantages": torch.tensor([nan, 1.0])}, log_probs[:2]
    )
    assert [(group.tokens, group.bad) for group in whole] == [
        (2, {"advantage": 2, "log-prob": 1}),
        (3, {"advantage": 0, "log-prob": 0}),
    ], "rows without videos: one response each"


def test_ordinary_runs_write_no_replay_and_keep_no_batches(tmp_path, dataset) -> None:
    trainer = make_trainer(tmp_path / "run", dataset, method="appo", max_steps=2)
    trainer.train()
    assert not (tmp_path / "run" / "replay").exists()
    assert trainer._batches == []


def test_batches_come_back_as_they_were(tmp_path) -> None:
    """Every kind of value that a batch holds; the file of tensors is safetensors, the rest JSON."""
    shared = torch.arange(6.0).view(2, 3)
    batch = {
        "ids": torch.tensor([[1, 2]]), "half": torch.ones(2, dtype=torch.bfloat16), "view": shared.T, "same": shared,
        "none": None, "scalar": torch.tensor(3), "pair": (1, torch.tensor([math.nan])), "text": "a\nb", "rate": 0.5,
        "vision": [{"features": BaseModelOutputWithPooling(pooler_output=(torch.ones(1), torch.zeros(2)))}],
    }  # fmt: skip
    folder = tmp_path / "replay" / "step-4"
    folder.mkdir(parents=True)
    trees = [write_tensors(folder, rank, [batch, {"rank": rank}]) for rank in range(2)]
    about = {"step": 4, "problem": "p", "settings": {"seed": 1}, "dtype": "float32", "accumulation": 2}
    write_description(folder, trees, **about)
    (tmp_path / "replay" / "step-3").mkdir()
    back = read_replay(tmp_path, rank=1)
    assert (back.step, back.problem, back.settings, back.dtype, back.accumulation) == tuple(about.values())
    assert back.batches[1] == {"rank": 1}
    assert repr(plain(back.batches[0])) == repr(plain({**batch, "view": shared.T.contiguous()}))
    assert isinstance(back.batches[0]["vision"][0]["features"], BaseModelOutputWithPooling)
    json.loads((folder / FILE).read_text())


def test_findings_name_a_few_and_count_the_rest(tmp_path) -> None:
    found = Findings(None, ["a", "b", "c", "d", "e"])  # type: ignore[arg-type]
    found.replay = read_stub(tmp_path)
    assert "weights before the step that are not finite: a, b, c and 2 more" in list(found.lines())


def read_stub(folder: Path) -> Any:
    (folder / "replay" / "step-0").mkdir(parents=True)
    tree = write_tensors(folder / "replay" / "step-0", 0, [])
    write_description(
        folder / "replay" / "step-0", [tree], step=0, problem="p", settings={}, dtype="float32", accumulation=1
    )
    return read_replay(folder)
