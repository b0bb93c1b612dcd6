"""The flat loop of examples/ trains: checked by real steps, against APPOTrainer, and against REINFORCE by hand."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from recipes.tiny_policy.build import build_policy
from torch import Tensor
from trl.rewards import get_soft_overlong_punishment

from appo import APPOConfig, APPOTrainer
from appo.rewards.functions import completion_text, format_reward
from appo.types import VideoQA
from appo.world import policy_path
from tests.support.runs import FAST, clips, logged, rows_of

PATH = Path(__file__).parents[1] / "examples" / "loop.py"


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("loop", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["loop"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


loop = load_example()
TINY = loop.Settings(steps=2, prompts=2, group=4, max_new_tokens=16, learning_rate=1e-3)


def by_length(question: VideoQA | None, text: str) -> float:
    """An untrained policy is never right: reward something about its words, so that groups are mixed."""
    return float(len(text) % 2)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[VideoQA]:
    return clips(tmp_path_factory.mktemp("clips"))


def test_two_steps_train_the_language_model_only(questions: list[VideoQA]) -> None:
    torch.manual_seed(0)
    model, processor = build_policy()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    steps = list(loop.train(model, processor, questions, TINY, by_length))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    vision = {name for name in before if ".visual." in name}
    assert len(vision) > 10
    assert not changed & vision
    assert len(changed) > 0.9 * len(before.keys() - vision)
    assert [step.number for step in steps] == [1, 2]
    for step in steps:
        assert math.isfinite(step.loss)
        assert step.loss != 0
        assert 0 < step.right < 1
        assert len(step.groups) == 2
        for group in step.groups:
            weights_GN = group.perception.weights_GN
            assert ((weights_GN >= 1) & (weights_GN <= 1.7)).all()
            assert weights_GN.max() > 1.01
            assert group.perception.crucial_F.shape == (8,)
            assert not group.advantages_GN.requires_grad
        assert f"step {step.number:3d}" in str(step)
        assert str(list(step.groups[0].question.event_frames)) in str(step)


def test_groups_of_equal_rewards_are_replaced_by_other_questions(
    questions: list[VideoQA], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, processor = build_policy()
    lucky = {questions[3].id, questions[5].id}

    def sometimes(question: VideoQA, text: str) -> float:
        return by_length(question, text) if question.id in lucky else 0.0

    monkeypatch.setattr(loop, "overlong", lambda responses, settings: torch.zeros(len(responses)))
    short = replace(TINY, steps=1, max_new_tokens=8)
    (step,) = loop.train(model, processor, questions, replace(short, resampling_rounds=6), sometimes)
    (poor,) = loop.train(model, processor, questions[:3], short, sometimes)
    assert {group.question.id for group in step.groups} == lucky
    assert step.skipped >= 4
    assert (poor.groups, poor.loss, poor.right) == ([], 0.0, 0.0), "three rounds, then the step is given up"
    assert "nothing to learn from" in str(poor)


class Recorder:
    """Gradients as they are when the optimiser is about to clip them."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.gradients: dict[str, Tensor] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        self.gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        return torch.tensor(0.0)


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    largest = max(float(value.abs().max()) for value in theirs.values())
    assert largest > 1e-3
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-5 * largest, msg=lambda m, n=name: f"{n}: {m}")


def test_one_step_of_the_loop_is_one_step_of_the_trainer(
    tmp_path: Path, questions: list[VideoQA], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same responses to the same questions: rewards, weights, advantages, loss and every gradient agree."""

    def lucky(completions: list[Any], **kwargs: Any) -> list[float]:
        return [by_length(None, completion_text(completion) or "") for completion in completions]

    settings = {"score_tokens": 8, "top_frames": 2, "frame_tokens": 8, "reward_weights": [0.9, 0.1]}
    args = APPOConfig(
        str(tmp_path), accuracy_reward="lucky", max_resampling_rounds=0,
        **{**FAST, **settings, "max_steps": 1, "max_completion_length": 16},
    )  # fmt: skip
    model, processor = build_policy()
    trainer = APPOTrainer(
        model, [lucky, format_reward], args, train_dataset=rows_of(questions), processing_class=processor
    )
    rollouts: list[Any] = []
    trainer.on_rollout = lambda step, groups: rollouts.extend(groups)
    theirs = Recorder(trainer.model)
    stock = trainer.training_step

    def recording(*args: Any, **kwargs: Any) -> Tensor:
        loss = stock(*args, **kwargs)
        theirs()
        return loss

    trainer.training_step = recording
    trainer.train()

    by_path = {question.video.path: question for question in questions}
    asked = [by_path[group.row["prompt"][0]["content"][0]["video"]] for group in rollouts]
    answers = [[torch.tensor(sample.ids) for sample in group.samples] for group in rollouts]
    policy, processor = build_policy()
    ours = Recorder(policy)
    monkeypatch.setattr(loop, "generate", lambda *args, **kwargs: answers)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", ours)
    once = replace(TINY, steps=1, resampling_rounds=0)
    (step,) = loop.train(policy, processor, asked, once, by_length)

    assert len(step.groups) == len(rollouts) == 2, "choose a seed with two mixed groups"
    for mine, other in zip(step.groups, rollouts, strict=True):
        weights_GN = mine.perception.weights_GN
        assert weights_GN.max() > 1.01
        torch.testing.assert_close(weights_GN, other.weights.weights_GN, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mine.advantages_GN, other.advantages_G[:, None] * other.weights.weights_GN)
    assert step.reward == pytest.approx(logged(trainer, "reward")[0], abs=1e-6)
    assert step.loss == pytest.approx(logged(trainer, "loss")[0], rel=1e-3, abs=2e-4), "TRL logs four decimals"
    assert_same_gradients(ours.gradients, theirs.gradients)


def test_with_weights_of_one_the_gradient_is_reinforce_by_hand(
    questions: list[VideoQA], monkeypatch: pytest.MonkeyPatch
) -> None:
    """-sum A log p / tokens, each response alone behind its prompt, unpadded, through the model's own logits."""
    torch.manual_seed(0)
    model, processor = build_policy()
    ours = Recorder(model)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", ours)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    plain = replace(TINY, steps=1, max_weight=1.0)
    (step,) = loop.train(model, processor, questions, plain, by_length)

    total = torch.zeros(())
    tokens = sum(len(response) for group in step.groups for response in group.responses)
    for group in step.groups:
        for response, advantages_N in zip(group.responses, group.advantages_GN, strict=True):
            ids_1L = torch.cat([group.prompt.ids_1P, response[None]], dim=1)
            types_1L = torch.nn.functional.pad(group.prompt.types_1P, (0, len(response)))
            mapping = group.prompt.mapping()
            vision = {key: mapping[key] for key in ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")}
            logits_LV = model(input_ids=ids_1L, mm_token_type_ids=types_1L, **vision).logits[0]
            log_probs_NV = logits_LV[-len(response) - 1 : -1].log_softmax(dim=-1)
            total = total - advantages_N[0] * log_probs_NV.gather(1, response[:, None]).sum() / tokens
    total.backward()
    theirs = Recorder(model)
    theirs()
    assert_same_gradients(ours.gradients, theirs.gradients)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.0, -2.0, 2.0, 2.0),
        (1.27, 2.0, -2.54, -2.54),  # below the upper clip
        (1.5, 2.0, -2.56, 0.0),  # clipped at 1.28: no more reward for what has become likelier already
        (1.5, -2.0, 3.0, 3.0),  # never clipped where the answer was bad and has become likelier
        (0.5, -2.0, 1.6, 0.0),  # clipped at 0.8
        (0.5, 2.0, -1.0, -1.0),
    ],
)
def test_the_loss_clips_as_dapo_does(ratio: float, advantage: float, loss: float, slope: float) -> None:
    new_GN = torch.tensor([[math.log(ratio), 5.0]], requires_grad=True)
    group: Any = loop.Group(
        question=None,
        prompt={},
        responses=[],
        old_log_probs_GN=torch.zeros(1, 2),
        mask_GN=torch.tensor([[True, False]]),
        advantages_GN=torch.tensor([[advantage, 7.0]]),
        perception=None,
    )
    result = loop.dapo_loss(new_GN, group, loop.Settings())
    assert result.item() == pytest.approx(loss, rel=1e-5)
    (gradient_GN,) = torch.autograd.grad(result, new_GN)
    assert gradient_GN.tolist() == [[pytest.approx(slope, rel=1e-5), 0.0]]


@pytest.mark.parametrize("longest", [3, 16, 96])
def test_long_answers_are_punished_as_trl_does(longest: int) -> None:
    responses = [torch.zeros(length, dtype=torch.long) for length in range(1, longest + 1)]
    theirs = get_soft_overlong_punishment(longest, max(1, longest // 5))
    expected = theirs([response.tolist() for response in responses])
    assert min(expected) == -1
    ours = loop.overlong(responses, replace(TINY, max_new_tokens=longest))
    assert ours.tolist() == pytest.approx(expected)


def test_a_second_update_leaves_the_old_policy_behind(
    questions: list[VideoQA], monkeypatch: pytest.MonkeyPatch
) -> None:
    ratios: list[Tensor] = []
    stock = loop.dapo_loss

    def spying(new_log_probs_GN: Tensor, group: Any, settings: Any) -> Tensor:
        ratios.append((new_log_probs_GN.detach() - group.old_log_probs_GN).exp())
        return stock(new_log_probs_GN, group, settings)

    monkeypatch.setattr(loop, "dapo_loss", spying)
    torch.manual_seed(0)
    list(loop.train(*build_policy(), questions, replace(TINY, steps=1, updates=2), by_length))
    first, second = ratios[:2], ratios[2:]
    for ratio_GN in first:
        torch.testing.assert_close(ratio_GN, torch.ones_like(ratio_GN), rtol=0, atol=1e-4)
    assert max(float((ratio_GN - 1).abs().max()) for ratio_GN in second) > 0.01


def test_the_script_prints_every_step(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(loop, "load_policy", build_policy)
    loop.main(["--steps", "2", "--prompts", "2", "--group", "3", "--seed", "5"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("reward")[0].strip() for line in lines] == ["step   1", "step   2"]


@pytest.mark.skipif(not (policy_path() / "config.json").exists(), reason="the weights are not shipped yet")
def test_the_shipped_policy_is_sometimes_right(questions: list[VideoQA]) -> None:
    torch.manual_seed(0)
    settings = replace(loop.Settings(), steps=1, prompts=4, group=4)
    (step,) = loop.train(*loop.load_policy(), questions, settings)
    assert 0 < step.right < 1
    assert step.groups


@pytest.mark.parametrize("arguments", [["--group", "1"], ["--steps", "0"], ["--prompts", "-2"], ["--stepps", "1"]])
def test_bad_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        loop.main(arguments)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_the_loop_stays_short_and_free_of_trainers() -> None:
    source = PATH.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 230
    imports = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    assert not [line for line in imports if any(word in line for word in ("trl", "accelerate", "trainer"))]
