"""The nouns of the project, in the order data flows through it.

Shape suffixes: G responses of one group, N response tokens (padded), F frames as the language model sees them,
H hidden size, L length of one row's input, R reward functions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# Parts of a training step whose seconds a line of metrics.jsonl has, as time/PART.
STEP_PARTS = ("decode", "vision", "generate", "rewards", "score", "weights", "update")


@dataclass(frozen=True)
class VideoQA:
    """One question about one video (and, for some datasets, an image beside it).

    Attributes:
        id: unique within its dataset.
        video: path of the video file; empty when the sample has an image only.
        question: the text asked, options not included.
        answer: the gold answer: a letter for multiple choice, else the words or number itself.
        kind: how answers are compared, one of :data:`appo.rewards.scorers.KINDS`.
        options: the choices, each as shown to the model; empty for open questions.
        image: path of an image shown beside the video, or empty.
        spans: (start, end) seconds in which the answer can be seen. For evaluation and for the temporal IoU reward;
            the method itself never looks at them.
        metadata: whatever else the dataset says (level, task type, ...).
    """

    id: str
    video: str
    question: str
    answer: str
    kind: str = "word"
    options: tuple[str, ...] = ()
    image: str = ""
    spans: tuple[tuple[float, float], ...] = ()
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
        prompt: the encoded prompt; None for text that TRL generates about.
        prompt_ids: token ids of the prompt.
        samples: the G responses; none before the stage ``generate``.
        timestamps_F: seconds of the frames as the language model sees them.
        advantages_G: float (G,), from the stage ``advantages``.
        scores: from the stage ``score``; None for methods without weights and for prompts without frames.
        weights: from the stage ``weigh``; None where there are no scores.
    """

    row: dict[str, Any]
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
