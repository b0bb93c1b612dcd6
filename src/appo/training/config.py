"""APPOConfig: TRL's GRPOConfig plus the method's own knobs, each citing its source.

Papers: APPO (arXiv 2602.23823), DAPO (arXiv 2503.14476), GRPO (DeepSeekMath, arXiv 2402.03300).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from trl import GRPOConfig
from trl.rewards import get_soft_overlong_punishment

from appo.models.checkpointing_names import adopt_new_names
from appo.rollout.generation import has_vision
from appo.training.setting_rules import METHODS, check_values, setting

# What each method prescribes for settings the user has left at None.
_GRPO: dict[str, Any] = {
    "loss_type": "grpo",  # GRPO eq. 3: the mean over tokens of a response, then over responses
    "epsilon_high": 0.2,  # GRPO clips symmetrically
    "scale_rewards": "group",  # GRPO sec. 4.1.2: advantages divided by the group's standard deviation
    "beta": 0.0,  # APPO sec. 4: no KL term for any of the compared methods
    "max_resampling_rounds": 0,  # GRPO keeps groups whose rewards are all equal
    "overlong_cache": 0,  # GRPO has no length punishment
}
_DAPO: dict[str, Any] = {
    "loss_type": "dapo",  # DAPO sec. 3.3: token-level loss over the whole batch
    "epsilon_high": 0.28,  # DAPO sec. 3.1: clip-higher
    "scale_rewards": "group",  # DAPO eq. 9
    "beta": 0.0,  # DAPO sec. 2.3: the KL term is removed
    "max_resampling_rounds": 2,  # DAPO sec. 3.2 resamples until the batch is full; bounded here
    "overlong_cache": None,  # DAPO sec. 3.4 and 4.1: a fifth of the longest response, see _overlong_cache
}
# The supervised baseline has none of these; they are filled in so that one file is checked alike for every method.
PRESETS: dict[str, dict[str, Any]] = {"grpo": _GRPO, "dapo": _DAPO, "appo": _DAPO, "sft": _GRPO}


@dataclass
class APPOConfig(GRPOConfig):
    """Settings of :class:`appo.APPOTrainer`: everything TRL's ``GRPOConfig`` has, and the fields below.

    ``loss_type``, ``epsilon_high``, ``scale_rewards``, ``beta``, ``max_resampling_rounds`` and ``overlong_cache`` are
    what ``method`` prescribes wherever they are left at None; a value given explicitly wins.

    Raises:
        ValueError: naming the setting and the fix, for settings that contradict each other or the method.
    """

    method: str = setting(
        "appo",
        "grpo | dapo | appo: TRL's own loss settings as that paper has them; appo adds the weights. sft: "
        "the supervised baseline on the same rows (appo train only).",
    )
    strategy: str = setting(
        "soft", "Crucial frames: soft (winners' frames), hard (winners' minus losers'), all. APPO step 4."
    )
    threshold: float = setting(0.5, "Accuracy reward from which a response counts as a winner. APPO step 4.")
    score_tokens: int = setting(15, "K1: tokens a response-to-frame score averages. APPO step 2, best 15-25.")
    top_frames: int = setting(3, "K2: frames a response looked at. APPO step 3, best 3.")
    frame_tokens: int = setting(64, "K3: perception tokens a response gives a crucial frame. APPO step 5: 64.")
    max_weight: float = setting(1.7, "Largest token weight; 1 is exactly DAPO. APPO step 8, best of 1.2 .. 2.0.")
    divergence: str = setting("kl", "kl (the paper's formula) or k3 (the released code's estimator). APPO step 6.")
    frame_attention: str = setting(
        "raw", "raw (the paper) or relative: over the frame's usual share of attention (not in the paper)."
    )
    base_weight: float = setting(
        1.0, "Weight of tokens that no crucial frame chose, 0 to 1; 1: the paper (others: method.md)."
    )
    normalize_weights: bool = setting(
        False, "Divide the weights by their mean over the batch's tokens: a step no larger than DAPO's."
    )
    attention_layers: int = setting(3, "Last decoder layers whose attention to frames is averaged. APPO step 1: 3.")
    accuracy_reward: str = setting(
        "accuracy_reward", "Name of the reward function that splits winners from losers. APPO step 4."
    )
    loss_type: str | None = setting(None, "TRL's loss formulation; None: what `method` prescribes.")
    epsilon_high: float | None = setting(None, "Upper clip bound; None: what `method` prescribes (DAPO and APPO 0.28).")
    scale_rewards: str | None = setting(
        None, "TRL's reward scaling: group | batch | none; None: what `method` prescribes."
    )
    beta: float | None = setting(None, "KL coefficient; None: what `method` prescribes (0 for all three).")
    max_resampling_rounds: int | None = setting(
        None,
        "Dynamic sampling (DAPO sec. 3.2): how often groups with equal rewards are replaced by fresh "
        "prompts, at most, before training on what there is. None: what `method` prescribes; 0: off.",
    )
    overlong_cache: int | None = setting(
        None,
        "Soft overlong punishment (DAPO sec. 3.4): tokens before max_completion_length over which the "
        "reward falls to -1. None: what `method` prescribes (a fifth of max_completion_length); 0: off.",
    )
    video_fps: float = setting(2.0, "Frames sampled per second of video.")
    video_max_frames: int = setting(16, "Most frames sampled per video. APPO: 16 (100 for grounding).")
    video_min_frames: int = setting(4, "Fewest frames sampled per video, if it has them.")
    frame_cache: str | None = setting(
        None, "Folder that keeps sampled frames from run to run, without loss; None: decode in every run."
    )
    decode_timeout: float = setting(
        120.0, "Seconds after which a video's decoder is given up; hour-long videos may need more."
    )
    max_faulty_videos: int = setting(
        10,
        "Videos that may turn out unreadable during a run, their rows replaced by the next samples; with "
        "more it stops, with a checkpoint.",
    )
    shared_prefix: bool = setting(
        True, "Score and train groups packed behind one prompt (exact); false: ordinary rows."
    )
    rows_per_chunk: int = setting(
        0,
        "Responses of a group in one forward pass, where memory asks for less than all (0): their "
        "activations are recomputed in the backward pass. Needs shared_prefix.",
    )
    freeze_vision_tower: bool = setting(True, "Train the language model only. APPO sec. 4: the vision tower is frozen.")
    rollouts_per_step: int = setting(
        2, "Groups written to output_dir/rollouts.jsonl each generation, with attention; 0: none."
    )

    @property
    def weight_settings(self) -> dict[str, Any]:
        """The keyword arguments of `weigh` (method steps 2-8), but for the temperature."""
        names = ("threshold", "strategy", "score_tokens", "top_frames", "frame_tokens", "max_weight", "divergence")
        return {name: getattr(self, name) for name in (*names, "base_weight")}

    def accuracy_column(self, reward_names: list[str]) -> int:
        """Which reward function splits winners from losers: the one named ``accuracy_reward``, or the only one.

        Raises:
            ValueError: the weights need one, and none of several has that name.
        """
        own = [name for name in reward_names if name != "soft_overlong_punishment_reward"]
        if self.accuracy_reward not in own and len(own) > 1 and self.method == "appo":
            raise ValueError(
                f"accuracy_reward is {self.accuracy_reward!r}, but the reward functions are {', '.join(own)}: set "
                "accuracy_reward to the one that tells right answers from wrong ones"
            )
        return reward_names.index(self.accuracy_reward) if self.accuracy_reward in own else 0

    def __post_init__(self) -> None:
        self._apply_method()
        check_values({one.name: getattr(self, one.name) for one in fields(self) if one.init})
        self._check_method_settings()
        if self.method == "sft":
            self.check_whole_groups()  # a group of responses becomes one row
        adopt_new_names(self)
        super().__post_init__()

    def _apply_method(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        for name, value in PRESETS[self.method].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.overlong_cache is None:
            # DAPO sec. 4.1: 4096 of 20480 tokens.
            self.overlong_cache = (self.max_completion_length or 0) // 5

    def _check_method_settings(self) -> None:
        if self.loss_type == "luspo":
            raise ValueError(
                "loss_type='luspo' takes one advantage per response, not per token: choose 'dapo' or 'grpo'"
            )
        if self.method == "appo" and self.importance_sampling_level == "sequence":
            raise ValueError(
                "importance_sampling_level='sequence' leaves of the token weights only a response's mean: choose "
                "'token', or method dapo or grpo"
            )
        if self.use_liger_kernel:
            raise ValueError(
                "use_liger_kernel replaces the forward pass that carries the video and the weights: set it to false"
            )
        if self.rows_per_chunk and not self.shared_prefix:
            raise ValueError("rows_per_chunk splits packed groups: set shared_prefix to true, or rows_per_chunk to 0")
        if self.video_min_frames > self.video_max_frames:
            raise ValueError(
                f"video_max_frames ({self.video_max_frames}) is less than video_min_frames ({self.video_min_frames}): "
                "set both"
            )
        if self.overlong_cache and self.overlong_cache >= (self.max_completion_length or 0):
            raise ValueError(
                f"overlong_cache ({self.overlong_cache}) must be smaller than max_completion_length "
                f"({self.max_completion_length})"
            )

    def check_whole_groups(self) -> None:
        """A group about pictures or videos is encoded, scored, weighted and trained as a whole: no batch may cut one.

        Raises:
            ValueError: a batch of these sizes would.
        """
        if self.per_device_train_batch_size % self.num_generations:
            raise ValueError(
                f"per_device_train_batch_size ({self.per_device_train_batch_size}) must be a multiple of "
                f"num_generations ({self.num_generations}): a group of responses stays in one micro-batch"
            )
        if self.eval_strategy != "no":
            generations = self.num_generations_eval or self.num_generations
            if self.per_device_eval_batch_size % generations:
                raise ValueError(
                    f"per_device_eval_batch_size ({self.per_device_eval_batch_size}) must be a multiple of "
                    f"num_generations_eval ({generations}): a group of responses stays in one batch"
                )


def check_groups(args: APPOConfig, *datasets: Any) -> None:
    """Check the sizes of batches against the rows, before anything is loaded. Streams are checked as they come.

    Args:
        args: the settings.
        datasets: for training and for evaluation: tables of rows, dictionaries of tables, streams or None.

    Raises:
        ValueError: batches would cut groups that must stay whole.
    """
    try:
        args.check_whole_groups()
    except ValueError:
        tables = [table for one in datasets for table in (one.values() if isinstance(one, dict) else [one])]
        if any(has_vision(row) for table in tables if hasattr(table, "__len__") for row in table):
            raise
    rows = args.per_device_train_batch_size * args.steps_per_generation
    if args.max_resampling_rounds and rows % args.num_generations:
        raise ValueError(
            f"dynamic sampling replaces whole groups, but a process samples {rows} responses at a time, not a multiple "
            f"of num_generations ({args.num_generations}): set max_resampling_rounds to 0, or another "
            "per_device_train_batch_size"
        )


def arguments_of(model: Any, args: Any, kwargs: Mapping[str, Any]) -> APPOConfig:
    """The settings a trainer was given, or the defaults for its model.

    Raises:
        TypeError: they are of another class.
        ValueError: an argument of ``GRPOTrainer`` that answers about videos cannot have.
    """
    if args is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        args = APPOConfig(f"{name.split('/')[-1]}-APPO")
    if not isinstance(args, APPOConfig):
        raise TypeError(f"args must be an appo.APPOConfig, got {type(args).__name__}: it has the method's settings")
    if args.method == "sft":
        raise ValueError(
            "APPOTrainer samples, method sft does not: use appo.training.sft.make_sft_trainer, or appo train"
        )
    for name in ("tools", "environment_factory", "rollout_func"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} is not supported: APPOTrainer trains single-turn answers about videos")
    return args


def with_overlong_punishment(
    args: APPOConfig, reward_funcs: Any, processing_classes: Any
) -> tuple[list[Any], list[Any] | None, list[float] | None]:
    """Reward functions, their processing classes and weights, with DAPO's length punishment last where it is on.

    Args:
        args: the settings.
        reward_funcs: one reward function or several; None: there are none, which TRL refuses.
        processing_classes: of reward models, as TRL takes them: one, a list as long as the functions, or None.
    """
    several = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    rewards = [one for one in several if one is not None]
    if not args.overlong_cache or not rewards:
        return rewards, processing_classes, args.reward_weights
    rewards.append(get_soft_overlong_punishment(args.max_completion_length, args.overlong_cache))
    weights = None if args.reward_weights is None else [*args.reward_weights, 1.0]
    if processing_classes is None:
        return rewards, None, weights
    classes = processing_classes if isinstance(processing_classes, list) else [processing_classes]
    return rewards, [*classes, None], weights
