"""Trainers whose runs go on after a kill as if nothing had happened: the same numbers, bit for bit on a CPU.

transformers saves model, optimiser, scheduler, random states and counters. What it and TRL leave out is saved here:
rollouts that serve more than one update, metrics and losses not logged yet, where the sampler and other streams stand.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import ModelOutput
from trl import GRPOTrainer
from trl.trainer.utils import strip_images_from_messages

from appo.models.checkpointing_names import quiet
from appo.models.prompt import Prompt
from appo.rollout.collectives import barrier
from appo.training.atomic_checkpoint import (
    LAST,
    CheckpointError,
    checkpoint_name,
    last_complete,
    named_write_errors,
    resumable,
    whole_folder,
    write_manifest,
)
from appo.training.model_card import CardWriter

_OUTPUT, _FIELDS = "__model_output__", "fields"


class WholeCheckpoints(CardWriter):
    """A trainer of TRL's with checkpoints that are complete or absent and hold all that decides what follows.

    It stands before TRL's trainer in a class's bases. `register_state` adds a part of the state to every checkpoint.
    """

    _checked_vision = False  # appo's trainers make sure once that the policy sees

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._parts: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {}
        self._partial: Path | None = None
        self._resumed: Path | None = None
        self._began, self._seconds_before = 0.0, 0.0
        with quiet():
            super().__init__(*args, **kwargs)
        self.register_state("loop", self._loop_state, self._restore_loop)
        self.add_callback(_AtTrainBegin(self._restore))

    def register_state(self, name: str, save: Callable[[], Any], load: Callable[[Any], None]) -> None:
        """Have every checkpoint hold what ``save()`` returns, and ``load`` get it back when training resumes.

        Args:
            name: of this part; one part a name.
            save: returns numbers, texts, tensors, and containers and model outputs of them.
            load: is called at the begin of training, before the first batch is drawn.
        """
        self._parts[name] = (save, load)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from the beginning or from a checkpoint.

        Args:
            resume_from_checkpoint: True, ``"true"`` or ``"last"``: the last complete checkpoint of ``output_dir``; or
                a path. Then passed on, with the other arguments, to transformers.

        Raises:
            CheckpointError: there is none, it is not complete, or it is of a run with other data or processes.
        """
        self._resumed = self._chosen(resume_from_checkpoint)
        with quiet():
            return super().train(self._resumed and str(self._resumed), *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure, with the arguments of transformers."""
        with quiet():
            measured: dict[str, float] = super().evaluate(*args, **kwargs)
        return measured

    def _chosen(self, wanted: str | bool | None) -> Path | None:
        folder = Path(self.args.output_dir)
        if not wanted:
            return None
        if wanted is not True and wanted.lower() not in LAST:
            return resumable(Path(wanted), folder)
        last = last_complete(folder)
        if last.path is None:
            raise CheckpointError("; ".join([f"{folder}: no complete checkpoint to resume from", *last.damaged]))
        return last.path

    # -- writing -----------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._partial or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder, name = Path(self._get_output_dir(trial)), checkpoint_name(self.state.global_step)
        push = self.args.push_to_hub
        is_writer = self.args.should_save
        with whole_folder(folder / name, is_writer=is_writer) as written:
            self._partial, self.args.push_to_hub = written.parent, False
            try:
                super()._save_checkpoint(model, trial)
                state = {part: plain(save()) for part, (save, _) in self._parts.items()}
                torch.save(state, written / self._state_file)
            finally:
                self._partial, self.args.push_to_hub = None, push
            barrier()
            if is_writer:
                self._complete(written, folder / name)
        if is_writer:  # only now may older ones go
            with named_write_errors(folder / name):
                best = self.state.best_model_checkpoint
                rotate_checkpoints(str(folder), self.args.save_total_limit, best, use_mtime=True)
        barrier()
        if push:
            self._push_from_checkpoint(str(folder / name))

    def _complete(self, written: Path, final: Path) -> None:
        """What is written last: how the checkpoint is going to be called, and what is in it."""
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(final)
            self.state.save_to_json(str(written / "trainer_state.json"))
        write_manifest(written, resumable=not self.args.save_only_model)

    @property
    def _state_file(self) -> str:
        return f"state-{self.args.process_index}.pt"

    # -- going on ----------------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        self._began, self._seconds_before = time.time(), 0.0
        if self._resumed is None:
            return
        self.control.should_training_stop = False
        # Tensors and plain values only: nothing in the file can run code.
        state = torch.load(self._resumed / self._state_file, weights_only=True)
        for name, (_, load) in self._parts.items():
            if name in state:
                load(as_saved(state[name]))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """transformers compares names as they are in the file, which for Qwen-VL are not those in the model: it would
        load nothing, warn, and train on from the weights the run began with. ``from_pretrained`` knows both."""
        own = self.model if model is None else model
        if not isinstance(own, PreTrainedModel) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        loaded = type(own).from_pretrained(resume_from_checkpoint, dtype=own.dtype)
        own.load_state_dict(loaded.state_dict())

    def _load_best_model(self) -> None:
        """The same for ``load_best_model_at_end``."""
        if isinstance(self.model, PreTrainedModel) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """No more batches once the last step is done: transformers would train one step more after resuming there."""
        if self.state.global_step >= self.state.max_steps > 0:
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def _loop_state(self) -> dict[str, Any]:
        return {
            "rows": _length(self.train_dataset),
            "processes": self.args.world_size,
            "loss": self._tr_loss.detach().cpu(),
            "loss_of_logged_steps": self._total_loss_scalar,
            "last_logged_step": self._globalstep_last_logged,
            "first_step": getattr(self, "_initial_global_step", 0),  # transformers 5.17 has none
            "seconds": self._seconds_before + time.time() - self._began,
            # TRL's trainers: what is averaged at the next log, and the tokens so far where transformers does not count.
            "metrics": self._metrics["train"],
            "tokens": self._total_train_tokens,
            # The vision check draws random numbers where there is dropout, so it must not be made twice.
            "checked_sight": self._checked_vision,
        }

    def _restore_loop(self, state: Mapping[str, Any]) -> None:
        now = {"rows": _length(self.train_dataset), "processes": self.args.world_size}
        for name, value in now.items():
            if state[name] != value:
                raise CheckpointError(
                    f"{self._resumed}: cannot be resumed from: it was written with {state[name]} {name}, now there are "
                    f"{value}"
                )
        self._tr_loss.fill_(state["loss"])
        self._total_loss_scalar = state["loss_of_logged_steps"]
        self._globalstep_last_logged = state["last_logged_step"]
        self._initial_global_step = state["first_step"]
        self._seconds_before = state["seconds"]
        self._metrics["train"].clear()
        self._metrics["train"].update(state["metrics"])
        self._total_train_tokens = state["tokens"]
        self._checked_vision = state["checked_sight"]

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        """The summary is of the whole run, so its seconds are too."""
        return super()._finalize_training(trial, num_train_samples, start_time - self._seconds_before)


class ResumableTrainer(WholeCheckpoints, GRPOTrainer):
    """TRL's GRPOTrainer, resumed exactly."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._sampler: Any = None
        super().__init__(*args, **kwargs)
        self.register_state("rollout", self._rollout_state, self._restore_rollout)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        """Raises ValueError for a dataset smaller than one rollout: TRL would make no step, and say nothing."""
        rows = len(self.train_dataset if dataset is None else dataset)
        prompts = self.args.generation_batch_size // self.num_generations
        if rows < prompts:
            raise ValueError(
                f"the dataset has {rows} rows, but a rollout takes {prompts} prompts: no step would be made; lower "
                "per_device_train_batch_size or gradient_accumulation_steps, or give more rows"
            )
        self._sampler = super()._get_train_sampler(dataset)
        return self._sampler

    def _rollout_state(self) -> dict[str, Any]:
        # Between two updates of one rollout the rest of it is part of the state; else the next step makes a new one.
        between = self._step % (self.args.steps_per_generation * self.num_iterations) != 0
        return {
            "micro_step": self._step,
            "batches": self._buffered_inputs if between else None,
            "completions": self._shown_completions() if between and self.log_completions else {},
        }

    def _shown_completions(self) -> dict[str, Any]:
        """The queues that TRL's table of completions is made from, as it shows them: pictures are left out."""
        logs = {name: values for name, values in self._logs.items() if name != "images"}
        return logs | {"prompt": [strip_images_from_messages(prompt) for prompt in logs["prompt"]]}

    def _restore_rollout(self, state: Mapping[str, Any]) -> None:
        if self.args.sync_ref_model:
            raise CheckpointError(
                f"{self._resumed}: cannot be resumed from: it does not hold the reference that sync_ref_model moves; "
                "begin again, or train with sync_ref_model false"
            )
        self._step, self._buffered_inputs = state["micro_step"], state["batches"]
        _extend(self._logs, state["completions"])
        # TRL's sampler draws a new order each epoch from a generator that transformers does not bring forward.
        if self._sampler is not None and self._sampler.shuffle:
            for _ in range(int(self.state.epoch)):
                torch.randperm(self._sampler.num_samples, generator=self._sampler.generator)


class _AtTrainBegin(TrainerCallback):
    """The moment when transformers has set its counters and has not drawn a batch yet."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._action()


def _length(dataset: Any) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None


def _extend(logs: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Fill TRL's queues of completions, which are grouped by reward function and extra column."""
    for name, values in saved.items():
        if isinstance(values, Mapping):
            _extend(logs[name], values)
        else:
            logs[name].extend(values)


# --- state as plain values -----------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """A value as numbers, texts, tensors, lists, tuples and dictionaries, which load without running any code.

    Raises:
        TypeError: for anything else.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, int | float):  # numpy's numbers among them
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, ModelOutput):
        return {_OUTPUT: _class_name(type(value)), _FIELDS: {key: plain(item) for key, item in value.items()}}
    if isinstance(value, Prompt):  # of a mapping again where it is used
        return plain(value.mapping())
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}")


def as_saved(value: Any) -> Any:
    """Undo `plain`. Model outputs become those of classes that are loaded already; none is imported by its name."""
    if isinstance(value, dict):
        if _OUTPUT not in value:
            return {key: as_saved(item) for key, item in value.items()}
        return _output_class(value[_OUTPUT])(**as_saved(value[_FIELDS]))
    return type(value)(as_saved(item) for item in value) if isinstance(value, list | tuple) else value


def _class_name(one: type) -> str:
    return f"{one.__module__}.{one.__qualname__}"


def _output_class(name: str) -> Any:
    known = [ModelOutput]
    for one in known:
        known.extend(sub for sub in one.__subclasses__() if sub not in known)
    found = [one for one in known if _class_name(one) == name]
    if not found:
        raise CheckpointError(f"the checkpoint holds a {name}, which this model does not have; resume with its own")
    return found[0]
