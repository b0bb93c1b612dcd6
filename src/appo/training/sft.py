"""The supervised baseline: the rows of GRPO, DAPO and APPO with their answers written out, by TRL's SFTTrainer.

The prompt is what the policy sees in reinforcement learning, token for token and pixel for pixel; the loss is the mean
cross entropy of the completion's tokens. TRL's own collator knows images only, so the one here passes videos on.

Shape suffixes: B rows, L tokens of the longest prompt and completion (padded on the right).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PrinterCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from appo.models.families import family_of, unwrap
from appo.models.prefix_packing import IGNORED
from appo.models.prompt import PIXELS, blank
from appo.models.vision_tower import freeze_vision_tower
from appo.reports.run_folder import RunFolder
from appo.rewards.templates import FORMATS
from appo.rollout.collectives import any_process
from appo.rollout.encoding import PromptEncoder
from appo.rollout.generation import VideoCache
from appo.rollout.timers import Stopwatch
from appo.training.config import APPOConfig
from appo.training.rollout_logger import MetricsRecorder
from appo.training.trainer_state import WholeCheckpoints
from appo.training.vision_check import assert_vision
from appo.video.frame_cache import cache_in
from appo.video.reader import FrameSampling

# -- what is to be said ----------------------------------------------------------------------------------------------


def completion_of(row: Mapping[str, Any], *, reasoning: bool = False, gap: str = "") -> str:
    """The response to a row that earns full reward. The paper does not say what its baseline was trained on.

    Args:
        row: of a table of :func:`appo.data.load`: ``answer``, ``response_format``, ``spans``, ``metadata``, ``id``.
        reasoning: whether what ``metadata["reasoning"]`` says stands in ``<think>``; else nothing does.
        gap: what divides tags and words.

    Raises:
        ValueError: the row has no reasoning, no spans though its time is asked for, or texts that hold tags.
    """
    wanted = row.get("response_format") or "answer"
    parts = ["<think>", _reasoning(row) if reasoning else "", "</think>", "<answer>", row["answer"], "</answer>"]
    if wanted == "grounded":
        parts += ["<time>", _spoken_spans(row), "</time>"]
    text = gap.join(filter(None, parts))
    parsed = FORMATS[wanted](text)
    if parsed is None or parsed.answer != row["answer"].strip():
        raise ValueError(f"row {row.get('id')!r}: answer or reasoning hold tags of their own: take them out")
    return text


def with_completions(rows: Dataset, tokenizer: Any, *, reasoning: bool = False) -> Dataset:
    """The rows with a column ``completion``, each checked, so that no run stops at a bad row midway.

    Raises:
        ValueError: as :func:`completion_of`, or the tokenizer has no token for a word; names the row.
    """
    names = ("id", "answer", "response_format", "spans", "metadata")
    read = rows.select_columns([name for name in names if name in rows.column_names])
    gap = _gap(tokenizer)
    completions = [completion_of(row, reasoning=reasoning, gap=gap) for row in read]
    if tokenizer.unk_token_id is not None:
        for identity, text in zip(rows["id"], completions, strict=True):
            if tokenizer.unk_token_id in tokenizer(text, add_special_tokens=False).input_ids:
                raise ValueError(
                    f"row {identity!r}: the tokenizer has no tokens for all of {text!r}: use another model"
                )
    return rows.add_column("completion", completions)


def _reasoning(row: Mapping[str, Any]) -> str:
    text = json.loads(row.get("metadata") or "{}").get("reasoning")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"row {row.get('id')!r}: metadata has no `reasoning`: add it, or set sft_reasoning to false")
    return text.strip()


def _spoken_spans(row: Mapping[str, Any]) -> str:
    """The true spans as the prompt asks for them; nine decimals are what the parser reads."""
    if not row.get("spans"):
        raise ValueError(f"row {row.get('id')!r}: no true `spans`, but its format asks for the time: leave the row out")
    pairs = ([f"{second:.9f}".rstrip("0").rstrip(".") for second in span] for span in row["spans"])
    return ", ".join(f"[{start}, {end}]" for start, end in pairs)


def _gap(tokenizer: Any) -> str:
    """A space for vocabularies of whole words (the tiny policy's), which know a tag only if it stands alone."""
    unknown = tokenizer.unk_token_id
    joined = tokenizer("<think></think>", add_special_tokens=False).input_ids
    return " " if unknown is not None and unknown in joined else ""


# -- batches ---------------------------------------------------------------------------------------------------------


@dataclass
class CompletionCollator:
    """Rows with completions -> model inputs: prompts as in reinforcement learning, labels on completions alone."""

    encoder: PromptEncoder  # encodes prompts; every video is decoded once a batch
    base: Any  # the Hugging Face model, for its positions in time
    tokenizer: Any  # of the model; its end-of-sequence token closes each completion

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """``input_ids``, ``attention_mask``, ``labels`` and ``mm_token_type_ids``, (B, L) each, and vision tensors."""
        prompts = [self.encoder.read(self.base, row["prompt"]) for row in rows]
        self.encoder.clear()
        targets = [self.target(row["completion"]) for row in rows]
        pairs = list(zip((prompt.ids_1P[0] for prompt in prompts), targets, strict=True))
        batch = {
            "input_ids": _padded([torch.cat(pair) for pair in pairs], self.tokenizer.pad_token_id),
            "attention_mask": _padded([torch.ones_like(torch.cat(pair)) for pair in pairs], 0),
            "labels": _padded([torch.cat([torch.full_like(ids, IGNORED), said]) for ids, said in pairs], IGNORED),
            **family_of(self.base).vision_inputs(prompts),
        }
        types = [prompt.types_1P[0] for prompt in prompts if prompt.types_1P is not None]
        if types:
            pairs = list(zip(types, targets, strict=True))
            batch["mm_token_type_ids"] = _padded([nn.functional.pad(kinds, (0, len(said))) for kinds, said in pairs], 0)
        return batch

    def target(self, completion: str) -> Tensor:
        """int64 ids of a completion and the token that ends it."""
        ids = self.tokenizer(completion, add_special_tokens=False).input_ids
        return torch.tensor([*ids, self.tokenizer.eos_token_id])


def _padded(rows: list[Tensor], value: int) -> Tensor:
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


# -- training --------------------------------------------------------------------------------------------------------


def sft_config(config: APPOConfig) -> SFTConfig:
    """Settings with ``method: sft`` as TRL's: optimiser, schedule, precision, logging and saving as they are.

    A step is about as many prompts as one of the other methods: a batch of G responses to each prompt becomes one row
    a prompt. Settings of sampling, rewards and RL losses have no counterpart and are not used. Nothing is truncated
    and nothing packed: a prompt that lost placeholders would no longer fit its video.
    """
    names = [field.name for field in fields(TrainingArguments) if field.init]
    settings = {name: getattr(config, name) for name in [*names, "trust_remote_code"]}
    return SFTConfig(**settings | {
        "per_device_train_batch_size": config.per_device_train_batch_size // config.num_generations,
        "data_seed": config.seed if config.data_seed is None else config.data_seed,
        "train_sampling_strategy": config.train_sampling_strategy if config.shuffle_dataset else "sequential",
        "remove_unused_columns": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": None,
    })  # fmt: skip


class VideoSFTTrainer(WholeCheckpoints, SFTTrainer):
    """TRL's SFTTrainer, with a loss over all tokens of a step alike, of a policy that sees.

    Raises:
        appo.training.vision_check.BlindPolicyError: the policy's words do not depend on the video.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Qwen-VL says that its own loss takes no count of tokens, so transformers hands TRL's none either: a step would
        # be the mean of its micro-batches' means, and a token in short company would count for more.
        self.model_accepts_loss_kwargs = True

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss, after the vision check."""
        if not self._checked_vision:
            self._check_vision(model, inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _check_vision(self, model: Any, inputs: dict[str, Any]) -> None:
        blanks = {key: blank(inputs[key]) for key in PIXELS if key in inputs}
        sees = bool(blanks)
        # Sharded models run forward together, so all processes check as soon as one has a video.
        self._checked_vision = any_process(sees)
        if not self._checked_vision:
            return

        def log_probs(batch: dict[str, Any]) -> Tensor:
            said: Tensor = model(**batch, fused_lm_head=True).log_probs
            return said

        assert_vision(model, log_probs, inputs, inputs | blanks, sees)


def make_sft_trainer(
    model: Any,
    processor: Any,
    rows: Dataset,
    config: APPOConfig,
    folder: RunFolder,
    *,
    reasoning: bool = False,
    peft_config: Any = None,
) -> VideoSFTTrainer:
    """A trainer of the supervised baseline that records its run.

    Args:
        model: the policy.
        processor: its processor.
        rows: a table of :func:`appo.data.load`.
        config: a configuration with ``method="sft"``; see :func:`sft_config` for what of it counts.
        folder: of the run.
        reasoning: whether the rows' ``metadata["reasoning"]`` is to be said as well.
        peft_config: a PEFT configuration, to train adapters.

    Raises:
        ValueError: a row that no completion can be written for, named.
    """
    tokenizer = processor.tokenizer
    rows = with_completions(rows, tokenizer, reasoning=reasoning)
    sampling = FrameSampling(config.video_fps, config.video_max_frames, config.video_min_frames)
    videos = VideoCache(processor.video_processor, sampling, cache_in(config.frame_cache))
    template = config.chat_template_kwargs or {}
    encoder = PromptEncoder(processor, videos, torch.device("cpu"), nullcontext, Stopwatch(), template)
    trainer = VideoSFTTrainer(
        model,
        sft_config(config),
        data_collator=CompletionCollator(encoder, model, tokenizer),
        train_dataset=rows,
        processing_class=processor,
        peft_config=peft_config,
    )
    if config.freeze_vision_tower:
        freeze_vision_tower(unwrap(trainer.model))
    trainer.remove_callback(PrinterCallback)
    MetricsRecorder(folder, trainer)
    return trainer
