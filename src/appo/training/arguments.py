"""The settings of `appo train`: from a YAML file, flags, or both; and --tiny, a dry run of any file on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from trl import TrlParser

from appo.data import response_format_of
from appo.models.names import SPOTLIGHT
from appo.rewards.functions import PAPER_REWARDS
from appo.training.config import APPOConfig
from appo.training.lora import AdapterSettings
from appo.training.setting_rules import setting
from appo.training.start_checks import REPLACED, shrunk


@dataclass
class TrainScript(AdapterSettings):
    """What to train on what; everything else is a setting of :class:`appo.APPOConfig`."""

    model: str = setting(SPOTLIGHT, "A Hugging Face folder or hub id, or 'spotlight': the embedded tiny policy.")
    dataset: str = setting(SPOTLIGHT, "A name of appo.data.DATASETS; 'jsonl': your own questions (docs/data.md).")
    annotations: str | None = setting(
        None, "Annotation file or folder; none (spotlight only): clips are made in output_dir/clips."
    )
    videos: str | None = setting(
        None, "Folder that the annotations' video paths start from; default: where the annotations lie."
    )
    split: str | None = setting(None, "Part of the dataset (docs/data.md).")
    rewards: list[str] = field(
        default_factory=lambda: list(PAPER_REWARDS),
        metadata={
            "help": "accuracy, format, temporal_iou, or your own as module:function, found in the current folder or "
            "on Python's path: naming it imports the module, which runs its code. Weights: reward_weights."
        },
    )
    level: str = setting("L1", "Level of generated clips: L1, L2 or L3.")
    clips: int = setting(256, "How many clips to generate.")
    response_format: str | None = setting(
        None, "answer or grounded (with the time); default: what the dataset's official score needs."
    )
    instruction: str | None = setting(
        None, "Appended to every question; default: asks for the format, nothing for the tiny policy."
    )
    limit: int | None = setting(None, "Train on this many rows only, drawn by limit_seed; default: on all.")
    limit_seed: int = setting(0, "Which rows `limit` draws; apart from `seed`, so that runs share their data.")
    video_min_pixels: int | None = setting(
        None, "Fewest pixels a frame is scaled to; default: the model's own (docs/data.md)."
    )
    video_max_pixels: int | None = setting(
        None, "Most pixels a frame is scaled to, 28 x 28 to a token; default: the model's."
    )
    image_max_pixels: int | None = setting(
        None, "Most pixels a picture beside the video is scaled to; default: the model's own."
    )
    sft_reasoning: bool = setting(
        False, "method sft: have metadata's `reasoning` said before the answer; default: nothing is."
    )


class OneLineParser(TrlParser):
    """TRL's parser (flags = YAML = dataclass) whose errors are one line, not two hundred lines of usage."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError instead of printing the usage."""
        raise ValueError(f"{message}; `appo train --help` shows an example")


def parse(arguments: Sequence[str], *, tiny: bool = False) -> tuple[TrainScript, APPOConfig]:
    """Settings from ``--config FILE`` and flags; a flag wins over the file.

    Args:
        arguments: what stands behind ``appo train``.
        tiny: make a dry run of it: two short steps of the tiny policy on a few generated clips, on a CPU. What is
            asked, rewarded and adapted stays as it is. A flag about training wins over that, too.

    Raises:
        ValueError: an unknown or impossible setting, named.
        OSError: the file cannot be read.
    """
    words = shrunk(arguments) if tiny else list(arguments)
    script, config = OneLineParser((TrainScript, APPOConfig), allow_abbrev=False).parse_args_and_config(words)
    script.check()
    config.check_whole_groups()  # every dataset of appo is about videos or pictures
    if tiny:
        script, config.model_init_kwargs = _replaced(script, config.method), None
    return script, config


def _replaced(script: TrainScript, method: str) -> TrainScript:
    asked = response_format_of(script.dataset, script.response_format or None)
    # The tiny policy has no word for <time>, so it cannot be taught to say it.
    own: dict[str, Any] = {"response_format": "answer" if method == "sft" else asked, "limit": script.limit and 6}
    return replace(script, **REPLACED, **own)
