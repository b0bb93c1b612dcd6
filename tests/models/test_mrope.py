"""Positions of tokens: those of pre-training, by hand, by an independent rule, and the same in sampling and scoring."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from appo.models.log_probs import score_group
from appo.models.mrope import in_sequence, use_pretrained_positions
from appo.models.prefix_packing import prompt_positions, unwrap
from appo.rollout.generation import respond
from tests.support.tiny import PromptShape, random_prompt, tiny_model


def pretrained_rule(prompt: dict[str, Tensor], scaled: bool) -> list[list[int]]:
    """Qwen2-VL's and Qwen2.5-VL's rule, token by token: text counts on, a video is (time, height, width) from there,
    and what follows begins behind the largest of its numbers."""
    types = prompt["mm_token_type_ids"][0].tolist()
    grids = {
        kind: prompt[name].tolist() if name in prompt else []
        for kind, name in ((1, "image_grid_thw"), (2, "video_grid_thw"))
    }
    seconds = [float(value) for value in prompt.get("second_per_grid_ts", [])] or [1.0] * len(grids[2])
    columns: list[list[int]] = []
    at = 0
    while at < len(types):
        start = max((max(column) for column in columns), default=-1) + 1
        if types[at] == 0:
            columns.append([start] * 3)
            at += 1
            continue
        frames, height, width = grids[types[at]].pop(0)
        interval = 2 * seconds.pop(0) if types[at] == 2 and scaled else 1
        for t in range(frames):
            for h in range(height // 2):
                for w in range(width // 2):
                    columns.append([start + int(t * interval), start + h, start + w])
                    at += 1
    return columns


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["qwen2_vl", "qwen2_5_vl"]),
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(1, 3)), max_size=2),
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=2),
    st.integers(1, 6),
    st.lists(st.sampled_from([0.5, 1.0, 2.0, 2.5]), min_size=2, max_size=2),
)
def test_positions_are_those_of_pre_training(architecture, videos, images, text, seconds):
    prompt = random_prompt(PromptShape(tuple(videos), tuple(images), text, tuple(seconds[: len(videos)])))
    model = tiny_model(architecture=architecture)
    expected = pretrained_rule(prompt, scaled=architecture == "qwen2_5_vl")
    assert prompt_positions(unwrap(model), prompt)[:, 0].T.tolist() == expected


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
    inputs = {key: prompt[key] for key in ("input_ids", "mm_token_type_ids", "video_grid_thw", "image_grid_thw")}
    own, own_delta = type(model.base_model).get_rope_index(model.base_model, **inputs)
    positions, delta = use_pretrained_positions(model).base_model.get_rope_index(**inputs)
    assert torch.equal(positions, own)
    assert delta.tolist() == own_delta.tolist()


def test_padding_does_not_move_positions_and_copies_keep_the_rule():
    prompt = random_prompt(PromptShape(((9, 1, 1),), text=4))
    model = copy.deepcopy(use_pretrained_positions(use_pretrained_positions(tiny_model())))
    alone = prompt_positions(model, prompt)[:, 0]
    keys = ("input_ids", "attention_mask", "mm_token_type_ids")
    padded = prompt | {key: torch.nn.functional.pad(prompt[key], (5, 0)) for key in keys}
    assert torch.equal(prompt_positions(model, padded)[:, 0, 5:], alone)
    assert model.base_model.get_rope_index.__self__ is model.base_model


@pytest.mark.parametrize("architecture", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_policy_is_scored_where_it_was_sampled_however_long_the_video_is(architecture):
    """Greedy tokens are the likeliest of the scoring pass, though the video ends behind all of the text."""
    model = tiny_model(architecture=architecture, dtype=torch.float64)
    shape = PromptShape(((24, 1, 1),), text=3, seconds=(2.0,), timestamps=architecture == "qwen3_vl")
    prompt = random_prompt(shape)
    prompt["pixel_values_videos"] = prompt["pixel_values_videos"].double()
    model.generation_config.eos_token_id = model.config.text_config.vocab_size - 1
    ((response,),) = respond(model, 0, [prompt], 1, max_new_tokens=6, do_sample=False)
    for shared_prefix in (True, False):
        with torch.no_grad():
            scores = score_group(model, prompt, [response], capture_layers=0, shared_prefix=shared_prefix)
            logits = model.get_output_embeddings()(scores.hidden_GNH)[0]
        assert logits.argmax(dim=-1).tolist() == response.tolist()
