"""A trainer that replaces rows with faulty videos, and stops before it applies a loss or gradient that is not finite.

Shape suffixes: B rows = Q groups x G responses.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerCallback
from trl.data_utils import prepare_multimodal_messages

from appo.rollout.collectives import barrier, gather_tensor, gather_values, is_main_process
from appo.rollout.dynamic_sampling import FreshRows
from appo.rollout.generation import clean_messages, placeholders
from appo.training.atomic_checkpoint import CheckpointError, checkpoint_name, problem, whole_folder
from appo.training.faults import FaultyVideosError, VideoFaults, watched
from appo.training.trainer_state import ResumableTrainer, plain

# Where a step that was not applied lies in a run folder, as step-N/:
#   policy/                 weights and processor, as they were before the step
#   batch-RANK.safetensors  the tensors of the micro-batches of one process
#   replay.json             what was not finite, settings of the run, and the micro-batches of each process as a tree
REPLAYS, REPLAY_FILE = "replay", "replay.json"
TENSOR, TUPLE = "__tensor__", "__tuple__"
# Columns whose pictures TRL puts into the prompt.
PICTURE_COLUMNS = ("images", "image")


class NotFiniteError(ValueError):
    """The loss or the gradient of a step is not finite. One line with the fix; nothing was applied."""


class FaultTolerantTrainer(ResumableTrainer):
    """TRL's GRPOTrainer, resumable, which replaces rows whose videos cannot be shown and applies no NaN.

    A trainer of it sets ``encoder`` (`PromptEncoder`) and ``watch`` (its stopwatch), and asks
    `_readable_rows` and `_draw_readable` before it generates.
    """

    encoder: Any
    watch: Any
    reward_funcs: list[Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._batches: list[Any] = []
        super().__init__(*args, **kwargs)
        self.reward_funcs = [watched(*pair) for pair in zip(self.reward_funcs, self.reward_func_names, strict=True)]
        self._fresh = FreshRows(self.train_dataset, self.args.seed + self.accelerator.process_index, self._prepared)
        self.register_state("fresh rows", self._fresh.state, self._fresh.restore)
        folder, limit = Path(self.args.output_dir), self.args.max_faulty_videos
        self._faults = VideoFaults(folder, limit, is_main_process())
        self.register_state("faults", self._faults.state, self._faults.restore)
        self.add_callback(_StopOnFaults(self._faults))

    # -- videos ------------------------------------------------------------------------------------------------------

    def _readable_rows(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The B rows of a rollout, whole groups; in the place of those that cannot be shown, the next fresh ones.

        Raises:
            FaultyVideosError: no process, or not every one, finds rows that can be shown.
        """
        G, before = self.num_generations, self._fresh.state()
        if len(rows) % G:  # groups that other processes share: text alone, which can always be shown
            return rows
        check = self._faults.patient(self._can_read)
        shown = self._attempt(lambda: [row if check(row) else self._fresh.draw(1, check)[0] for row in rows[::G]])
        if shown is None:
            self._fresh.restore(before)
            raise FaultyVideosError(self._faults.stop + self._checkpoint_of_last_step())
        return [row if new is rows[q * G] else dict(new) for q, new in enumerate(shown) for row in rows[q * G :][:G]]

    def _draw_readable(self, count: int, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """Fresh rows that are to be kept and can be shown; none, in all processes, once the run is to stop."""
        if self._faults.stop:
            return []
        check = self._faults.patient(self._can_read)
        return self._attempt(lambda: self._fresh.draw(count, lambda row: keep(row) and check(row))) or []

    def _attempt(self, draw: Callable[[], list[Any]]) -> list[Any] | None:
        with self.watch("decode"):
            rows = self._faults.attempt(draw, gather_values)
        self._metrics["train"]["faults/videos"] = [float(self._faults.count)]
        return rows

    def _prepared(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with the pictures of its columns (TRL's ``images`` or ``image``) in its prompt.

        Raises:
            ValueError: they do not fit the prompt; names the row and the column.
        """
        column = next((name for name in PICTURE_COLUMNS if row.get(name)), None)
        if column is None or not self._is_vlm or not isinstance(row["prompt"], list):
            return row
        images = row[column] if column == "images" else [row[column]]
        prompt = [one if isinstance(one["content"], str) else clean_messages([one])[0] for one in row["prompt"]]
        try:
            return {**row, "prompt": prepare_multimodal_messages(prompt, images=images)}
        except ValueError as error:
            raise ValueError(
                f"row {row.get('id', '?')}: column `{column}`: {error} Write a part {{'type': 'image'}} into the "
                "prompt for each of its pictures, or leave the column out"
            ) from error

    def _can_read(self, row: dict[str, Any]) -> bool:
        forbidden = placeholders(self.processing_class) if self._is_vlm else ()
        return self._faults.can_read(row, self.encoder.videos, self.state.global_step, forbidden)

    def _checkpoint_of_last_step(self) -> str:
        """Write it, if the step now begun has done nothing yet; what to say about it."""
        folder, step = Path(self.args.output_dir), self.state.global_step
        if step and self._step % self.args.gradient_accumulation_steps == 0:
            if problem(folder / checkpoint_name(step)):
                self._save_checkpoint(self.model, trial=None)
            return f"; there is a checkpoint of step {step}"
        return ""

    # -- numbers -----------------------------------------------------------------------------------------------------

    def log_means(self, pairs: Mapping[str, tuple[float, float]]) -> None:
        """Log totals divided by counts, of all processes together and with one gather; nothing where all counts are 0.

        Args:
            pairs: name -> total and count of this process; every process has the same names.
        """
        own = torch.tensor([list(pairs.values())], dtype=torch.float64, device=self.accelerator.device)
        for name, (total, count) in zip(pairs, gather_tensor(own).sum(dim=0).tolist(), strict=True):
            if count:
                self._metrics["train"][name].append(total / count)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's loss; in training its batch is kept for a replay until the step is applied.

        Raises:
            NotFiniteError: it is not finite in one of the processes.
        """
        if not self.model.training:
            measured: Tensor = super().compute_loss(model, inputs, *args, **kwargs)
            return measured
        self._batches.append(inputs)
        loss: Tensor = super().compute_loss(model, inputs, *args, **kwargs)
        self._assert_finite("loss", loss)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called once an optimiser step, right before it is applied."""
        norm = super()._get_grad_norm(model, grad_norm)
        # A gradient scaler (float16) skips such steps and goes on with a smaller scale; DeepSpeed has applied its own.
        if self.accelerator.scaler is None and not self.is_deepspeed_enabled:
            self._assert_finite("gradient norm", norm)
        self._batches.clear()
        return norm

    def _assert_finite(self, name: str, value: Any) -> None:
        """Stop in all processes, with what is needed for a replay, if a number is not finite in one of them.

        Raises:
            NotFiniteError: it is not.
        """
        if hasattr(value, "full_tensor"):
            value = value.full_tensor()
        number = torch.as_tensor(value, dtype=torch.float32, device=self.accelerator.device).detach().reshape(1)
        numbers: list[float] = gather_tensor(number).tolist()
        if all(number - number == 0 for number in numbers):
            return
        step, run = self.state.global_step, self.args.output_dir
        found = ", ".join(f"{number:g} in process {rank}" for rank, number in enumerate(numbers))
        found = f"the {name} of step {step + 1} is {f'{numbers[0]:g}' if len(numbers) == 1 else found}"
        try:
            self._save_replay(found)
            kept = f"where it comes from: appo replay {run}"
        except CheckpointError as error:
            kept = f"no replay is kept, for {error}"
        raise NotFiniteError(f"{found}: nothing was applied; {kept}")

    def _save_replay(self, found: str) -> None:
        """Policy and batch of the step that is not applied."""
        final = Path(self.args.output_dir) / REPLAYS / f"step-{self.state.global_step}"
        with whole_folder(final, is_writer=self.args.should_save) as written:
            self.save_model(str(written / "policy"))
            barrier()
            trees = gather_values(write_tensors(written, self.accelerator.process_index, self._batches))
            if self.args.should_save:
                write_description(
                    written, trees, step=self.state.global_step, problem=found, settings=self.args.to_dict(),
                    dtype=str(self.model.dtype).removeprefix("torch."),
                    accumulation=self.current_gradient_accumulation_steps,
                )  # fmt: skip


class _StopOnFaults(TrainerCallback):
    """Ends a run with a checkpoint after the step in which too many videos could not be shown."""

    def __init__(self, faults: VideoFaults) -> None:
        self._faults = faults

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._faults.stop:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._faults.stop and state.global_step < state.max_steps:
            raise FaultyVideosError(
                f"{self._faults.stop}; there is a checkpoint of step {state.global_step} in {args.output_dir}: repair "
                "the files or allow more, then resume"
            )


# -- a step that is not applied, on disk -------------------------------------------------------------------------------


def write_tensors(folder: Path, rank: int, batches: Sequence[Mapping[str, Any]]) -> Any:
    """Write the tensors of one process; returns the tree that says where each goes."""
    tensors: dict[str, Tensor] = {}
    tree = _tree(plain(list(batches)), tensors)
    save_file(tensors, folder / f"batch-{rank}.safetensors")
    return tree


def write_description(folder: Path, trees: Sequence[Any], **description: Any) -> None:
    """Write the rest: where the tensors of each process go, and the other fields of a `Replay`."""
    data = {**description, "processes": list(trees)}
    (folder / REPLAY_FILE).write_text(json.dumps(data, default=str) + "\n", encoding="utf-8")


def _tree(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A plain value with names in the place of its tensors, which are put into `tensors`."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {TENSOR: name}
    if isinstance(value, dict):
        return {key: _tree(item, tensors) for key, item in value.items()}
    if isinstance(value, tuple):
        return {TUPLE: [_tree(item, tensors) for item in value]}
    return [_tree(item, tensors) for item in value] if isinstance(value, list) else value
