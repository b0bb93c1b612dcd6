"""spans: which input position is which frame."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from appo.models.families import family_of
from appo.models.frame_tokens import check_time_advances, frame_pool, frame_spans
from tests.support.tiny import VIDEO, PromptShape, random_prompt, tiny_model

sizes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))


tiny_model = cache(tiny_model)


def spans_of(prompt):
    return family_of(tiny_model()).spans(prompt)


def test_hand_worked_two_videos_of_different_sizes():
    prompt = random_prompt(PromptShape(videos=((2, 1, 2), (1, 1, 1)), text=2))
    spans = spans_of(prompt)
    assert spans.frame_L.tolist() == [-1, -1, 0, 0, 1, 1, -1, -1, 2, -1, -1, -1]
    assert spans.frames_per_video == (2, 1)
    assert spans.frames == 3


def test_text_between_frames_does_not_matter():
    """Qwen3-VL writes a timestamp before every frame."""
    ids = torch.tensor([1, VIDEO, VIDEO, 7, 8, VIDEO, VIDEO, 9])
    spans = frame_spans(ids, torch.tensor([[2, 2, 4]]), video_token_id=VIDEO, merge_size=2)
    assert spans.frame_L.tolist() == [-1, 0, 0, -1, -1, 1, 1, -1]


def test_no_video_has_no_frames():
    spans = spans_of(random_prompt(PromptShape(videos=(), images=((1, 2),))))
    assert spans.frames == 0
    assert (spans.frame_L == -1).all()


@given(st.lists(sizes, min_size=1, max_size=3))
def test_every_frame_has_its_tokens(videos):
    prompt = random_prompt(PromptShape(videos=tuple(videos)))
    spans = spans_of(prompt)
    expected = [h * w for t, h, w in videos for _ in range(t)]
    assert torch.bincount(spans.frame_L[spans.frame_L >= 0]).tolist() == expected
    assert ((spans.frame_L >= 0) == (prompt.ids_1P[0] == VIDEO)).all()


def test_wrong_grid_is_refused_with_both_numbers():
    prompt = random_prompt(PromptShape())
    with pytest.raises(ValueError, match=r"holds 6 video placeholder tokens .* asks for 8"):
        frame_spans(prompt.ids_1P[0], torch.tensor([[4, 2, 4]]), video_token_id=VIDEO, merge_size=2)


def test_pool_averages_over_the_tokens_of_a_frame():
    pool = frame_pool(torch.tensor([[-1, 0, 0, 1, -1]]), frames=3)
    attention = torch.tensor([[[9.0, 1.0, 3.0, 5.0, 9.0]]])
    assert (attention @ pool).tolist() == [[[2.0, 5.0, 0.0]]]


@pytest.mark.parametrize(
    ("seconds", "advances", "remark"),
    [
        ((1.0,), True, "one second a frame at two positions a second"),
        ((0.5,), True, "one position a frame"),
        ((2 / 24,), False, "24 fps, the guess of a processor without metadata: all frames on one position"),
    ],
)
def test_time_must_advance_from_frame_to_frame(seconds, advances, remark):
    prompt = random_prompt(PromptShape(seconds=seconds))
    positions, _ = tiny_model().model.get_rope_index(
        prompt.ids_1P,
        prompt.types_1P,
        video_grid_thw=prompt.video_grid_thw,
        second_per_grid_ts=prompt.second_per_grid_ts,
    )
    if advances:
        check_time_advances(positions[:, 0], spans_of(prompt))
    else:
        with pytest.raises(ValueError, match="do not grow from frame to frame"):
            check_time_advances(positions[:, 0], spans_of(prompt))
