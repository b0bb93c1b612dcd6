"""The nouns of the project, in the order data flows through it.

Shape suffixes: G responses of one group, N response tokens (padded), F frames as the language model sees them,
H hidden size, L length of one row's input, R reward functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# Parts of a training step whose seconds a line of metrics.jsonl has, as time/PART.
STEP_PARTS = ("decode", "vision", "generate", "rewards", "score", "weights", "update")


# What a video part of a message may say beside ``type`` and ``video``: `start`, `end` and `frames_fps` of its source.
CLIP_KEYS = ("video_start", "video_end", "raw_fps")


class VideoError(ValueError):
    """A video cannot be used. The message names the file, what is wrong and the fix, in one line."""

    def __init__(self, path: str, problem: str, fix: str) -> None:
        super().__init__(path, problem, fix)
        self.path = path

    def __str__(self) -> str:
        path, problem, fix = self.args
        return f"{path}: {problem}; {fix}"


class ClipError(VideoError):
    """The clip is no time of the video: its end is not behind its start, or its start is behind the video's end."""


@dataclass(frozen=True)
class VideoSource:
    """What of a video is shown, from the annotation to the decoder: a file or a folder of pictures, whole or a clip.

    Attributes:
        path: the file or folder, also as ``file://`` address.
        start: seconds since the video's first frame at which the clip starts; None: with the video.
        end: seconds at which it ends; None, or any time behind the video's end: with the video.
        frames_fps: frames per second at which the pictures of a folder were taken; None: `path` is a video file.

    Raises:
        ClipError: the clip is no time.
        VideoError: `frames_fps` is no rate.
    """

    path: str
    start: float | None = None
    end: float | None = None
    frames_fps: float | None = None

    def __post_init__(self) -> None:
        if self.start is self.end is self.frames_fps is None:
            return  # as nearly all are: annotations have hundreds of thousands of rows
        start, end = self.start or 0.0, math.inf if self.end is None else self.end
        if not (0 <= start < end and math.isfinite(start)):
            raise ClipError(self.path, f"{self.clip} is no time", "give 0 <= start < end in seconds")
        if self.frames_fps is not None and not (math.isfinite(self.frames_fps) and self.frames_fps > 0):
            problem = f"frames_fps is {self.frames_fps}"
            raise VideoError(self.path, problem, "give the frames per second at which the pictures were taken")

    @property
    def is_whole(self) -> bool:
        """Whether all of the video is shown, not a clip."""
        return self.start is None and self.end is None

    @property
    def whole(self) -> VideoSource:
        """All of the same video."""
        return self if self.is_whole else VideoSource(self.path, frames_fps=self.frames_fps)

    @property
    def clip(self) -> str:
        """What part of the video is shown, in words."""
        if self.is_whole:
            return "the video"
        return f"the clip [{self.start or 0:g}, {'the end' if self.end is None else f'{self.end:g}'}] s"

    def __str__(self) -> str:
        rate = "" if self.frames_fps is None else f", {self.frames_fps:g} pictures per second"
        return self.path + ("" if self.is_whole else f", {self.clip}") + rate

    def to_part(self) -> dict[str, Any]:
        """The part of a chat message that shows this, under the names of qwen-vl-utils. Inverse: `from_part`."""
        part: dict[str, Any] = {"type": "video", "video": self.path}
        for key, value in zip(CLIP_KEYS, (self.start, self.end, self.frames_fps), strict=True):
            if value is not None:
                part[key] = value
        return part

    @classmethod
    def from_part(cls, part: Mapping[str, Any]) -> VideoSource:
        """What a video part of a message shows; keys that say nothing may be missing or None.

        Raises:
            VideoError: see the class.
        """
        return cls(str(part["video"]), *map(part.get, CLIP_KEYS))


@dataclass(frozen=True)
class VideoQA:
    """One question about one video (and, for some datasets, an image beside it).

    Attributes:
        id: unique within its dataset.
        video: what is shown of which video; None where the question has an image only, or neither.
        question: the text asked, options not included.
        answer: the gold answer: a letter for multiple choice, else the words or number itself.
        kind: how answers are compared, one of :data:`appo.rewards.scorers.KINDS`.
        options: the choices, each as shown to the model; empty for open questions.
        image: path of an image shown beside the video or alone, or empty.
        spans: (start, end) seconds in which the answer can be seen. For evaluation and for the temporal IoU reward;
            the method itself never looks at them.
        event_frames: indices of the language model's frames that show the answer; None where they are not known.
        metadata: whatever else the dataset says (level, task type, ...).
    """

    id: str
    video: VideoSource | None
    question: str
    answer: str
    kind: str = "word"
    options: tuple[str, ...] = ()
    image: str = ""
    spans: tuple[tuple[float, float], ...] = ()
    event_frames: tuple[int, ...] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FrameSpans:
    """Which input positions of one row are which video frame.

    Attributes:
        frame_L: int64 (L,), the frame index of each input position, -1 where it is no video token. Frames of
            several videos are numbered one after the other.
        frames_per_video: number of frames (temporal patches) of each video, in order of appearance.
    """

    frame_L: Tensor
    frames_per_video: tuple[int, ...]

    @property
    def frames(self) -> int:
        """F: frames of all videos of the row."""
        return sum(self.frames_per_video)


@dataclass(frozen=True)
class GroupScores:
    """What one forward pass over a group says about its responses.

    Attributes:
        log_probs_GN: float32 (G, N), log-probability of each response token at the sampling temperature; 0 where
            padded. Carries gradients unless the caller disables them.
        mask_GN: bool (G, N), True on real response tokens.
        hidden_GNH: (G, N, H), final hidden state that emits each token; never carries gradients.
        log_normalizer_GN: float32 (G, N), log of the sum over the vocabulary of exp(logits / temperature), with which a
            piece of the logits becomes log-probabilities; never carries gradients.
        frame_attention_GNF: float32 (G, N, F) or None when nothing was captured; never carries gradients.
    """

    log_probs_GN: Tensor
    mask_GN: Tensor
    hidden_GNH: Tensor
    log_normalizer_GN: Tensor
    frame_attention_GNF: Tensor | None


@dataclass(frozen=True)
class PerceptionWeights:
    """The method's result for one group (method.md, steps 2-8).

    Attributes:
        weights_GN: float32 (G, N) in [1, max_weight], or `base_weight`; 1 where nothing applies or padded.
        crucial_F: bool (F,), frames the chosen responses looked at (step 4).
        scores_GF: float32 (G, F), how much each response looked at each frame (step 2).
        chosen_GN: bool (G, N), intra-group perception tokens (step 5).
    """

    weights_GN: Tensor
    crucial_F: Tensor
    scores_GF: Tensor
    chosen_GN: Tensor


@dataclass(frozen=True)
class Sample:
    """One response of a group.

    Attributes:
        ids: token ids, the end-of-sequence token included.
        completion: as reward functions see it: a list of one message, or a string where the prompt is one.
        rewards_R: float32 (R,), NaN where a function abstained; empty before the stage ``reward``.
        logprobs: log-probability of each token by the sampler, where it reports them (vLLM); None in them: unknown.
        extras: columns that reward functions logged for this response.
    """

    ids: list[int]
    completion: Any
    rewards_R: Tensor
    logprobs: list[float | None] | None = None
    extras: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """One prompt and its G responses on their way through a rollout; each stage returns groups with more in them.

    Attributes:
        row: the dataset's row: ``prompt`` and the columns that reward functions need.
        question: what the row asks, for records and pages.
        prompt: the encoded prompt; None for text that TRL generates about.
        prompt_ids: token ids of the prompt.
        samples: the G responses; none before the stage ``generate``.
        timestamps_F: seconds of the frames as the language model sees them.
        advantages_G: float (G,), from the stage ``advantages``.
        scores: from the stage ``score``; None for methods without weights and for prompts without frames.
        weights: from the stage ``weigh``; None where there are no scores.
    """

    row: dict[str, Any]
    question: VideoQA
    prompt: Any = None
    prompt_ids: list[int] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    timestamps_F: tuple[float, ...] = ()
    advantages_G: Tensor | None = None
    scores: GroupScores | None = None
    weights: PerceptionWeights | None = None

    @property
    def rewards_GR(self) -> Tensor:
        """float32 (G, R), the rewards of all samples."""
        import torch

        return torch.stack([sample.rewards_R for sample in self.samples])
