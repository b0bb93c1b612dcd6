"""The settings of `appo train` beside the method's own: which rows, how large the frames, and dry runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset

from appo.rollout.generation import encode_prompt
from appo.training.arguments import TrainScript, parse
from appo.training.run import set_pixels, subset
from appo.video.reader import read_video
from appo.world import load_policy
from appo.world.policy import SAMPLING
from tests.support.clips import counted_frames, write_clip

RECIPES = Path(__file__).parents[2] / "recipes"


def test_a_limit_draws_rows_without_replacement_in_the_order_of_the_file():
    rows = Dataset.from_list([{"id": str(i)} for i in range(50)])
    drawn = [[int(identity) for identity in subset(rows, 20, seed)["id"]] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for chosen in drawn:
        assert len(set(chosen)) == 20
        assert chosen == sorted(chosen)
    assert subset(rows, None, 0) is rows
    assert subset(rows, 50, 3)["id"][:] == rows["id"][:]
    counts = [0] * 50
    for seed in range(400):
        for identity in subset(rows, 10, seed)["id"]:
            counts[int(identity)] += 1
    assert sum(counts) == 4000
    assert min(counts) > 80 - 5 * 8, "400 draws of one in five: 80 each, with a standard deviation of 8"
    assert max(counts) < 80 + 5 * 8


@pytest.mark.parametrize("limit", [0, -1, 51])
def test_a_limit_that_cannot_be_met_is_refused(limit):
    rows = Dataset.from_list([{"id": str(i)} for i in range(50)])
    with pytest.raises(ValueError, match=rf"limit is {limit}, but there are 50 rows"):
        subset(rows, limit, 0)


def tokens_of_a_frame(processor, folder: Path, height: int, width: int) -> int:
    clip = write_clip(folder / "x.mp4", counted_frames(8, height=height, width=width), fps=4)
    video = read_video(str(clip), processor.video_processor, SAMPLING)
    content = [{"type": "video", "video": video.path}, {"type": "text", "text": "when ?"}]
    (grid,) = encode_prompt(processor, [{"role": "user", "content": content}], [video]).video_grid_thw.tolist()
    return grid[1] * grid[2] // 4


@pytest.mark.parametrize(("least", "most"), [(16, 32), (64, 64), (1, 9), (20, 400)])
@pytest.mark.parametrize("size", [(64, 64), (480, 640), (200, 900)])
def test_frames_are_scaled_to_the_pixels_asked_for(tmp_path, least, most, size):
    """In tokens of 28 x 28 pixels; sides are whole tokens, so the fewest may be missed by rounding down."""
    processor = load_policy()[1]
    set_pixels(processor, TrainScript(video_min_pixels=least * 784, video_max_pixels=most * 784))
    tokens = tokens_of_a_frame(processor, tmp_path, *size)
    assert 0.6 * least <= tokens <= most
    if most < 200 < size[0]:
        assert tokens >= 0.6 * most, "frames larger than the most are scaled to it, not to less"


def test_the_processor_is_saved_with_its_pixels(tmp_path):
    from transformers import AutoProcessor

    processor = load_policy()[1]
    set_pixels(processor, TrainScript(video_min_pixels=784, video_max_pixels=7840, image_max_pixels=78400))
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert (loaded.video_processor.size["shortest_edge"], loaded.video_processor.size["longest_edge"]) == (784, 7840)
    assert loaded.image_processor.size["longest_edge"] == 78400


def test_contradictory_pixels_are_refused():
    with pytest.raises(ValueError, match=r"video_max_pixels \(784\) is less than video_min_pixels \(7840\)"):
        set_pixels(load_policy()[1], TrainScript(video_min_pixels=7840, video_max_pixels=784))


def test_a_dry_run_keeps_what_is_asked_rewarded_and_adapted_and_yields_to_flags():
    path = ["--config", str(RECIPES / "nextgqa-7b.yaml")]
    script, config = parse([*path, "--max_steps", "5", "--use_peft", "true"], tiny=True)
    assert (script.model, script.dataset, script.annotations, script.videos, script.split) == (
        "spotlight", "spotlight", None, None, None,
    )  # fmt: skip
    assert (script.response_format, script.rewards) == ("grounded", ["accuracy", "format", "temporal_iou"])
    assert (config.method, config.reward_weights, config.video_max_frames) == ("appo", [1.0, 0.1, 1.0], 100)
    assert script.use_peft
    assert config.max_steps == 5
    with pytest.raises(ValueError, match="--tiny sets annotations itself"):
        parse([*path, "--annotations", "x.jsonl"], tiny=True)
    with pytest.raises(ValueError, match="tiny"):
        parse(["--config", str(RECIPES / "spotlight.yaml"), "--tiny", "true"])
