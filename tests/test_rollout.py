"""rollout: messages with real video files -> model inputs -> responses."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from appo.prompts import build_messages
from appo.rollout import (
    VideoCache,
    batch_vision,
    check_time,
    clean_messages,
    encode_prompt,
    generate,
    has_video,
    prompt_spans,
    video_paths,
    vision_token_ids,
    without_pixels,
)
from appo.spotlight import build_policy
from appo.video import FrameSampling, MissingVideoError
from runs import clips

SAMPLING = FrameSampling(2.0, 16, 4)


@pytest.fixture(scope="module")
def policy():
    return build_policy(0)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return clips(tmp_path_factory.mktemp("clips"))


def encode(processor, question):
    cache = VideoCache(processor.video_processor, SAMPLING)
    messages = build_messages(question, instruction="")
    return encode_prompt(processor, messages, [cache.read(path) for path in video_paths(messages)])


def test_null_fields_of_a_table_do_not_add_videos(policy, questions):
    """Arrow gives every part the same fields; a template that asks `'video' in part` would draw a second video."""
    _, processor = policy
    messages = build_messages(questions[0], instruction="")
    through_arrow = Dataset.from_list([{"prompt": messages}])[0]["prompt"]
    assert any(None in part.values() for part in through_arrow[0]["content"]), "nothing to clean, proves nothing"
    assert clean_messages(through_arrow) == messages
    cache = VideoCache(processor.video_processor, SAMPLING)
    video = cache.read(questions[0].video)
    one = encode_prompt(processor, through_arrow, [video])
    assert torch.equal(one["input_ids"], encode_prompt(processor, messages, [video])["input_ids"])


def test_prompt_equals_the_processors_own_chat_template_path(policy, questions):
    """Oracle: transformers' apply_chat_template(tokenize=True) on the same frames and metadata."""
    _, processor = policy
    question = questions[0]
    video = VideoCache(processor.video_processor, SAMPLING).read(question.video)
    conversation = [{
        "role": "user",
        "content": [{"type": "video", "video": video.frames_THWC}, {"type": "text", "text": question.question}],
    }]  # fmt: skip
    expected = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True,
        processor_kwargs={"video_metadata": [video.metadata], "do_sample_frames": False},
    )  # fmt: skip
    actual = encode(processor, question)
    for key in ("input_ids", "pixel_values_videos", "video_grid_thw", "mm_token_type_ids"):
        assert torch.equal(actual[key], expected[key]), key
    assert actual["second_per_grid_ts"].tolist() == [1.0], "two of two sampled frames a second"


def test_frames_are_at_different_times_and_lost_metadata_is_noticed(policy, questions):
    model, processor = policy
    prompt = encode(processor, questions[0])
    assert prompt_spans(model, prompt).frames == 8
    check_time(model, prompt)
    lost = {**prompt, "second_per_grid_ts": torch.tensor([2 / 24])}
    with pytest.raises(ValueError, match="do not grow from frame to frame"):
        check_time(model, lost)


def test_a_file_is_decoded_once_and_its_times_outlive_the_pixels(policy, questions):
    _, processor = policy
    cache = VideoCache(processor.video_processor, SAMPLING)
    messages = build_messages(questions[0], instruction="")
    assert cache.read(questions[0].video) is cache.read(questions[0].video)
    cache.read(questions[1].video)
    assert cache.decoded == 2
    cache.clear()
    assert cache.timestamps(messages) == tuple(second + 0.25 for second in range(8))
    with pytest.raises(MissingVideoError, match=r"nowhere\.mp4"):
        cache.read("nowhere.mp4")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a string", False),
        ([{"role": "user", "content": "text"}], False),
        ([{"role": "user", "content": [{"type": "image", "image": "x.png"}]}], False),
        ([{"role": "user", "content": [{"type": "text", "text": "?"}, {"type": "video", "video": "x.mp4"}]}], True),
    ],
)
def test_has_video(prompt, expected):
    assert has_video(prompt) is expected


def test_batched_generation_equals_one_at_a_time(policy, questions):
    """Greedy decoding of prompts of different lengths, left-padded together, and alone."""
    model, processor = policy
    prompts = [encode(processor, question) for question in questions[:4]]
    assert len({prompt["input_ids"].shape[1] for prompt in prompts}) > 1
    together = generate(model, processor, prompts, max_new_tokens=12, temperature=0.0)
    for prompt, group in zip(prompts, together, strict=True):
        alone = generate(model, processor, [prompt], max_new_tokens=12, temperature=0.0)[0][0]
        assert torch.equal(group[0], alone)


def test_responses_end_with_their_first_end_token_and_hold_no_placeholder(policy, questions):
    model, processor = policy
    torch.manual_seed(0)
    groups = generate(model, processor, [encode(processor, questions[0])], max_new_tokens=64, responses=8)
    end = processor.tokenizer.eos_token_id
    assert [len(group) for group in groups] == [8]
    for ids in groups[0]:
        ends = (ids == end).nonzero()
        assert len(ids) == 64 or (len(ends) == 1 and int(ends[0]) == len(ids) - 1)
        assert not set(ids.tolist()) & set(vision_token_ids(model.config))
    assert len({tuple(ids.tolist()) for ids in groups[0]}) > 1, "sampling is random"


def test_vision_tensors_of_prompts_follow_one_another_and_blank_frames_keep_their_shape(policy, questions):
    _, processor = policy
    prompts = [encode(processor, question) for question in questions[:2]]
    batch = batch_vision(prompts)
    assert torch.equal(batch["pixel_values_videos"], torch.cat([p["pixel_values_videos"] for p in prompts]))
    assert batch["video_grid_thw"].shape == (2, 3)
    assert "pixel_values" not in batch
    blank = without_pixels(prompts[0])
    assert blank["pixel_values_videos"].abs().sum() == 0
    assert torch.equal(blank["input_ids"], prompts[0]["input_ids"])
