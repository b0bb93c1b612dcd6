"""Which tokens are which frame in what real processors make of real files: known from the pixels alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from appo.models.families import family_of
from appo.models.frame_tokens import spans_of_runs
from appo.models.log_probs import score_group
from appo.models.prompt import Prompt
from appo.rollout.generation import PromptError, VideoCache, encode_messages
from appo.training.arguments import TrainScript
from appo.training.run import set_pixels
from appo.video.reader import FrameSampling, read_video
from tests.support.clips import counted_frames, indices_seen, write_clip
from tests.support.family_models import PROCESSORS, family_model
from tests.support.tiny import BY_RUNS, GLM

SAMPLING = FrameSampling(fps=2.0, max_frames=6, min_frames=4)
TEXT = {"type": "text", "text": "which ?"}
PICTURE = {"type": "image", "image": Image.new("RGB", (56, 56), (255, 0, 0))}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Video parts: 2.4 and 3 seconds of shades of grey."""
    folder = tmp_path_factory.mktemp("clips")
    paths = [write_clip(folder / f"{count}.mp4", counted_frames(count), 10) for count in (24, 30)]
    return [{"type": "video", "video": str(path)} for path in paths]


def encode(processor: Any, parts: list[dict[str, Any]], sampling: FrameSampling = SAMPLING) -> Prompt:
    videos = VideoCache(processor.video_processor, sampling)
    return encode_messages(processor, [{"role": "user", "content": parts}], videos)


@pytest.mark.parametrize("mixture", ["v", "pv", "pvp", "vw", "wpv", "p"])
@pytest.mark.parametrize("architecture", PROCESSORS)
def test_a_frame_is_where_its_pixels_are(files: list[dict[str, Any]], architecture: str, mixture: str) -> None:
    """The embedding of a token of frame f depends on the pixels of frame f, and on those of no other."""
    model, processor = family_model(architecture)
    parts = [{"v": files[0], "w": files[1], "p": PICTURE}[kind] for kind in mixture]
    if architecture == "smolvlm" and {"p"} < set(mixture):
        with pytest.raises(PromptError, match=r"^SmolVLMProcessor loses pictures beside videos: ask"):
            encode(processor, [*parts, TEXT])
        return
    same = FrameSampling(fps=2.0, max_frames=4, min_frames=4)
    prompt = encode(processor, [*parts, TEXT], same)
    spans = family_of(model).spans(prompt)
    expected = 4 if architecture in BY_RUNS else 2
    assert spans.frames_per_video == (expected,) * (len(mixture) - mixture.count("p"))
    assert prompt.has_video == (spans.frames > 0)
    name = "pixel_values" if prompt.pixel_values_videos is None else "pixel_values_videos"
    pieces = getattr(prompt, name).flatten(0, 1 if architecture == "smolvlm" else 0)
    before_LH, changed = embedded(model, prompt), []
    for at in range(len(pieces)):
        piece = torch.arange(len(pieces)).view(-1, *[1] * (pieces.ndim - 1)) == at
        after_LH = embedded(model, prompt.with_each((name,), lambda old, piece=piece: (pieces + piece).view_as(old)))
        frames = spans.frame_L[(after_LH != before_LH).any(-1)].unique().tolist()
        assert len(frames) == 1, "a patch is of one frame (or of a picture, -1)"
        changed += frames
    own = [frame for frame in changed if frame >= 0]
    assert own == sorted(own), "in order"
    assert set(own) == set(range(spans.frames))


@torch.no_grad()
def embedded(model: Any, prompt: Prompt) -> torch.Tensor:
    """(L, H), what the language model reads."""
    read: list[torch.Tensor] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["inputs_embeds"][0]), with_kwargs=True
    )
    types = {} if prompt.types_1P is None else {"mm_token_type_ids": prompt.types_1P}
    model(input_ids=prompt.ids_1P, **types, **family_of(model).vision_inputs([prompt]))
    hook.remove()
    return read[0]


def test_internvl_takes_videos_of_equally_many_frames(files: list[dict[str, Any]]) -> None:
    with pytest.raises(
        PromptError, match=r"^InternVLProcessor takes videos of equally many frames only, not \[4, 6\]: "
    ):
        encode(PROCESSORS["internvl"](), [*files, TEXT])


@pytest.mark.parametrize("architecture", ["internvl", "smolvlm"])
def test_a_processors_output_does_not_say_which_pictures_are_frames(
    files: list[dict[str, Any]], architecture: str
) -> None:
    model, processor = family_model(architecture)
    prompt = encode(processor, [files[0], TEXT])
    given = prompt.mapping()
    with torch.no_grad():
        assert score_group(model, given, [torch.tensor([5])]).frame_attention_GNF.shape == (1, 1, 4)
    del given["video_spans"]
    with pytest.raises(ValueError, match=f"^{architecture} has frames as pictures, .* encode the prompt with appo.rol"):
        score_group(model, given, [torch.tensor([5])])


@pytest.mark.parametrize(
    ("row", "spans", "expected"),
    [
        ("t vv t vv t v", [(1, 8, 3)], "- 00 - 11 - 2"),  # a run is a frame, of any length
        ("vvvvvv t", [(0, 6, 3)], "001122 -"),  # one run is split evenly
        ("vvvvvvv t", [(0, 7, 3)], "001122- -"),  # and may end with a newline
        ("vv t vv vv t v t v", [(0, 2, 1), (3, 7, 2), (8, 11, 2)], "00 - 11 22 - 3 - 4"),  # several videos
        ("vv t vv", [(3, 5, 1)], "-- - 00"),  # a picture before
        ("t v", [], "- -"),
    ],
)
def test_runs_become_frames(row: str, spans: list[tuple[int, int, int]], expected: str) -> None:
    is_vision_L = torch.tensor([mark == "v" for mark in row.replace(" ", "")])
    found = spans_of_runs(is_vision_L, torch.tensor(spans, dtype=torch.long).view(-1, 3))
    assert found.frame_L.tolist() == [-1 if mark == "-" else int(mark) for mark in expected.replace(" ", "")]
    assert found.frames_per_video == tuple(frames for _, _, frames in spans)


@pytest.mark.parametrize(("row", "frames"), [("vvvvvvvv", 3), ("vvtvv", 3), ("v", 2), ("vvtvv", 1)])
def test_other_runs_are_refused(row: str, frames: int) -> None:
    with pytest.raises(ValueError, match=rf"^a video of {frames} frames stands as runs of \[.*\] tokens: which are"):
        spans_of_runs(torch.tensor([mark == "v" for mark in row]), torch.tensor([(0, len(row), frames)]))


@pytest.mark.parametrize("architecture", ["internvl", "smolvlm", *GLM])
@pytest.mark.parametrize(("count", "expected"), [(2, 2), (10, 4), (24, 4), (30, 6), (80, 6)])
def test_rules_without_bounds_keep_to_those_of_the_settings(
    tmp_path: Path, architecture: str, count: int, expected: int
) -> None:
    """2 frames a second, 4 to 6 of them, of files with 10; SmolVLM's rule knows no least number."""
    clip = write_clip(tmp_path / "clip.mp4", counted_frames(count), 10)
    video = read_video(str(clip), PROCESSORS[architecture]().video_processor, SAMPLING)
    assert video.frame_indices == indices_seen(video.frames_THWC)
    if architecture == "smolvlm":
        expected = {2: 1, 10: 2, 24: 4}.get(count, expected)
    assert len(set(video.frame_indices)) == expected


def test_one_size_cannot_be_set() -> None:
    settings = {"internvl": "video_max_pixels", "smolvlm": "image_max_pixels", "gemma4": "video_max_pixels"}
    for architecture, setting in settings.items():
        with pytest.raises(ValueError, match=f"has one size: leave {setting} and .* out"):
            set_pixels(PROCESSORS[architecture](), TrainScript(**{setting: 784}))
