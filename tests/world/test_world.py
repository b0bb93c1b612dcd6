"""The embedded world tells the truth about its clips, and the shipped policy is what its page says."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from recipes.tiny_policy.build import build_policy
from recipes.tiny_policy.lessons import Lessons, Stage, build_pool
from recipes.tiny_policy.measure import respond, summarize
from recipes.tiny_policy.warmstart import SHORT, Recipe, embed, positions, train_stage, train_vision
from transformers import AutoModelForImageTextToText, AutoProcessor

from appo.models.families import use_pretrained_positions
from appo.models.prefix_packing import IGNORED
from appo.rewards.templates import build_messages, parse_response
from appo.video.reader import read_video
from appo.world import generate, load_annotations, load_policy, planned, policy_path
from appo.world.dataset import samples
from appo.world.drawing import RGB
from appo.world.policy import SAMPLING, vocabulary
from appo.world.teacher import respond as teach
from appo.world.world import HELD_OUT_PAIRS, LEVELS, NEW_TEXTURES, TASKS, Dials, make_scene


@pytest.fixture(scope="module")
def policy():
    torch.set_num_threads(1)
    model, processor = load_policy()
    return model.eval(), processor


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return {level: generate(folder / level, level, 48 if level == "L1" else 8, seed=77) for level in LEVELS}


# --- the world ---


def encode(processor, questions):
    """A left-padded batch in one call of the processor: independent of `generation`, which encodes one by one."""
    videos = [read_video(question.video, processor.video_processor, SAMPLING) for question in questions]
    messages = [build_messages(question, instruction="") for question in questions]
    texts = [processor.apply_chat_template(one, add_generation_prompt=True, tokenize=False) for one in messages]
    metadata = [video.metadata for video in videos]
    return dict(
        processor(
            text=texts,
            videos=[video.frames_THWC for video in videos],
            videos_kwargs={"video_metadata": metadata, "do_sample_frames": False},
            padding=True,
            return_tensors="pt",
        )
    )


def test_same_seed_same_bytes(tmp_path):
    for name in "ab":
        generate(tmp_path / name, "L2", 3, seed=5, workers=1 + (name == "b"))
    generate(tmp_path / "c", "L2", 3, seed=6)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(files) == 4
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    questions = [(tmp_path / name / "annotations.jsonl").read_text() for name in "ac"]
    assert questions[0] != questions[1]
    assert load_annotations(tmp_path / "a") == load_annotations(tmp_path / "a" / "annotations.jsonl")


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_planned_is_what_is_generated(tmp_path, level):
    assert planned(tmp_path / "there", level, 7, seed=3) == generate(tmp_path / "there", level, 7, seed=3)
    assert len(planned(tmp_path / "not", level, 2, seed=3)) == 2
    assert not (tmp_path / "not").exists(), "nothing is written"


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="unknown level 'L9'; there are L1, L2, L3"):
        generate(tmp_path, "L9", 1, seed=0)
    with pytest.raises(ValueError, match="count must not be negative"):
        generate(tmp_path, "L1", -1, seed=0)
    with pytest.raises(ValueError, match="seconds=13"):
        make_scene(Dials(seconds=13), random.Random(0))


@pytest.mark.parametrize("level", LEVELS)
def test_every_event_is_in_the_file_when_it_is_said_to_be(clips, policy, level):
    """The glyph's colour fills its cell in its second, and is nowhere in the clip at any other time."""
    for qa in clips[level][:8]:
        video = read_video(qa.video, policy[1].video_processor, SAMPLING)
        assert len(video.timestamps_T) == 2 * qa.metadata["seconds"]
        for event in qa.metadata["events"]:
            distance = np.abs(video.frames_THWC.astype(int) - RGB[event["colour"]]).max(axis=-1)
            pixels = (distance < 48).sum(axis=(1, 2))
            second = np.array(video.timestamps_T).astype(int)
            assert (pixels[second == event["second"]] > 250).all(), (qa.id, event)
            assert (pixels[second != event["second"]] < 60).all(), (qa.id, event)
        spans = {(float(frame), frame + 1.0) for frame in qa.event_frames}
        assert set(qa.spans) == spans
        asked = qa.metadata["events"][qa.metadata["asked"]]
        assert asked["second"] in qa.event_frames
        assert qa.answer in {asked["shape"], asked["colour"], str(asked["second"])}


def test_levels_differ_as_promised():
    drawn = {level: list(samples(LEVELS[level], 300, "levels")) for level in LEVELS}
    pairs = {
        level: [(e.shape, e.colour) in HELD_OUT_PAIRS for scene, _ in rows for e in scene.events]
        for level, rows in drawn.items()
    }
    assert not any(pairs["L1"])
    assert 0.3 < np.mean(pairs["L2"]) < 0.6
    assert 0.3 < np.mean(pairs["L3"]) < 0.6
    for level, seconds in (("L1", 8), ("L2", 8), ("L3", 12)):
        scenes = [scene for scene, _ in drawn[level]]
        assert all(scene.seconds == seconds and len(scene.events) >= 2 for scene in scenes)
        assert all((scene.texture in NEW_TEXTURES) == (level != "L1") for scene in scenes)
    assert np.mean([len(s.events) for s, _ in drawn["L3"]]) > np.mean([len(s.events) for s, _ in drawn["L1"]])
    assert {question.task for _, question in drawn["L1"]} == set(TASKS)


def test_a_line_that_is_no_question_is_named(tmp_path):
    generate(tmp_path, "L1", 2, seed=0)
    file = tmp_path / "annotations.jsonl"
    first, second = file.read_text().splitlines()
    for broken in ("{", "[]", second.replace('"question"', '"qustion"')):
        file.write_text(f"{first}\n{broken}\n")
        with pytest.raises(ValueError, match=r"annotations\.jsonl, line 2"):
            load_annotations(file)


def test_world_loads_without_torch():
    code = "import sys, appo.world.world; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# --- teacher, tokenizer, processor ---


def test_teacher_speaks_the_format_and_survives_the_tokenizer(policy):
    tokenizer = policy[1].tokenizer
    for level in LEVELS:
        for number, (scene, question) in enumerate(samples(LEVELS[level], 60, "teacher")):
            focus = number % len(scene.events)
            text = teach(scene, question, focus, random.Random(number))
            parsed = parse_response(text)
            assert parsed is not None
            assert (parsed.answer == question.answer) or focus != question.target
            ids = tokenizer(text).input_ids
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
            assert tokenizer(tokenizer.decode(ids)).input_ids == ids
            assert 40 <= len(ids) <= 90
            committed = int(re.search(r" at (\d+) \.", text)[1])
            assert committed == scene.events[focus].second


def test_shipped_tokenizer_has_the_vocabulary_of_the_code(policy):
    assert policy[1].tokenizer.get_vocab() == vocabulary()


def test_prompts_have_four_tokens_a_second_and_true_time(policy, clips):
    model, processor = policy
    for level, seconds in (("L1", 8), ("L3", 12)):
        inputs = encode(processor, clips[level][:2])
        assert inputs["video_grid_thw"].tolist() == [[seconds, 4, 4]] * 2
        assert torch.as_tensor(inputs["second_per_grid_ts"]).tolist() == [1.0, 1.0]
        tokens = (inputs["input_ids"] == model.config.video_token_id).sum(dim=1)
        assert tokens.tolist() == [4 * seconds] * 2


def test_images_are_small_too(policy):
    processor = policy[1]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is there ?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    image = np.zeros((90, 90, 3), dtype=np.uint8)
    assert processor(text=[text], images=[image], return_tensors="pt")["image_grid_thw"].tolist() == [[1, 4, 4]]


def test_lessons_are_what_the_policy_sees_in_real_files(policy, clips):
    """Cached features, hand-made prompts and positions against template, processor and the whole model."""
    model, processor = policy
    pool = build_pool(model, processor, SHORT[:1], 2, seed=1)
    lessons = Lessons(processor, {8: pool}, seed=0)
    batch = lessons.draw(Stage("check", (8,), 4, 1, tasks=("colour",), batch=1))
    prompt = batch.ids_BL[:, : int((batch.labels_BL == IGNORED).sum())]
    shown = processor.tokenizer.decode(prompt[0])
    question = shown.split("<|vision_end|> ")[1].split(" <|im_end|>")[0]
    qa = replace(clips["L1"][0], question=question)
    assert torch.equal(encode(processor, [qa])["input_ids"], prompt)
    text = processor.apply_chat_template(build_messages(qa, instruction=""), tokenize=False)
    assert text.endswith("<|im_end|>\n")

    inputs = encode(processor, clips["L1"][:1])
    row = inputs["input_ids"]
    features = model.model.visual(inputs["pixel_values_videos"], grid_thw=inputs["video_grid_thw"])
    same = replace(batch, ids_BL=row, labels_BL=row, features_BSCH=features.pooler_output.view(1, 8, 4, -1))
    with torch.no_grad():
        ours = model.model.language_model(
            inputs_embeds=embed(model, same), position_ids=positions(model, same)
        ).last_hidden_state
        assert torch.allclose(model.lm_head(ours), model(**inputs).logits, atol=1e-4)


# --- the policy ---


def test_weights_are_small_and_survive_saving(policy, clips, tmp_path):
    model, processor = policy
    assert sum(path.stat().st_size for path in policy_path().iterdir()) <= 6_000_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = use_pretrained_positions(AutoModelForImageTextToText.from_pretrained(tmp_path)).eval()
    inputs = encode(processor, clips["L3"][:2])
    inputs_again = encode(AutoProcessor.from_pretrained(tmp_path), clips["L3"][:2])
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**inputs_again).logits)


@pytest.mark.parametrize("level", ["L1", "L3"])
def test_generation_and_scoring_see_the_same_positions(policy, clips, level):
    """Greedy tokens are the argmax of one forward pass over prompt and response, also in long clips."""
    model, processor = policy
    inputs = encode(processor, clips[level][:1])
    prompt = inputs["input_ids"].shape[1]
    row = model.generate(**inputs, do_sample=False, max_new_tokens=60)
    types = torch.zeros_like(row)
    types[:, :prompt] = inputs["mm_token_type_ids"]
    whole = inputs | {"input_ids": row, "attention_mask": torch.ones_like(row), "mm_token_type_ids": types}
    with torch.no_grad():
        predicted = model(**whole).logits[0, prompt - 1 : -1].argmax(-1)
    assert torch.equal(predicted, row[0, prompt:])


def test_shipped_policy_is_lazy_but_sees(policy, clips):
    """Thresholds are loose: 48 questions, one machine's arithmetic. The page has the measured numbers."""
    torch.manual_seed(0)
    greedy = summarize(clips["L1"], respond(*policy, clips["L1"], greedy=True))
    sampled = summarize(clips["L1"], respond(*policy, clips["L1"], samples=4))
    assert greedy["format"] >= 0.97
    assert sampled["format"] >= 0.95
    assert greedy["accuracy"] >= 0.45
    assert 0.3 <= sampled["accuracy"] <= 0.75
    assert sampled["mixed"] >= 0.5
    strange = clips["L2"] + clips["L3"]
    assert summarize(strange, respond(*policy, strange, samples=4))["format"] >= 0.9


def test_page_tells_what_the_record_says():
    record = json.loads((policy_path() / "warmstart.json").read_text())
    page = (Path(__file__).parents[2] / "docs" / "world.md").read_text()
    assert record["command"] in page
    for stage, levels in record["measured"].items():
        for level, found in levels.items():
            greedy, sampled = found["greedy"]["accuracy"], found["sampled"]
            assert f"| {stage} | {level} | {greedy:.2f} | {sampled['accuracy']:.2f} |" in page


def test_warm_start_learns_within_a_few_steps():
    torch.set_num_threads(1)
    model, processor = build_policy(seed=0)
    vision = train_vision(model, processor, Recipe(vision_clips=4, vision_steps=26))
    assert vision[-1]["loss"] < vision[0]["loss"] / 2
    pool = build_pool(model, processor, SHORT, 4, seed=0)
    lessons = Lessons(processor, {8: pool}, seed=0)
    optimizer = torch.optim.AdamW(model.model.language_model.parameters(), lr=1e-3)
    for full, lazy in ((False, 0.0), (True, 0.5)):
        log = train_stage(model, lessons, Stage("x", (4,), 2, 20, full=full, lazy=lazy, batch=8), optimizer)
        assert log[-1]["loss"] < log[0]["loss"] * 0.8
