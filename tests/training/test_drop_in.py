"""What GRPOTrainer takes and APPOTrainer must take alike: text-only rows by any sizes, reward models, single calls."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes.tiny_policy.processor import build_tokenizer
from transformers import Qwen2ForSequenceClassification, set_seed
from trl import GRPOTrainer
from trl.rewards import get_soft_overlong_punishment

from appo import APPOConfig, APPOTrainer
from tests.support.runs import FAST, accuracy_reward, logged
from tests.training.side_by_side import WORDS, policy, questions, same_trainer, small, stock_trainer


def reward_model(seed: int = 0) -> tuple[Any, Any]:
    """A reward model, and a tokenizer whose template is not the policy's."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} star {% endfor %}"
    torch.manual_seed(seed)
    return Qwen2ForSequenceClassification(small(tokenizer, num_labels=1)), tokenizer


def assert_same_training(stock: GRPOTrainer, ours: APPOTrainer) -> None:
    """Losses, rewards and parameters, bit for bit."""
    for trainer in (stock, ours):
        set_seed(1)  # both were built before: the second would go on with the first one's random numbers
        trainer.train()
    for name in ("loss", "reward", "grad_norm", "entropy"):
        assert logged(stock, name) == logged(ours, name), name
    assert any(loss != 0 for loss in logged(stock, "loss")), "nothing was learned, so nothing was compared"
    for one, other in zip(stock.model.parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["language", "vision-language"])
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, id="2 rows, groups of 4"),
        pytest.param({"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2}, id="6 rows, groups of 4"),
        pytest.param(
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4},
            id="generation over two steps",
        ),
        pytest.param(
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_iterations": 2},
            id="two iterations",
        ),
    ],
)
def test_groups_of_text_may_be_cut_by_batches_as_in_trl(tmp_path, kind, sizes):
    settings = {**sizes, "max_steps": 4}
    assert_same_training(
        stock_trainer(tmp_path, kind, settings=settings), same_trainer(tmp_path, kind, settings=settings)
    )


def test_evaluation_of_text_takes_the_sizes_that_trl_takes(tmp_path):
    """Batches of 6 rows, groups of 3 in training's place of 4; the same numbers."""
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 3, "per_device_eval_batch_size": 6}
    stock, ours = (
        make(tmp_path, settings=settings, eval_dataset=questions(WORDS[:4])) for make in (stock_trainer, same_trainer)
    )
    assert_same_training(stock, ours)
    assert len(logged(stock, "eval_reward")) == 2
    assert logged(stock, "eval_reward") == logged(ours, "eval_reward")


@pytest.mark.parametrize("kind", ["language", "vision-language"])
def test_dynamic_sampling_replaces_groups_of_text_that_batches_cut(tmp_path, kind):
    """Only one question ever gives unequal rewards: after enough rounds nothing else is trained on."""

    def only_when(prompts, completion_ids, **kwargs):
        return [float(i % 2 and prompt[0]["content"] == "when ?") for i, prompt in enumerate(prompts)]

    settings = {"max_resampling_rounds": 30, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    settings |= {"max_steps": 2, "max_completion_length": 4}
    ours = same_trainer(tmp_path, kind, only_when, settings=settings)
    batches: list[Any] = []
    loss = ours._compute_loss

    def spying(model: Any, inputs: Any) -> Any:
        batches.append(inputs)
        return loss(model, inputs)

    ours._compute_loss = spying
    ours.train()
    wanted = ours._tokenize_prompts([[{"role": "user", "content": "when ?"}]])[0][0]
    assert [len(batch["prompt_ids"]) for batch in batches] == [2] * 8
    for batch in batches:
        for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True):
            assert ids[mask.bool()].tolist() == wanted
    assert logged(ours, "resampling/flat_groups") == [0.0, 0.0]
    assert max(logged(ours, "resampling/replaced_groups")) > 0
    assert logged(ours, "reward") == [0.5, 0.5]


@pytest.mark.parametrize("given", ["alone", "list", "beside a function"])
def test_a_reward_model_with_its_own_tokenizer_trains_beside_the_overlong_punishment(tmp_path, given):
    """As TRL does with the punishment named by hand."""
    model, tokenizer = reward_model()
    settings = {"max_completion_length": 8, "max_steps": 3}
    punish = get_soft_overlong_punishment(8, 4)
    own, classes = {
        "alone": ([model], [tokenizer]),
        "list": ([model], [tokenizer]),
        "beside a function": ([accuracy_reward, model], [None, tokenizer]),
    }[given]
    stock = stock_trainer(
        tmp_path, rewards=[*own, punish], reward_processing_classes=[*classes, None], settings=settings
    )
    ours = same_trainer(
        tmp_path,
        rewards=own[0] if given == "alone" else own,
        reward_processing_classes=classes[0] if given == "alone" else classes,
        settings={**settings, "overlong_cache": 4},
    )
    assert ours.reward_processing_classes[: len(own)] == classes
    assert_same_training(stock, ours)
    name = "rewards/Qwen2ForSequenceClassification/mean"
    names = [key for key in stock.state.log_history[0] if key.startswith("rewards/")]
    assert len(names) == 2 * (len(own) + 1), names
    for name in names:
        assert logged(stock, name) == logged(ours, name), name
    assert min(logged(ours, "rewards/soft_overlong_punishment_reward/mean")) < 0


@pytest.mark.parametrize("kind", ["language", "vision-language"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_private_methods_work_by_themselves_as_those_of_trl(tmp_path, kind, training):
    """Without a rollout around them: as subclasses, notebooks and TRL's own tests call them."""
    trainers = [stock_trainer(tmp_path, kind), same_trainer(tmp_path, kind)]
    rows = [row for row in questions(WORDS[:2]) for _ in range(4)]
    prompts = [row["prompt"] for row in rows]
    answers = []
    for trainer in trainers:
        trainer.model.train(training)
        answer: dict[str, Any] = {"tokens": trainer._tokenize_prompts(prompts)}
        set_seed(3)
        answer["turn"] = trainer._generate_single_turn(answer["tokens"][0], None, {}, 4)
        set_seed(3)
        answer["generated"] = generated = trainer._generate(prompts)
        completion_ids, completions = generated[1], generated[3]
        answer["rewards"] = trainer._calculate_rewards(rows, prompts, completions, completion_ids).tolist()
        ids = torch.tensor([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]])
        with torch.no_grad():
            log_probs, entropies, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, torch.ones_like(ids), 3, compute_entropy=True
            )
        answer["log probs"], answer["entropies"] = log_probs.tolist(), entropies.tolist()
        answers.append(answer)
    stock, ours = answers
    assert len(stock["turn"][0]) == len(stock["generated"][1]) == 8
    assert stock == ours


def test_groups_of_text_may_be_shared_by_processes_as_in_trl(tmp_path):
    worker = Path(__file__).with_name("text_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(worker)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    stock, ours = torch.load(tmp_path / "results.pt", weights_only=False)
    assert stock["log"] == ours["log"]
    assert any(loss != 0 for loss in stock["log"]["loss"]), "nothing was learned, so nothing was compared"
    for one, other in zip(stock["parameters"], ours["parameters"], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("reward_funcs", [None, []])
def test_no_reward_function_is_refused_as_by_trl(tmp_path, reward_funcs):
    """Also where the punishment of long responses would be the only one."""
    with pytest.raises(ValueError, match="No reward source provided"):
        same_trainer(tmp_path, rewards=reward_funcs, settings={"overlong_cache": 4})


REFUSED = {
    "rollout_func": lambda prompts, trainer: {},
    "tools": [len],
    "environment_factory": dict,
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("by_place", [False, True])
def test_arguments_that_videos_cannot_have_are_refused_by_name(tmp_path, name, by_place):
    model, tokenizer, _ = policy("language")
    args = APPOConfig(str(tmp_path), **FAST)
    given = {"train_dataset": questions(), "processing_class": tokenizer, name: REFUSED[name]}
    names = list(inspect.signature(GRPOTrainer.__init__).parameters)[4:]
    with pytest.raises(ValueError, match=f"^{name} is not supported: [^\n]*$"):
        if by_place:
            places = [given.get(one) for one in names[: names.index(name) + 1]]
            APPOTrainer(model, accuracy_reward, args, *places)
        else:
            APPOTrainer(model, accuracy_reward, args, **given)
