"""sft: the prompts of reinforcement learning, loss on the completion alone, checked against plain model calls."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from recipes.tiny_policy.build import build_policy
from recipes.tiny_policy.measure import respond, summarize

from appo import APPOConfig, APPOTrainer
from appo.data import load, rows_of
from appo.reports.run_folder import RunFolder
from appo.rewards.functions import accuracy_reward, format_reward, temporal_iou_reward
from appo.rollout.generation import encode_prompt
from appo.training.sft import IGNORED, VideoSFTTrainer, completion_of, make_sft_trainer, sft_config, with_completions
from appo.training.vision_check import BlindPolicyError
from appo.video.reader import FrameSampling, read_video
from appo.world import generate, load_policy
from appo.world.policy import SAMPLING
from tests.support.data_fixtures import CASES, Case, seed_train
from tests.support.runs import FAST, clips, logged, make_trainer

# Two steps of two micro-batches of two rows.
SETTINGS = {**FAST, "method": "sft", "per_device_train_batch_size": 8, "max_steps": 2}
EVERY_FRAME = FrameSampling(fps=2.0, max_frames=16, min_frames=4)  # APPOConfig's defaults


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Dataset:
    return rows_of(clips(tmp_path_factory.mktemp("clips"), 8), "")


def make(
    folder: Path, rows: Dataset, *, reasoning: bool = True, policy: Any = None, **settings: Any
) -> VideoSFTTrainer:
    config = APPOConfig(str(folder), **{**SETTINGS, **settings})
    run = RunFolder.create(folder, {})
    return make_sft_trainer(*(policy or build_policy(0)), rows, config, run, reasoning=reasoning)


def spied(trainer: VideoSFTTrainer) -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """Each micro-batch that is drawn: its rows, and what the collator makes of them."""
    collate, batches = trainer.data_collator, []

    def spying(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(rows)
        batches.append((rows, dict(batch)))
        return batch

    trainer.data_collator = spying
    return batches


# --- completions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", ["", " "], ids=["joined", "spaced"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_completions_earn_full_rewards(tmp_path, case: Case, gap):
    """What is taught is what accuracy, format and temporal IoU give 1.0 for, in every format a row can be asked in."""
    annotations, videos = case.write(tmp_path)
    for row in load(case.name, annotations, videos, case.split):
        for wanted in ("answer", "grounded") if row["spans"] else ("answer",):
            text = completion_of({**row, "response_format": wanted}, gap=gap)
            columns = {name: [row[name]] for name in ("answer", "kind", "options", "spans")}
            columns["response_format"] = [wanted]
            assert accuracy_reward([text], **columns) == [1.0], text
            assert format_reward([text], response_format=wanted) == [1.0], text
            if wanted == "grounded":
                assert temporal_iou_reward([text], **columns) == [1.0], text


def test_completions_are_written_as_asked():
    row = {"id": "1", "answer": "B", "spans": [[0.5, 2.0], [7.25, 1e1]], "metadata": '{"reasoning": " It falls. "}'}
    assert completion_of(row) == "<think></think><answer>B</answer>"
    assert completion_of(row, reasoning=True) == "<think>It falls.</think><answer>B</answer>"
    grounded = completion_of({**row, "response_format": "grounded"}, gap=" ")
    assert grounded == "<think> </think> <answer> B </answer> <time> [0.5, 2], [7.25, 10] </time>"


REFUSED = [
    ({"metadata": "{}"}, True, "row 'x': metadata has no `reasoning`"),
    ({"metadata": '{"reasoning": 3}'}, True, "row 'x': metadata has no `reasoning`"),
    ({"metadata": '{"reasoning": "<answer>A</answer>"}'}, True, "row 'x': answer or reasoning hold tags"),
    ({"answer": "</answer>"}, False, "row 'x': answer or reasoning hold tags"),
    ({"response_format": "grounded", "spans": []}, False, "row 'x': no true `spans`"),
]


@pytest.mark.parametrize(("change", "reasoning", "message"), REFUSED, ids=[row[2][:40] for row in REFUSED])
def test_rows_without_a_right_completion_are_named(change, reasoning, message):
    with pytest.raises(ValueError, match=message):
        completion_of({"id": "x", "answer": "A", **change}, reasoning=reasoning)


def test_words_without_a_token_are_refused_before_training(rows):
    strange = rows.select([0]).map(lambda row: {"answer": "ultramarine"})
    with pytest.raises(ValueError, match=r"row 'l1-0-00000': the tokenizer has no tokens .*ultramarine"):
        with_completions(strange, build_policy(0)[1].tokenizer)


# --- batches -----------------------------------------------------------------------------------------------------


def test_the_prompt_is_that_of_reinforcement_learning_and_labels_are_the_completion(tmp_path, rows):
    """Ids, pixels, grids and seconds as APPOTrainer encodes them; the labels decode to the completion and its end."""
    trainer = make(tmp_path / "sft", rows)
    online: APPOTrainer = make_trainer(tmp_path / "rl", rows, method="grpo")
    collate, tokenizer = trainer.data_collator, trainer.processing_class.tokenizer
    table = trainer.train_dataset
    for start in (0, 4):
        batch = collate([table[i] for i in range(start, start + 4)])
        prompts = [online.encoder.read(online.model, table[i]["prompt"]) for i in range(start, start + 4)]
        for key in ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts"):
            assert torch.equal(batch[key], torch.cat([prompt.mapping()[key] for prompt in prompts])), key
        for b, prompt in enumerate(prompts):
            P = prompt.length
            ids, labels = batch["input_ids"][b], batch["labels"][b]
            end = int(batch["attention_mask"][b].sum())
            assert torch.equal(ids[:P], prompt.ids_1P[0])
            assert torch.equal(batch["mm_token_type_ids"][b, :P], prompt.types_1P[0])
            assert (labels[:P] == IGNORED).all()
            assert torch.equal(labels[P:end], ids[P:end])
            assert (labels[end:] == IGNORED).all()
            assert not batch["mm_token_type_ids"][b, P:].any()
            said = tokenizer.decode(ids[P : end - 1])
            assert said == table[start + b]["completion"]
            assert int(ids[end - 1]) == tokenizer.eos_token_id


def test_nothing_is_dropped_truncated_or_packed_on_the_way_to_the_model(tmp_path, rows):
    trainer = make(tmp_path, rows)
    batches, seen = spied(trainer), []
    trainer._checked_vision = True
    trainer.model.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    trainer.train()
    assert len(seen) == len(batches) == 4, "two steps of two micro-batches"
    for (_, batch), kwargs in zip(batches, seen, strict=True):
        assert {"pixel_values_videos", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids"} < set(batch)
        for key, value in batch.items():
            if key != "labels":
                assert torch.equal(kwargs[key], value), key


def test_pictures_beside_the_video_are_seen(tmp_path):
    table = load("seed-bench-r1", *seed_train(tmp_path), "train")
    trainer = make(tmp_path / "run", table, reasoning=False)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert {"pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"} < set(batch)


# --- the loss ----------------------------------------------------------------------------------------------------


def cross_entropy(model: Any, processor: Any, row: dict[str, Any]) -> list[float]:
    """-log p of each token of a row's completion, in float64, by one plain call of the model about this row alone."""
    video = next(part["video"] for part in row["prompt"][0]["content"] if part["type"] == "video")
    prompt = encode_prompt(processor, row["prompt"], [read_video(video, processor.video_processor, EVERY_FRAME)])
    said = [*processor.tokenizer(row["completion"]).input_ids, processor.tokenizer.eos_token_id]
    ids = torch.cat([prompt.ids_1P, torch.tensor([said])], dim=1)
    types = torch.cat([prompt.types_1P, torch.zeros(1, len(said), dtype=torch.int64)], dim=1)
    vision = {"video_grid_thw": prompt.video_grid_thw, "second_per_grid_ts": prompt.second_per_grid_ts}
    pixels = prompt.pixel_values_videos.double()
    with torch.no_grad():
        logits = model(input_ids=ids, mm_token_type_ids=types, pixel_values_videos=pixels, **vision).logits
    start = prompt.length - 1
    log_probs = logits[0, start:-1].log_softmax(-1)
    return [-float(log_probs[n, token]) for n, token in enumerate(said)]


def test_the_first_loss_is_the_mean_cross_entropy_of_the_completions_tokens(tmp_path, rows):
    """Over all rows of the step alike, whatever their lengths and micro-batches."""
    policy = build_policy(0)
    exact = copy.deepcopy(policy[0]).double().eval()
    trainer = make(tmp_path, rows, policy=policy, max_steps=1)
    batches = spied(trainer)
    trainer.train()
    drawn = [row for rows_of_batch, _ in batches[:2] for row in rows_of_batch]  # a third is read ahead
    lengths = {len(row["completion"].split()) for row in drawn}
    assert len(drawn) == 4
    assert len(lengths) > 1, "rows of one length prove nothing about the mean"
    losses = [value for row in drawn for value in cross_entropy(exact, policy[1], row)]
    assert logged(trainer, "loss")[0] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_another_video_is_another_loss(tmp_path, rows):
    """The same words about the video of another question."""
    trainer = make(tmp_path, rows)
    table = trainer.train_dataset
    own, other = copy.deepcopy(table[0]), table[1]
    swapped = copy.deepcopy(own)
    swapped["prompt"][0]["content"][0]["video"] = other["prompt"][0]["content"][0]["video"]
    batches = [trainer._prepare_inputs(trainer.data_collator([row])) for row in (own, swapped, own)]
    losses = [float(trainer.compute_loss(trainer.model, batch).detach()) for batch in batches]
    assert losses[0] == losses[2]
    assert abs(losses[0] - losses[1]) > 1e-4


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_blind_policy_is_refused_before_the_first_step(tmp_path, rows, dropout):
    model, processor = build_policy(0)
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = dropout  # noise that must not pass for sight
    for parameter in model.model.visual.merger.parameters():
        torch.nn.init.zeros_(parameter)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(BlindPolicyError, match="trained blind"):
        make(tmp_path, rows, policy=(model, processor)).train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- runs --------------------------------------------------------------------------------------------------------


def test_two_runs_of_one_seed_are_identical_and_the_vision_tower_is_frozen(tmp_path, rows):
    runs = [make(tmp_path / str(i), rows, seed=seed) for i, seed in enumerate((1, 1, 2))]
    for trainer in runs:
        trainer.train()
    one, two, other = runs
    assert logged(one, "loss") == logged(two, "loss") != logged(other, "loss")
    fresh = build_policy(0)[0]
    for (name, a), b, start in zip(
        one.model.named_parameters(), two.model.parameters(), fresh.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        assert torch.equal(a, start) == ("visual" in name), name


def test_a_step_is_about_as_many_prompts_as_one_of_the_other_methods(tmp_path, rows):
    trainer = make(tmp_path, rows)
    batches = spied(trainer)
    trainer.train()
    assert [len(drawn) for drawn, _ in batches] == [2] * 4, "8 responses of 4 to a prompt: 2 prompts"
    online = make_trainer(tmp_path / "rl", rows, method="grpo", per_device_train_batch_size=8)
    assert online.args.max_steps == 5
    assert len(online.get_train_dataloader()) * 2 == len(rows), "an epoch of the one is an epoch of the other"


def test_the_settings_of_the_run_are_carried_over(tmp_path):
    settings = {"learning_rate": 3e-4, "weight_decay": 0.1, "warmup_steps": 3, "lr_scheduler_type": "cosine", "seed": 7,
                "save_strategy": "steps", "save_steps": 5, "optim": "adamw_torch", "max_grad_norm": 0.2}  # fmt: skip
    config = APPOConfig(str(tmp_path), **{**SETTINGS, **settings})
    carried = sft_config(config)
    for name in settings:
        assert getattr(carried, name) == getattr(config, name), name
    assert carried.output_dir == str(tmp_path)
    assert (carried.max_length, carried.packing, carried.loss_type) == (None, False, "nll")
    assert (
        sft_config(APPOConfig(str(tmp_path), shuffle_dataset=False, **SETTINGS)).train_sampling_strategy == "sequential"
    )


def test_the_rl_trainer_refuses_the_method(tmp_path, rows):
    with pytest.raises(ValueError, match="APPOTrainer samples, method sft does not"):
        make_trainer(tmp_path, rows, method="sft")


def test_the_lazy_policy_learns_from_honest_reasoning(tmp_path):
    """Fourteen steps of 16 fresh clips; 60 others, answered by sampling."""
    table = rows_of(generate(tmp_path / "clips", "L1", 224, 1), "")
    held_out = generate(tmp_path / "held-out", "L1", 60, 10_000)
    model, processor = load_policy()
    settings = {"num_generations": 2, "per_device_train_batch_size": 32, "gradient_accumulation_steps": 1,
                "max_steps": 14, "learning_rate": 4e-4, "lr_scheduler_type": "constant",
                "video_max_frames": SAMPLING.max_frames}  # fmt: skip
    accuracies = []
    for _ in range(2):
        torch.manual_seed(0)
        accuracies.append(summarize(held_out, respond(model.eval(), processor, held_out))["accuracy"])
        if len(accuracies) == 1:
            make(tmp_path / "run", table, policy=(model, processor), **settings).train()
    assert accuracies[0] < 0.65, "it is not lazy"
    assert accuracies[1] > accuracies[0] + 0.1
