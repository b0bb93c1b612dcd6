"""rollout: messages with real video files -> model inputs -> responses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from recipes.tiny_policy.build import build_policy
from transformers import GenerationConfig

from appo.models.families import family_of
from appo.models.log_probs import score_group
from appo.rewards.templates import build_messages
from appo.rollout.generation import (
    VideoCache,
    clean_messages,
    encode_prompt,
    generate,
    has_video,
    respond,
    video_sources,
)
from appo.types import VideoSource
from appo.video.reader import FrameSampling, MissingVideoError
from tests.support.runs import clips
from tests.support.tiny import ARCHITECTURES, PromptShape, random_prompt, tiny_model

SAMPLING = FrameSampling(2.0, 16, 4)
# Said by the version, not by the function that finds it out: that one is tested too.
TAKES_FEATURES = Version(transformers.__version__) >= Version("5.18")


@pytest.fixture(scope="module")
def policy():
    return build_policy(0)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return clips(tmp_path_factory.mktemp("clips"))


def encode(processor, question):
    cache = VideoCache(processor.video_processor, SAMPLING)
    messages = build_messages(question, instruction="")
    return encode_prompt(processor, messages, [cache.read(source) for source in video_sources(messages)])


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
    assert torch.equal(one.ids_1P, encode_prompt(processor, messages, [video]).ids_1P)


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
    actual = encode(processor, question).mapping()
    for key in ("input_ids", "pixel_values_videos", "video_grid_thw", "mm_token_type_ids"):
        assert torch.equal(actual[key], expected[key]), key
    assert actual["second_per_grid_ts"].tolist() == [1.0], "two of two sampled frames a second"


def test_frames_are_at_different_times_and_lost_metadata_is_noticed(policy, questions):
    model, processor = policy
    prompt = encode(processor, questions[0])
    family = family_of(model)
    assert family.spans(prompt).frames == 8
    family.check_time(prompt)
    lost = replace(prompt, second_per_grid_ts=torch.tensor([2 / 24]))
    with pytest.raises(ValueError, match="do not grow from frame to frame"):
        family.check_time(lost)


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
        cache.read(VideoSource("nowhere.mp4"))


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
    assert len({prompt.length for prompt in prompts}) > 1
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
        assert not set(ids.tolist()) & set(family_of(model).banned_ids)
    assert len({tuple(ids.tolist()) for ids in groups[0]}) > 1, "sampling is random"


def test_vision_tensors_of_prompts_follow_one_another_and_blank_frames_keep_their_shape(policy, questions):
    model, processor = policy
    prompts = [encode(processor, question) for question in questions[:2]]
    batch = family_of(model).vision_inputs(prompts)
    assert torch.equal(batch["pixel_values_videos"], torch.cat([prompt.pixel_values_videos for prompt in prompts]))
    assert batch["video_grid_thw"].shape == (2, 3)
    assert "pixel_values" not in batch
    blank = prompts[0].without_pixels()
    assert blank.pixel_values_videos.unique().tolist() == [1]
    assert blank.pixel_values_videos.shape == prompts[0].pixel_values_videos.shape
    assert torch.equal(blank.ids_1P, prompts[0].ids_1P)


@pytest.mark.parametrize("given", ["an argument", "a list", "the settings", "the model's own"])
def test_responses_end_where_generation_was_told_to(given):
    """As transformers: an argument before the settings passed, and those before the model's own."""
    model, prompt = tiny_model(), random_prompt(PromptShape(), 1)
    model.generation_config.eos_token_id = None
    endless = {"do_sample": False, "max_new_tokens": 12}
    (whole,), (other,) = respond(model, 0, [prompt, random_prompt(PromptShape(), 2)], 1, **endless)
    assert len(whole) == len(other) == 12, "no end-of-sequence token, so only the length ends a response"
    end = int(whole[5])
    expected = whole[: whole.tolist().index(end) + 1]
    if given == "the settings":
        settings = {"generation_config": GenerationConfig(eos_token_id=end, **endless)}
    elif given == "the model's own":
        model.generation_config.eos_token_id = [end]
        settings = {"generation_config": GenerationConfig(**endless)}
    else:
        model.generation_config.eos_token_id = int(whole[0])
        settings = endless | {"eos_token_id": end if given == "an argument" else [end, 1]}
    (ended,), (other_ended,) = respond(model, 0, [prompt, random_prompt(PromptShape(), 2)], 1, **settings)
    assert torch.equal(ended, expected)
    assert torch.equal(other_ended, other[: other.tolist().index(end) + 1] if end in other else other)


def test_an_argument_of_none_takes_the_end_away():
    model, prompt = tiny_model(), random_prompt(PromptShape(), 1)
    endless = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
    model.generation_config.eos_token_id = None
    whole = respond(model, 0, [prompt], 1, **endless)[0][0]
    model.generation_config.eos_token_id = int(whole[5])
    assert torch.equal(respond(model, 0, [prompt], 1, **endless)[0][0], whole)


def stock_generate(model, prompts, responses, pad, **settings):
    """The oracle: transformers' own generation on prompts copied G times, pixels and all."""
    longest = max(prompt.length for prompt in prompts)
    rows = [prompt for prompt in prompts for _ in range(responses)]

    def padded(parts, value):
        return torch.cat([torch.nn.functional.pad(x, (longest - x.shape[1], 0), value=value) for x in parts])

    ids_1P = [row.ids_1P for row in rows]
    inputs = {"input_ids": padded(ids_1P, pad), "attention_mask": padded(map(torch.ones_like, ids_1P), 0)}
    types_1P = [row.types_1P for row in rows if row.types_1P is not None]
    inputs |= family_of(model).vision_inputs(rows) | ({"mm_token_type_ids": padded(types_1P, 0)} if types_1P else {})
    with torch.no_grad():
        return model.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True)


@pytest.mark.parametrize("architecture", ["the embedded policy", *ARCHITECTURES])
def test_one_prefill_gives_the_tokens_and_logits_of_stock_generation(policy, questions, architecture, monkeypatch):
    if architecture == "the embedded policy":
        model, processor = policy
        prompts, pad = [encode(processor, question) for question in questions[:3]], processor.tokenizer.pad_token_id
    else:
        model, pad = tiny_model(architecture=architecture), 0
        shapes = [PromptShape(videos=((1, 1, 2),), text=3), PromptShape(videos=((1, 2, 2),), images=((1, 2),), text=6)]
        prompts = [random_prompt(shape, seed, architecture) for seed, shape in enumerate(shapes)]
        if architecture != "qwen2_5_vl":
            prompts = [replace(prompt, second_per_grid_ts=None) for prompt in prompts]
        model.generation_config.update(eos_token_id=1, pad_token_id=0)
    assert len({prompt.length for prompt in prompts}) > 1, "prompts of different lengths"
    outputs = []
    stock = model.generate

    def recording(*args, **kwargs):
        outputs.append(stock(*args, **kwargs, return_dict_in_generate=True, output_logits=True))
        return outputs[-1].sequences

    monkeypatch.setattr(model, "generate", recording)
    for settings in ({"do_sample": False}, {"do_sample": True, "top_k": 0}):
        settings = {**settings, "max_new_tokens": 8, "suppress_tokens": family_of(model).banned_ids}
        for features in (False, True) if TAKES_FEATURES else (False,):
            inputs = [family_of(model).encode_vision(prompt) for prompt in prompts] if features else prompts
            torch.manual_seed(1)
            respond(model, pad, inputs, 3, **settings)
            monkeypatch.undo()
            torch.manual_seed(1)
            expected = stock_generate(model, prompts, 3, pad, **settings)
            monkeypatch.setattr(model, "generate", recording)
            assert torch.equal(outputs[-1].sequences, expected.sequences)
            for ours, theirs in zip(outputs[-1].logits, expected.logits, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_the_vision_tower_runs_once_per_prompt(policy, questions):
    model, processor = policy
    assert family_of(model).reuses_vision == TAKES_FEATURES
    if not TAKES_FEATURES:
        pytest.skip("this transformers takes pixels only")
    prompts = [encode(processor, question) for question in questions[:2]]
    grids = []
    hook = model.model.visual.register_forward_hook(lambda module, args, kwargs, out: grids.append(1), with_kwargs=True)
    features = [family_of(model).encode_vision(prompt) for prompt in prompts]
    assert len(grids) == 2
    assert not any(prompt.has_pixels for prompt in features), "the pixels can be forgotten"
    groups = respond(model, processor.tokenizer.pad_token_id, features, 4, max_new_tokens=4)
    with torch.no_grad():
        packed = score_group(model, features[0], groups[0])
        rows = score_group(model, features[0], groups[0], shared_prefix=False)
    hook.remove()
    assert len(grids) == 2, "neither generation nor scoring ran it again"
    with torch.no_grad():
        from_pixels = score_group(model, prompts[0], groups[0])
    for scores in (packed, rows):
        torch.testing.assert_close(scores.log_probs_GN, from_pixels.log_probs_GN, rtol=1e-4, atol=1e-5)
