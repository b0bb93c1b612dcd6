"""What must hold for a run whatever is combined in it: no values, only identities.

`run_case` trains as a case says, for two steps, and asserts them; its docstring lists them. In a run of several
processes each of them calls it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import LoraConfig
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from appo import APPOConfig, APPOTrainer
from appo.models.frame_attention import appo_attention
from appo.rollout.generation import evaluation_mode
from tests.combinations.cases import Case
from tests.combinations.spectator import Rewarded, Spectator
from tests.combinations.world import FAULTS, GROUP, KINDS, SAMPLING, World
from tests.support.runs import FAST
from tests.training.resume_cases import TIMES, killed_after, tensors_of

STEPS = 2
RELATIVE = {"frame_attention": "relative", "base_weight": 0.2, "normalize_weights": True}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # packed against rows, as in tests/training/test_trainer.py
# Where one rollout serves several steps, appo has the old log-probabilities from the pass that captures, dapo from one
# of their own. That one pads rows to the longest prompt and leaves masked responses out: it may add in another order.
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


# --- a run ------------------------------------------------------------------------------------------------------------


def settings_of(case: Case, world: World) -> dict[str, Any]:
    """The settings of a case."""
    groups, resampling = 1 + (case.batch == "two groups"), case.resampling == "on"
    updates = {
        "one": {},
        "steps_per_generation": {"steps_per_generation": 4 // groups},
        "num_iterations": {"num_iterations": 2},
    }
    return {
        **FAST,
        "method": case.method,
        "num_generations": GROUP,
        "per_device_train_batch_size": groups * GROUP,
        "gradient_accumulation_steps": 2 // groups,
        "max_completion_length": 6,
        "max_steps": STEPS,
        "seed": zlib.crc32(str(case).encode()) % 10_000,
        "shuffle_dataset": False,
        "adam_epsilon": 1e-2,  # else Adam makes a whole step of a gradient that is nothing but rounding
        "threshold": 0.5,
        "score_tokens": 3,
        "top_frames": 2,
        "frame_tokens": 2,
        "video_fps": SAMPLING.fps,
        "video_max_frames": SAMPLING.max_frames,
        "video_min_frames": SAMPLING.min_frames,
        "frame_cache": str(world.frames),
        "max_resampling_rounds": 2 * resampling,
        **({"overlong_cache": 0} if resampling else {}),
        "shared_prefix": case.layout != "rows",
        "rows_per_chunk": int(case.layout == "chunks"),
        "mask_truncated_completions": case.truncation == "masked",
        "beta": float(case.beta),
        "freeze_vision_tower": case.tower == "frozen",
        **(RELATIVE if case.weights == "relative" else {}),
        "gradient_checkpointing": case.checkpointing == "on",
        **updates[case.updates],
        **({"save_strategy": "steps", "save_steps": 1} if case.resume == "yes" else {}),
    }


def reward_of(case: Case, trainer: Callable[[], APPOTrainer], given: list[Rewarded]) -> Any:
    """A reward that differs within a group; with dynamic sampling every second row's are equal, so it is replaced.

    ``given``: gets every response that is rewarded, with what the rewards add up to.
    """

    def accuracy_reward(completion_ids: list[list[int]], number: list[int], **_: Any) -> list[float | None]:
        rewards: list[float | None] = []
        for ids, row in zip(completion_ids, number, strict=True):
            flat, left_out = case.resampling == "on" and row % 2 == 0, case.reward == "with None" and sum(ids) % 4 == 0
            reward = None if left_out else 0.0 if flat else sum(ids) % 97 / 96
            rewards.append(reward)
            total = with_length(math.nan if reward is None else reward, len(ids))
            given.append(Rewarded(row, tuple(ids), ids[-1] in trainer().eos_token_ids, total))
        return rewards

    def with_length(total: float, length: int) -> float:
        args = trainer().args
        if not args.overlong_cache:
            return total
        punishment = min(0, args.max_completion_length - args.overlong_cache - length) / args.overlong_cache
        return punishment + (0.0 if math.isnan(total) else total)

    return accuracy_reward


def make_trainer(case: Case, world: World, folder: Path, given: list[Rewarded], **changed: Any) -> APPOTrainer:
    """The trainer of a case, with some settings changed."""
    lora = LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|v_proj)", lora_dropout=0.2)
    args = APPOConfig(output_dir=str(folder), **{**settings_of(case, world), **changed})
    trainer = APPOTrainer(
        str(world.policy),
        reward_of(case, lambda: trainer, given),
        args,
        train_dataset=world.dataset(case.rows),
        peft_config=lora if case.peft == "lora" else None,
    )
    return trainer


# --- what came of a run -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
        trainer: with its parameters.
        log: what it logged, without times.
        parameters: those that are trained, whole, by name.
        optimiser: its tensors; where parameters are sharded, this process's pieces.
    """

    trainer: APPOTrainer
    log: list[dict[str, Any]]
    parameters: dict[str, Tensor]
    optimiser: list[Tensor]


def trained(trainer: APPOTrainer, **train: Any) -> Trained:
    """Train, to the end."""
    trainer.train(**train)
    assert trainer.state.global_step == STEPS, f"the run ended after step {trainer.state.global_step}"
    log = [
        {name: value for name, value in entry.items() if name not in TIMES and not name.startswith("time/")}
        for entry in trainer.state.log_history
    ]
    parameters = {name: whole(p).clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    optimiser = [local(tensor).clone() for tensor in tensors_of(trainer.optimizer.state_dict())]
    return Trained(trainer, log, parameters, optimiser)


def whole(tensor: Tensor) -> Tensor:
    """A parameter or gradient as one tensor, wherever its pieces are. Every process must ask."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def local(tensor: Tensor) -> Tensor:
    """This process's piece of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not equal, bit for bit."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def logged(run: Trained, name: str) -> list[float]:
    """A metric, line by line."""
    return [entry[name] for entry in run.log if name in entry]


# --- the invariants ---------------------------------------------------------------------------------------------------


def assert_own_features(case: Case, spectator: Spectator) -> None:
    """What was trained on is what was rolled out, each row with its own features; a faulty row costs itself only."""
    assert not spectator.problems, "; ".join(sorted(spectator.problems)[:3])
    assert spectator.rollouts
    for rollout in spectator.rollouts:
        if case.truncation == "masked":
            assert rollout.ended <= rollout.trained <= rollout.counted
        else:
            assert rollout.trained == rollout.counted, f"trained on {rollout.trained}, rewarded {rollout.counted}"
        assert rollout.flat in (None, rollout.idle), f"{rollout.flat} of the groups count as flat, {rollout.idle} are"
    rows = set().union(*(rollout.trained for rollout in spectator.rollouts))
    with_vision = {number for number in rows if KINDS[case.rows][number] != "text"}
    assert bool(spectator.vision_rows) == bool(with_vision) or case.tower == "trained"
    if case.rows == "faulty":
        faulty = {number for number, kind in enumerate(KINDS["faulty"]) if kind in FAULTS}
        assert spectator.rollouts[0].asked & faulty, "no fault was met, so nothing was shown"
        assert not rows & faulty


def assert_numbers(case: Case, run: Trained) -> None:
    """All numbers are finite; something is learned; the reference is the policy that the run began with."""
    for name in ("loss", "grad_norm", "entropy"):
        assert all(map(math.isfinite, logged(run, name))), (name, logged(run, name))
    assert len(logged(run, "loss")) == STEPS
    if case.truncation == "kept":
        assert max(logged(run, "grad_norm")) > 0, "nothing was learned, so nothing was compared"
    if case.beta != "0":
        assert abs(logged(run, "kl")[0]) < 1e-6, f"the reference is another model: {logged(run, 'kl')}"
    if case.rows == "faulty":
        assert logged(run, "faults/videos")[-1] > 0


def assert_weights_of_one_are_dapo(case: Case, world: World, folder: Path, dapo: Trained) -> float:
    """``method: appo`` with ``max_weight: 1`` is dapo, bit for bit. Returns the largest difference of a parameter."""
    appo = trained(make_trainer(case, world, folder, [], method="appo", max_weight=1.0, base_weight=1.0))
    exact = case.updates == "one"
    for name in ("loss", "reward", "grad_norm"):
        ours, theirs = (torch.tensor(logged(run, name)) for run in (appo, dapo))
        assert torch.allclose(ours, theirs, **({"rtol": 0, "atol": 0} if exact else ROUNDING)), f"{name} is not dapo's"
    worst = max(float((appo.parameters[name] - dapo.parameters[name]).abs().max()) for name in dapo.parameters)
    assert worst == 0 if exact else worst < 1e-6, f"parameters differ by {worst:.3g}"
    return worst


def assert_layouts_agree(case: Case, run: Trained, inputs: dict[str, Any]) -> bool:
    """The first micro-batch's log-probabilities, loss and gradients, packed as the case says, and as ordinary rows.

    Returns whether there was something to compare: text alone takes TRL's own rows.
    """
    if "vision" not in inputs:
        return False
    packed, rows = (_loss_and_gradients(case, run.trainer, inputs, shared) for shared in (True, False))
    mask = inputs["completion_mask"].flatten(0, 1).bool()
    torch.testing.assert_close(packed[0][mask], rows[0][mask], **CLOSE, msg=lambda text: f"log-probabilities: {text}")
    torch.testing.assert_close(packed[1], rows[1], **CLOSE, msg=lambda text: f"loss: {text}")
    assert packed[2].keys() == rows[2].keys()
    for name, gradient in rows[2].items():
        limit = 1e-4 * max(float(gradient.abs().max()), 1e-2)
        assert float((packed[2][name] - gradient).abs().max()) <= limit, f"the gradient of {name} depends on packing"
    return bool(mask.any())


def _loss_and_gradients(case: Case, trainer: APPOTrainer, inputs: Any, shared: bool) -> tuple[Tensor, Tensor, Any]:
    """Log-probabilities, loss and gradients of a micro-batch, without dropout."""
    model = trainer.model_wrapped if isinstance(trainer.model_wrapped, FSDPModule) else trainer.model
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(True)
    trainer.args.shared_prefix = shared
    trainer.args.rows_per_chunk = int(shared and case.layout == "chunks")
    seen: list[Tensor] = []
    original = trainer._get_per_token_logps_and_entropies

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        seen.append(result[0].detach())
        return result

    trainer._get_per_token_logps_and_entropies = watched
    model.zero_grad()
    try:
        with evaluation_mode(trainer.model), appo_attention(trainer.base_model) if shared else nullcontext():
            loss = trainer._compute_loss(model, inputs)
            loss.backward()
    finally:
        trainer._get_per_token_logps_and_entropies = original
    gradients = {name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
    return seen[0], loss.detach(), gradients


def assert_processes_agree(run: Trained) -> None:
    """All processes end with the same parameters and log the same losses."""
    own = {name: zlib.crc32(value.cpu().numpy().tobytes()) for name, value in run.parameters.items()}
    first, *others = gather_object([(own, logged(run, "loss"), logged(run, "grad_norm"))])
    assert all(other == first for other in others), "the processes differ"


def assert_resumes(case: Case, world: World, folder: Path, whole_run: Trained) -> None:
    """Stopped after its first step, the run goes on as the undisturbed one, bit for bit."""
    state = PartialState()
    copy = folder.with_name(f"{folder.name}-resumed")
    if state.is_main_process:
        killed_after(folder, copy, 1)
    state.wait_for_everyone()
    trainer = make_trainer(case, world, copy, [])
    torch.manual_seed(12345)
    run = trained(trainer, resume_from_checkpoint=True)
    assert run.log[: len(whole_run.log)] == whole_run.log, f"{run.log} is not {whole_run.log}"
    assert differing(run.parameters, whole_run.parameters) == []
    assert all(torch.equal(a, b) for a, b in zip(run.optimiser, whole_run.optimiser, strict=True)), "the optimiser"


def refused(reason: str) -> dict[str, Any]:
    """The result of a case that cannot be: the reason is one line."""
    assert "\n" not in reason.strip(), f"a refusal is one line: {reason}"
    return {"outcome": "refused", "reason": reason, "asserted": {}}


# --- a case -----------------------------------------------------------------------------------------------------------


def run_case(case: Case, world: World, folder: Path) -> dict[str, Any]:
    """Train as a case says and assert what must hold.

    (a) The features that reach the language model while gradients are made are those of the rows trained on, which are
    the rows whose rewards were counted. (b) dapo is appo with ``max_weight: 1``. (c) Packed groups are ordinary rows.
    (d) Processes end with the same parameters. (e) What cannot be combined is refused in one line when the trainer is
    built. (f) A resumed run is the undisturbed one. (g) A faulty row costs itself.

    Returns:
        ``outcome``: "held", or "refused" with its ``reason``; what was ``asserted``, and on how much.

    Raises:
        AssertionError: an invariant is broken. Anything else: a run has failed.
    """
    given: list[Rewarded] = []
    try:
        trainer = make_trainer(case, world, folder / "run", given)
    except ValueError as error:
        return refused(str(error))
    spectator = Spectator(trainer, world.oracle(case.rows), given)
    run = trained(trainer)
    tower = trainer.base_model.base_model.visual
    assert isinstance(tower.blocks[0], FSDPModule) == (case.processes == "fsdp2"), "not wrapped as the recipe wraps"
    assert_own_features(case, spectator)
    assert_numbers(case, run)
    asserted: dict[str, Any] = {"rows with their own features": sum(gather_object([spectator.vision_rows]))}
    if case.processes != "one":
        assert_processes_agree(run)
        asserted["processes agree"] = True
    if assert_layouts_agree(case, run, spectator.first_batch):
        asserted["packed is rows"] = True
    if case.method == "dapo":
        asserted["max_weight 1 is dapo, within"] = assert_weights_of_one_are_dapo(case, world, folder / "twin", run)
    if case.resume == "yes":
        assert_resumes(case, world, folder / "run", run)
        asserted["resumed is undisturbed"] = True
    return {"outcome": "held", "asserted": asserted}
