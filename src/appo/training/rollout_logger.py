"""From a trainer's scored groups and logs to the lines of a run folder.

Shape suffixes: G responses, N response tokens, F frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from appo.reports.records import ResponseRecord, RolloutRecord
from appo.reports.run_folder import RunFolder
from appo.rollout.generation import Messages, VideoCache, has_video, video_sources
from appo.types import Group, Sample, VideoError
from appo.video.frame_sampling import merged_frames
from appo.video.thumbnails import filmstrip

if TYPE_CHECKING:
    from appo.training.trainer import APPOTrainer
    from appo.training.trainer_state import WholeCheckpoints


class MetricsRecorder(TrainerCallback):
    """Writes metrics.jsonl of a run while it trains, and cuts all records to the checkpoint it is resumed from."""

    def __init__(self, folder: RunFolder, trainer: WholeCheckpoints) -> None:
        self._folder = folder
        self._writes = trainer.is_world_process_zero
        trainer.add_callback(self)
        trainer.register_state("records", folder.sizes, self._rewind)

    def _rewind(self, sizes: dict[str, int]) -> None:
        if self._writes():
            self._folder.rewind(sizes)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Record what TRL logs, on the main process only."""
        if logs and state.is_world_process_zero:
            self._folder.append_metrics({"step": state.global_step, **logs})


class Recorder(MetricsRecorder):
    """Writes metrics.jsonl and rollouts.jsonl of a run while it trains."""

    def __init__(self, folder: RunFolder, trainer: APPOTrainer) -> None:
        super().__init__(folder, trainer)
        self._processor = trainer.processing_class
        self._tokenizer = getattr(self._processor, "tokenizer", self._processor)
        self._reward_names = list(trainer.reward_func_names)
        self._groups = trainer.args.rollouts_per_step
        self._encoder, self._watch = trainer.encoder, trainer.watch
        self._films: dict[str, str] = {}
        trainer.on_rollout = self.on_rollout

    def on_rollout(self, step: int, groups: Sequence[Group]) -> None:
        """Record the first groups of a rollout, on the main process only: those are its own."""
        for group in groups[: self._groups if self._writes() else 0]:
            film = self._film(group.row["prompt"])
            self._folder.append_rollout(group_record(step, group, self._tokenizer, self._reward_names, film))

    def _film(self, messages: Messages) -> str:
        """The name of a prompt's picture. Its pixels are gone by now: a video is read once more, once a run."""
        if not has_video(messages):
            return ""
        shown = repr(video_sources(messages))
        if shown not in self._films:
            with self._watch("decode"):
                try:
                    picture = film_of(self._encoder.videos, messages, self._processor)
                except VideoError:  # gone since the rollout read it: no reason to stop training, and the page says so
                    picture = b""
                self._films[shown] = self._folder.save_film(picture)
                self._encoder.videos.clear()
        return self._films[shown]


def film_of(videos: VideoCache, messages: Messages, processor: Any) -> bytes:
    """The frames that a conversation shows, as a picture (see `filmstrip`). Raises VideoError."""
    shown = [videos.read(source) for source in video_sources(messages)]
    return filmstrip(shown, merged_frames(processor.video_processor))


def group_record(step: int, group: Group, tokenizer: Any, reward_names: Sequence[str], film: str = "") -> RolloutRecord:
    """One scored group as it is written to rollouts.jsonl; `film` names the picture of its frames."""
    question = group.question
    crucial = [] if group.weights is None else group.weights.crucial_F.nonzero()[:, 0].tolist()
    return RolloutRecord(
        step=step,
        id=question.id,
        video=question.video.path if question.video else "",
        question=question.question,
        answer=question.answer,
        kind=question.kind,
        timestamps=list(group.timestamps_F),
        crucial_frames=crucial,
        responses=[
            _response_record(i, sample, group, tokenizer, reward_names) for i, sample in enumerate(group.samples)
        ],
        event_frames=None if question.event_frames is None else list(question.event_frames),
        film=film,
    )


def _response_record(
    i: int, sample: Sample, group: Group, tokenizer: Any, reward_names: Sequence[str]
) -> ResponseRecord:
    N = len(sample.ids)
    scores, weights = group.scores, group.weights
    attention = None if scores is None else scores.frame_attention_GNF
    return ResponseRecord(
        text=tokenizer.decode(sample.ids, skip_special_tokens=True),
        tokens=[tokenizer.decode([token]) for token in sample.ids],
        weights=[1.0] * N if weights is None else weights.weights_GN[i, :N].tolist(),
        chosen=[False] * N if weights is None else weights.chosen_GN[i, :N].tolist(),
        frame_attention=[] if attention is None else attention[i, :N].tolist(),
        rewards=dict(zip(reward_names, sample.rewards_R.tolist(), strict=True)),
        advantage=0.0 if group.advantages_G is None else float(group.advantages_G[i]),
    )
