"""Pictures in prompts: each row is trained on its own, whatever dynamic sampling, copies and neighbours do."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from recipes.tiny_policy.build import build_policy
from torch import Tensor

from appo.models.families import family_of
from appo.rollout.encoding import PromptEncoder
from appo.rollout.generation import VideoCache, encode_prompt, pictures
from appo.rollout.timers import Stopwatch
from appo.video.reader import FrameSampling
from tests.support.runs import clips, logged, make_trainer

SIZES = [(56, 56), (112, 56), (84, 84), (56, 112), (140, 56), (56, 84)]
QUESTIONS = ["what colour ?", "what shape ?", "which came first ?", "when ?", "what colour is the star ?", "which ?"]
TWO_GROUPS = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 1, "overlong_cache": 0}


def noise(number: int, size: tuple[int, int]) -> Image.Image:
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def picture_files(folder: Path) -> list[str]:
    files = [folder / f"{number}.png" for number in range(len(SIZES))]
    for number, file in enumerate(files):
        noise(number, SIZES[number]).save(file)
    return [str(file) for file in files]


def prompt(question: str, *parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def picture_rows(folder: Path) -> list[dict[str, Any]]:
    files = picture_files(folder)
    return [
        {"prompt": prompt(question, {"type": "image", "image": file}), "id": str(number)}
        for number, (question, file) in enumerate(zip(QUESTIONS, files, strict=True))
    ]


class Watch:
    """What reaches the language model at image placeholders while gradients are made, by hooks on the model itself."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.ids = trainer, torch.empty(0)
        self.seen: list[tuple[Tensor, Tensor]] = []  # ids (L,) and embeddings (image tokens, H) of each row
        inner = trainer.base_model.base_model
        inner.register_forward_pre_hook(self._keep_ids, with_kwargs=True)
        inner.language_model.register_forward_pre_hook(self._keep_embeddings, with_kwargs=True)

    def _keep_ids(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.ids = kwargs["input_ids"]

    def _keep_embeddings(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            image = self.trainer.base_model.config.image_token_id
            for ids_L, embeds_LH in zip(self.ids, kwargs["inputs_embeds"], strict=True):
                self.seen.append((ids_L.clone(), embeds_LH[ids_L == image].detach().clone()))

    def assert_trained_on(self, messages: Any) -> None:
        """All rows so far were this prompt, with the features of its own pictures, made anew."""
        model, processor = self.trainer.base_model, self.trainer.processing_class
        inputs = encode_prompt(processor, messages, [])
        expected = []
        if pictures(messages):
            with torch.no_grad():
                output = model.base_model.get_image_features(inputs.pixel_values, inputs.image_grid_thw)
            expected = list(torch.cat(list(output.pooler_output)))
        ids = inputs.ids_1P[0]
        assert self.seen, "no gradient was made, so nothing was checked"
        for ids_L, features in self.seen:
            start = int((ids_L == ids[0]).nonzero()[0])
            assert torch.equal(ids_L[start : start + len(ids) - 1], ids[:-1]), "another question"
            repeats = len(features) // max(len(expected), 1) if len(expected) else 1
            own = torch.stack(expected * repeats) if expected else features[:0]
            torch.testing.assert_close(features, own, rtol=0, atol=1e-6)


def only(number: int):
    """A reward that is unequal within the group of one row, and 0 elsewhere."""

    def reward(completions: Any, id: list[str], **kwargs: Any) -> list[float]:
        return [float(i % 2) if name == str(number) else 0.0 for i, name in enumerate(id)]

    return reward


@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize("first", ["a picture", "another size", "text"])
def test_dynamic_sampling_trains_on_the_pictures_of_the_rows_it_ends_with(tmp_path, first, shared_prefix):
    """The update's pixels were those of the rows sampled first, under the questions of their replacements."""
    rows = picture_rows(tmp_path)
    if first == "a picture":  # all of one size, so that nothing else notices
        for number, row in enumerate(rows):
            noise(number, SIZES[0]).save(row["prompt"][0]["content"][0]["image"])
    if first == "text":
        rows[0]["prompt"] = prompt(QUESTIONS[0])
    settings = {**TWO_GROUPS, "method": "dapo", "max_resampling_rounds": 40, "shuffle_dataset": False}
    settings |= {"accuracy_reward": "reward", "shared_prefix": shared_prefix}
    trainer = make_trainer(tmp_path / "run", Dataset.from_list(rows), rewards=only(5), **settings)
    watch = Watch(trainer)
    trainer.train()
    assert logged(trainer, "resampling/replaced_groups") == [1.0]
    watch.assert_trained_on(rows[5]["prompt"])


def test_a_rollout_of_text_is_never_joined_by_a_picture(tmp_path):
    """It is TRL's own, which cannot tell the rows with pictures from those without."""
    rows = [{"prompt": prompt(question), "id": "text"} for question in QUESTIONS[:2]] + picture_rows(tmp_path)[:2]
    settings = {**TWO_GROUPS, "method": "dapo", "max_resampling_rounds": 3, "shuffle_dataset": False}
    trainer = make_trainer(
        tmp_path / "run", Dataset.from_list(rows), rewards=only(7), accuracy_reward="reward", **settings
    )
    watch = Watch(trainer)
    trainer.train()
    assert logged(trainer, "resampling/flat_groups") == [1.0]
    assert watch.seen
    assert all(len(features) == 0 for _, features in watch.seen)


def test_rows_with_a_picture_and_rows_without_train_in_one_batch(tmp_path):
    """Both ways of writing a group agree; stock TRL fails at such a batch."""
    rows = [*picture_rows(tmp_path)[:1], {"prompt": prompt("when ?"), "id": "text"}]
    losses = {}
    for shared_prefix in (True, False):
        settings = {**TWO_GROUPS, "method": "appo", "max_resampling_rounds": 0, "shared_prefix": shared_prefix}
        trainer = make_trainer(tmp_path / str(shared_prefix), Dataset.from_list(rows), **settings)
        trainer.train()
        losses[shared_prefix] = (logged(trainer, "grad_norm"), logged(trainer, "entropy"))
        assert not logged(trainer, "appo/groups_without_crucial_frames"), "no group has frames that could be crucial"
    assert losses[True][0][0] > 0.1
    torch.testing.assert_close(torch.tensor(losses[True]), torch.tensor(losses[False]), rtol=1e-4, atol=1e-5)


def test_groups_without_frames_do_not_count_as_groups_without_crucial_frames(tmp_path):
    """One group has a video and a winner, the other is text."""
    question = clips(tmp_path / "clips", 1)[0]
    rows = [{"prompt": prompt("when ?", question.video.to_part())}, {"prompt": prompt("which ?")}]

    def half(completions: Any, **kwargs: Any) -> list[float]:
        return [float(i % 2) for i in range(len(completions))]

    settings = {**TWO_GROUPS, "method": "appo", "max_resampling_rounds": 0, "accuracy_reward": "half"}
    trainer = make_trainer(tmp_path / "run", Dataset.from_list(rows), rewards=half, **settings)
    trainer.train()
    assert logged(trainer, "appo/groups_without_crucial_frames") == [0.0]
    assert logged(trainer, "appo/crucial_frames")[0] >= 1, "not divided by the group of text"


# --- features ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy() -> Any:
    return build_policy(0)


@pytest.fixture
def encoder(policy) -> PromptEncoder:
    model, processor = policy
    model.model.visual.requires_grad_(False)
    videos = VideoCache(processor.video_processor, FrameSampling())
    return PromptEncoder(processor, videos, torch.device("cpu"), nullcontext, Stopwatch(), {})


def features_of(inputs: Any) -> Tensor:
    return torch.cat(inputs.image_features.tokens)


def copies(count: int) -> Iterator[tuple[Any, Any]]:
    """Prompts with pictures in memory, deep-copied as TRL copies them: addresses of copies let go are used again."""
    for number in range(count):
        messages = prompt("what colour ?", {"type": "image", "image": noise(number, SIZES[0])})
        yield messages, copy.deepcopy(messages)


def test_pictures_in_memory_keep_their_own_features(policy, encoder):
    """Remembered by a picture's address, 15 of 75 prompts had another's features."""
    model, _ = policy
    for messages, copied in copies(75):
        inputs = encoder.read(model, messages)
        seen = encoder.encode_vision(model, copied, inputs)
        torch.testing.assert_close(
            features_of(seen), features_of(family_of(model).encode_vision(inputs)), rtol=0, atol=0
        )


def test_the_same_picture_is_encoded_once_however_it_is_given(policy, encoder, tmp_path):
    model, _ = policy
    noise(0, SIZES[0]).save(tmp_path / "same.png")
    passes = []
    hook = model.model.visual.register_forward_hook(lambda *_: passes.append(1))
    for image in (str(tmp_path / "same.png"), noise(0, SIZES[0]), noise(0, SIZES[0]), noise(1, SIZES[0])):
        messages = prompt("when ?", {"type": "image", "image": image})
        encoder.encode_vision(model, messages, encoder.read(model, messages))
    hook.remove()
    assert len(passes) == 2, "two different pictures"


def test_a_file_that_changes_between_two_rollouts_is_read_again(policy, encoder, tmp_path):
    model, _ = policy
    messages = prompt("when ?", {"type": "image", "image": str(tmp_path / "changing.png")})
    found = []
    for number in (0, 1):
        noise(number, SIZES[0]).save(tmp_path / "changing.png")
        found.append(features_of(encoder.encode_vision(model, messages, encoder.read(model, messages))))
    assert not torch.equal(*found)


# --- columns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["images", "image"])
def test_pictures_of_a_column_are_those_of_their_rows(tmp_path, column):
    """TRL's way to give pictures, with dynamic sampling, beside rows without any; rewards still get the column."""
    rows, given = picture_rows(tmp_path), []
    for number, row in enumerate(rows):
        files = [row["prompt"][0]["content"][0]["image"]] if number != 1 else []
        row["prompt"] = [{"role": "user", "content": QUESTIONS[number]}]
        row[column] = files if column == "images" else (files or [None])[0]
    kinds = {"prompt": [{"role": Value("string"), "content": Value("string")}], "id": Value("string")}
    kinds[column] = List(ImageFeature()) if column == "images" else ImageFeature()
    dataset = Dataset.from_list(rows, features=Features(kinds))

    def reward(completions: Any, id: list[str], **kwargs: Any) -> list[float]:
        given.extend(bool(value) for value in kwargs[column])
        return only(5)(completions, id)

    settings = {**TWO_GROUPS, "method": "dapo", "max_resampling_rounds": 40, "shuffle_dataset": False}
    trainer = make_trainer(tmp_path / "run", dataset, rewards=reward, accuracy_reward="reward", **settings)
    watch = Watch(trainer)
    trainer.train()
    assert logged(trainer, "resampling/replaced_groups") == [1.0]
    watch.assert_trained_on(prompt(QUESTIONS[5], {"type": "image", "image": str(tmp_path / "5.png")}))
    assert set(given) == {True, False}


def test_pictures_of_a_column_beside_a_video_need_their_place(tmp_path):
    """TRL fills placeholders only; without one the message names row, column and the way out."""
    video = {"type": "video", "video": clips(tmp_path / "clips", 1)[0].video.path}
    row = {"id": "seven", "images": [noise(0, SIZES[0])], "prompt": prompt("when ?", video)}
    with_place = row | {"prompt": prompt("when ?", video, {"type": "image"})}
    settings = {**TWO_GROUPS, "method": "appo", "max_resampling_rounds": 0}
    trainer = make_trainer(tmp_path / "good", Dataset.from_list([row] * 2), **settings)
    with pytest.raises(ValueError, match=r"row seven: column `images`: .*'type': 'image'.*leave the column out"):
        trainer.train()
    trainer = make_trainer(tmp_path / "bad", Dataset.from_list([with_place] * 2), **settings)
    watch = Watch(trainer)
    trainer.train()
    assert all(len(features) == 4 for _, features in watch.seen), "56 x 56 pixels are four tokens"


# --- rows that cannot be shown ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["no file", "no picture", "<|video_pad|>", "<|image_pad|>", "placeholder in text"])
def test_a_row_that_cannot_be_shown_costs_itself(tmp_path, capfd, fault):
    """The run ended with a traceback at each of these."""
    rows = picture_rows(tmp_path)
    bad = rows[0]["prompt"][0]["content"]
    if fault == "no file":
        Path(bad[0]["image"]).unlink()
    elif fault == "no picture":
        Path(bad[0]["image"]).write_text("not a picture")
    elif fault == "placeholder in text":
        rows[0]["prompt"] = [{"role": "user", "content": "what is <|video_pad|> ?"}]
    else:
        bad[1]["text"] = f"what does {fault} mean ?"
    mixed = fault != "placeholder in text"
    rows = (
        rows
        if mixed
        else [{"prompt": row["prompt"][:1], "id": row["id"]} for row in rows[:1]]
        + [{"prompt": [{"role": "user", "content": question}], "id": "text"} for question in QUESTIONS[1:]]
    )
    settings = {**TWO_GROUPS, "method": "dapo", "max_resampling_rounds": 0, "shuffle_dataset": False}
    trainer = make_trainer(tmp_path / "run", Dataset.from_list(rows), **settings)
    watch = Watch(trainer)
    trainer.train()
    assert len(watch.seen) > 0
    assert logged(trainer, "faults/videos") == [1.0]
    line = next(line for line in capfd.readouterr().err.splitlines() if line.startswith("appo: step 0, row 0 is"))
    assert {"no file": "No such file", "no picture": "cannot be read as an image"}.get(fault, "as text") in line
    prompts = [entry[0]["content"] for entry in trainer._logs["prompt"]]
    assert rows[0]["prompt"][0]["content"] not in prompts
