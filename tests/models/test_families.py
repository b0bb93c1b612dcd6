"""Every model family does what the engine relies on (`conformance`), and positions are those of pre-training."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from appo.models.families import family_of, has_family, use_pretrained_positions
from appo.models.families.base import FAMILIES
from appo.models.families.qwen2_vl import in_sequence
from appo.models.log_probs import score_group
from appo.models.prompt import Prompt
from appo.rollout.generation import respond
from tests.models.conformance import FamilyCase, check_family, close, row_log_probs
from tests.support.tiny import (
    ARCHITECTURES,
    BY_RUNS,
    GLM,
    MROPE,
    TIMESTAMPED,
    PromptShape,
    in_double,
    prompt_by_runs,
    random_prompt,
    random_responses,
    tiny_model,
)

SHAPES = (
    PromptShape(videos=((3, 1, 2),), text=4, seconds=(1.0,)),
    PromptShape(videos=((2, 2, 1), (4, 1, 1)), images=((1, 2),), text=2, seconds=(2.0, 0.5)),
    PromptShape(videos=((12, 1, 1),), text=3, seconds=(2.5,)),
)


def true_frames(shape: PromptShape, prompt: Prompt) -> list[int]:
    """The frame of each token, from the shape."""
    sizes = [height * width for frames, height, width in shape.videos for _ in range(frames)]
    frames = iter([frame for frame, tokens in enumerate(sizes) for _ in range(tokens)])
    return [next(frames) if kind == 2 else -1 for kind in prompt.types_1P[0].tolist()]


def pretrained_rule(prompt: Prompt, architecture: str) -> list[list[int]]:
    """The Qwen families' rule, token by token: text counts on, a video is (time, height, width) from there, and what
    follows begins behind the largest of its numbers. Qwen3-VL's frames are videos of their own, for text is between."""
    types = prompt.types_1P[0].tolist()
    grids = {
        kind: [] if grid is None else grid.tolist()
        for kind, grid in ((1, prompt.image_grid_thw), (2, prompt.video_grid_thw))
    }
    seconds = [1.0] * len(grids[2]) if prompt.second_per_grid_ts is None else prompt.second_per_grid_ts.tolist()
    if architecture in TIMESTAMPED:
        grids[2] = [(1, height, width) for frames, height, width in grids[2] for _ in range(frames)]
    columns: list[list[int]] = []
    at = 0
    while at < len(types):
        start = max((max(column) for column in columns), default=-1) + 1
        if types[at] == 0:
            columns.append([start] * 3)
            at += 1
            continue
        frames, height, width = grids[types[at]].pop(0)
        interval = 2 * seconds.pop(0) if types[at] == 2 and architecture == "qwen2_5_vl" else 1
        for t in range(frames):
            for h in range(height // 2):
                for w in range(width // 2):
                    columns.append([start + int(t * interval), start + h, start + w])
                    at += 1
    return columns


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_conformance(architecture):
    if architecture in BY_RUNS:
        prompts, frames = zip(
            *(prompt_by_runs(shape, architecture, seed) for seed, shape in enumerate(SHAPES)), strict=True
        )
        positions = [[[at] for at in range(prompt.length)] for prompt in prompts]
    else:
        shapes = [replace(shape, timestamps=architecture in TIMESTAMPED) for shape in SHAPES]
        prompts = [random_prompt(shape, seed, architecture) for seed, shape in enumerate(shapes)]
        frames = [true_frames(shape, prompt) for shape, prompt in zip(shapes, prompts, strict=True)]
        positions = [pretrained_rule(prompt, architecture) for prompt in prompts]
    check_family(
        FamilyCase(
            lambda attention: tiny_model(architecture=architecture, attention=attention, dtype=torch.float64),
            [*map(in_double, prompts)],
            [*frames],
            positions,
            random_responses([3, 1, 5]),
        )
    )


def test_frames_whose_tokens_see_each_other_are_read_as_rows():
    """Larger models of Gemma 4."""
    bidirectional = {"use_bidirectional_attention": "vision"}
    model = tiny_model(architecture="gemma4", dtype=torch.float64, text=bidirectional)
    prompt, responses = in_double(random_prompt(SHAPES[1], 0, "gemma4")), random_responses([3, 1])
    with pytest.raises(ValueError, match=r"^gemma4 models like this one .*: set shared_prefix to false to run"):
        score_group(model, prompt, responses)
    with torch.no_grad():
        scores = score_group(model, prompt, responses, shared_prefix=False)
        alone = [row_log_probs(model, prompt, response) for response in responses]
        model.config.text_config.use_bidirectional_attention = None
        causal = row_log_probs(model, prompt, responses[0])
    assert all(close(scores.log_probs_GN[g, : len(one)], one) for g, one in enumerate(alone))
    assert not close(alone[0], causal), "the tokens of a frame saw each other"


def test_every_family_is_tested():
    assert set(ARCHITECTURES) == set(FAMILIES)


def test_a_model_type_without_a_family_is_refused_with_the_way_out(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(type(model.config), "model_type", "llava_next_video")
    assert not has_family(model)
    known = ", ".join(sorted(ARCHITECTURES))
    line = rf"^no model family knows .*'llava_next_video', only {known}: docs/families\.md .*$"
    for shared_prefix in (True, False):
        with pytest.raises(ValueError, match=line):
            score_group(model, random_prompt(PromptShape()), random_responses([2]), shared_prefix=shared_prefix)


def test_text_is_generated_by_models_without_a_family(monkeypatch):
    prompt = random_prompt(PromptShape(videos=(), text=5))
    endless = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None}
    model = tiny_model()
    known = respond(model, 0, [prompt], 2, **endless)
    monkeypatch.setattr(type(model.config), "model_type", "llava_next_video")
    assert torch.equal(torch.stack(respond(model, 0, [prompt], 2, **endless)[0]), torch.stack(known[0]))


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("shared_prefix", [True, False])
def test_a_group_is_scored_from_a_processors_output_as_it_is(shared_prefix, padding):
    prompt, responses, model = random_prompt(PromptShape(images=((1, 2),))), random_responses([2, 4]), tiny_model()
    given = prompt.mapping() | {"attention_mask": torch.ones_like(prompt.ids_1P), "something else": None}
    for key in ("input_ids", "mm_token_type_ids", "attention_mask"):
        given[key] = torch.nn.functional.pad(given[key], (padding, 0))
    with torch.no_grad():
        expected = score_group(model, prompt, responses, shared_prefix=shared_prefix)
        scores = score_group(model, given, responses, shared_prefix=shared_prefix)
    assert torch.equal(scores.log_probs_GN, expected.log_probs_GN)
    assert torch.equal(scores.frame_attention_GNF, expected.frame_attention_GNF)
    with pytest.raises(ValueError, match=r"input_ids must be \(1, P\), got \(2, "):
        score_group(model, {"input_ids": prompt.ids_1P.expand(2, -1)}, responses)


# --- positions ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(MROPE),
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(1, 3)), max_size=2),
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=2),
    st.integers(1, 6),
    st.lists(st.sampled_from([0.5, 1.0, 2.0, 2.5]), min_size=2, max_size=2),
)
def test_positions_are_those_of_pre_training(architecture, videos, images, text, seconds):
    times, timestamps = tuple(seconds[: len(videos)]), architecture in TIMESTAMPED
    prompt = random_prompt(PromptShape(tuple(videos), tuple(images), text, times, timestamps), 0, architecture)
    expected = pretrained_rule(prompt, architecture)
    assert family_of(tiny_model(architecture=architecture)).positions(prompt)[:, 0].T.tolist() == expected


def test_what_follows_a_video_stands_behind_its_last_frame():
    """Three tokens of text, eight frames of 2 x 2 a second apart from position 3 to time 10, then text from 11."""
    times = [[3 + t, 3 + h, 3 + w] for t in range(8) for h in range(2) for w in range(2)]
    # As transformers 5 has it, text goes on at 5, behind the larger side.
    given = torch.tensor([[0] * 3, [1] * 3, [2] * 3, *times, [5] * 3, [6] * 3]).T
    moved, end = in_sequence(given, [0] * 3 + [2] * 32 + [0] * 2)
    assert moved.T.tolist() == [[0] * 3, [1] * 3, [2] * 3, *times, [11] * 3, [12] * 3]
    assert end == 13
    assert torch.equal(in_sequence(moved, [0] * 3 + [2] * 32 + [0] * 2)[0], moved), "what is right stays"


def test_a_rule_that_is_right_already_is_kept():
    """Qwen3-VL writes the time of each frame as text, and every frame is a block of its own."""
    prompt = random_prompt(PromptShape(((4, 2, 3),), ((2, 2),), timestamps=True))
    model = tiny_model(architecture="qwen3_vl")
    mapping = prompt.mapping()
    inputs = {key: mapping[key] for key in ("input_ids", "mm_token_type_ids", "video_grid_thw", "image_grid_thw")}
    own, own_delta = type(model.base_model).get_rope_index(model.base_model, **inputs)
    positions, delta = use_pretrained_positions(model).base_model.get_rope_index(**inputs)
    assert torch.equal(positions, own)
    assert delta.tolist() == own_delta.tolist()


def test_padding_does_not_move_positions_and_copies_keep_the_rule():
    prompt = random_prompt(PromptShape(((9, 1, 1),), text=4))
    model = copy.deepcopy(use_pretrained_positions(use_pretrained_positions(tiny_model())))
    alone = family_of(model).positions(prompt)[:, 0]
    rows = {"input_ids": prompt.ids_1P, "attention_mask": torch.ones_like(prompt.ids_1P), "types": prompt.types_1P}
    rows = {key: torch.nn.functional.pad(value, (5, 0)) for key, value in rows.items()}
    positions, _ = model.base_model.get_rope_index(
        rows["input_ids"],
        rows["types"],
        attention_mask=rows["attention_mask"],
        video_grid_thw=prompt.video_grid_thw,
        second_per_grid_ts=prompt.second_per_grid_ts,
    )
    assert torch.equal(positions[:, 0, 5:], alone)
    assert model.base_model.get_rope_index.__self__ is model.base_model


@pytest.mark.parametrize("architecture", MROPE)
def test_a_policy_is_scored_where_it_was_sampled_however_long_the_video_is(architecture):
    """Greedy tokens are the likeliest of the scoring pass, though the video ends behind all of the text."""
    model = tiny_model(architecture=architecture, dtype=torch.float64)
    shape = PromptShape(((24, 1, 1),), text=3, seconds=(2.0,), timestamps=architecture in TIMESTAMPED)
    prompt = in_double(random_prompt(shape, 0, architecture))
    model.generation_config.eos_token_id = model.config.text_config.vocab_size - 1
    ((response,),) = respond(model, 0, [prompt], 1, max_new_tokens=6, do_sample=False)
    for shared_prefix in (True, False):
        with torch.no_grad():
            scores = score_group(model, prompt, [response], capture_layers=0, shared_prefix=shared_prefix)
            logits = model.get_output_embeddings()(scores.hidden_GNH)[0]
        assert logits.argmax(dim=-1).tolist() == response.tolist()


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("architecture", GLM)
def test_glm_sees_images_beside_videos(architecture, trained):
    """In one prompt and in one batch, as if each frame were an image: so the model treats them, if it is told so."""
    model = tiny_model(architecture=architecture, dtype=torch.float64)
    family = family_of(model)
    video, image = (
        in_double(random_prompt(shape, 1, architecture))
        for shape in (PromptShape(timestamps=True), PromptShape((), ((1, 2), (2, 2))))
    )
    ids_1P = torch.cat([image.ids_1P, video.ids_1P, image.ids_1P], dim=1)
    both = replace(
        video,
        ids_1P=ids_1P,
        types_1P=torch.cat([image.types_1P, video.types_1P, image.types_1P], dim=1),
        pixel_values=torch.cat([image.pixel_values] * 2),
        image_grid_thw=torch.cat([image.image_grid_thw] * 2),
    )
    frames = torch.tensor([[1, height, width] for count, height, width in video.video_grid_thw for _ in range(count)])
    as_images = Prompt(
        ids_1P,
        (both.types_1P > 0).long(),
        torch.cat([image.pixel_values, video.pixel_values_videos, image.pixel_values]),
        image_grid_thw=torch.cat([image.image_grid_thw, frames, image.image_grid_thw]),
    )
    found = both if trained else family.encode_vision(both)
    ids = {"input_ids": ids_1P, "mm_token_type_ids": both.types_1P}
    logits = model(**ids, **family.vision_inputs([found])).logits
    expected = model(**as_images.mapping()).logits
    assert close(logits.detach(), expected.detach())
    if trained:
        logits.square().sum().backward()
        own = [parameter.grad.clone() for parameter in family.tower.parameters()]
        model.zero_grad()
        expected.square().sum().backward()
        assert all(
            close(one, parameter.grad, 1e-6) for one, parameter in zip(own, family.tower.parameters(), strict=True)
        )
    together = [family.encode_vision(prompt) for prompt in (video, image, both)]
    settings = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None}
    alone = [respond(model, 0, [prompt], 1, **settings)[0][0].tolist() for prompt in together]
    assert [group[0].tolist() for group in respond(model, 0, together, 1, **settings)] == alone
