"""A folder of pictures is a video: in the order of their numbers, at the rate they were taken."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from recipes.tiny_policy.build import build_policy

from appo.data import load
from appo.rewards.templates import build_messages
from appo.rollout.generation import VideoCache, encode_prompt, video_sources
from appo.types import VideoQA, VideoSource
from appo.video.image_sequence import list_pictures
from appo.video.reader import (
    ClipError,
    CorruptVideoError,
    EmptyVideoError,
    FrameSampling,
    MissingVideoError,
    TooFewFramesError,
    VideoError,
    read_video,
)
from tests.support import clips
from tests.support.data_fixtures import MV_ROW, put_json

EVERY_FRAME = FrameSampling(1000.0, 80, 2)


class KeepAll:
    """A processor whose rule keeps every frame."""

    temporal_patch_size = 1

    def sample_frames(self, metadata: Any, **_: Any) -> list[int]:
        return list(range(metadata.total_num_frames))


def put_frames(folder: Path, names: Iterable[str], **size: int) -> Path:
    """Pictures whose brightness tells their index among `names`."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(names)
    for name, frame_HWC in zip(names, clips.counted_frames(len(names), **size), strict=True):
        Image.fromarray(frame_HWC).save(folder / name)
    return folder


def indices_of(folder: Path, **clip: float) -> tuple[int, ...]:
    source = VideoSource(str(folder), frames_fps=3.0, **clip)
    return clips.indices_seen(read_video(source, KeepAll(), EVERY_FRAME).frames_THWC)


# --- the right pictures at the right times -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "remark"),
    [
        ([f"{i:05d}.jpg" for i in range(1, 13)], "MVBench"),
        ([f"frame{i}.png" for i in range(12)], "frame10 follows frame9"),
        ([f"frame_{i * 30}.webp" for i in range(12)], "every thirtieth"),
        ([f"{i}.JPEG" for i in range(95, 107)], "capitals; 100 follows 99"),
        ([f"{i}.jpg" if i % 2 else f"{i}.png" for i in range(12)], "kinds of pictures mixed"),
        ([f"cam2_{i // 4}_{i % 4}.jpg" for i in range(12)], "several numbers"),
        (["a.png", "b.png", "c.png"], "no numbers"),
    ],
)
def test_pictures_are_in_the_order_of_their_numbers(tmp_path: Path, names: list[str], remark: str) -> None:
    folder = put_frames(tmp_path / "frames", names)
    for extra in (".DS_Store", "._00001.jpg", "Thumbs.db", "desktop.ini"):
        (folder / extra).write_bytes(b"not a picture")
    assert [path.name for path in list_pictures(folder)] == names
    assert indices_of(folder) == tuple(range(len(names))), remark


def test_a_folder_has_the_times_of_its_rate(tmp_path: Path) -> None:
    folder = put_frames(tmp_path / "frames", [f"{i:05d}.jpg" for i in range(1, 31)])
    processor = build_policy(0)[1].video_processor
    video = read_video(VideoSource(str(folder), frames_fps=3.0), processor, FrameSampling(1, 16, 4))
    # 10 seconds, one frame a second: every third picture.
    assert clips.indices_seen(video.frames_THWC) == video.frame_indices == tuple(range(0, 30, 3))
    assert video.timestamps_T == tuple(float(second) for second in range(10))
    assert (video.fps, video.total_frames, video.metadata["duration"]) == (3.0, 30, 10.0)
    assert (video.metadata["height"], video.metadata["width"]) == (48, 64)
    assert video.path == str(folder)


@pytest.mark.parametrize(
    ("clip", "expected"),
    [
        ({"start": 1.0, "end": 3.0}, range(3, 9)),
        ({"start": 1.0}, range(3, 12)),
        ({"end": 1.0}, range(3)),
        ({"start": 1.1, "end": 2.9}, range(3, 9)),  # a third of a second each: the middles decide
        ({"start": 1.2, "end": 2.8}, range(4, 8)),
        ({"start": 2.0, "end": 4.0}, range(6, 12)),
        ({"start": 2.0, "end": 60.0}, range(6, 12)),
    ],
)
def test_a_clip_of_a_folder(tmp_path: Path, clip: dict[str, float], expected: range) -> None:
    folder = put_frames(tmp_path / "frames", [f"{i}.png" for i in range(12)])
    assert indices_of(folder, **clip) == tuple(expected)


def test_only_sampled_pictures_are_opened(tmp_path: Path) -> None:
    """Memory and time are bounded by the sample: what is not sampled may be anything."""
    folder = put_frames(tmp_path / "frames", [f"{i}.png" for i in range(40)])
    processor = build_policy(0)[1].video_processor
    source, sampling = VideoSource(str(folder), frames_fps=10.0), FrameSampling(2, 16, 4)
    before = read_video(source, processor, sampling)
    for index in set(range(40)) - set(before.frame_indices):
        (folder / f"{index}.png").write_bytes(b"")
    np.testing.assert_array_equal(read_video(source, processor, sampling).frames_THWC, before.frames_THWC)


def test_pictures_are_rgb_and_upright(tmp_path: Path) -> None:
    """Grey, palette, transparent and turned pictures beside an ordinary one."""
    folder = tmp_path / "frames"
    folder.mkdir()
    picture_HWC = np.full((48, 64, 3), 20, np.uint8)
    picture_HWC[:24, :32] = 230
    picture = Image.fromarray(picture_HWC)
    picture.save(folder / "0.png")
    picture.convert("L").save(folder / "1.png")
    picture.quantize(4).save(folder / "2.png")
    picture.convert("RGBA").save(folder / "3.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees clockwise when shown
    picture.transpose(Image.Transpose.ROTATE_90).save(folder / "4.png", exif=turned)
    video = read_video(VideoSource(str(folder), frames_fps=1.0), KeepAll(), EVERY_FRAME)
    for frame_HWC in video.frames_THWC:
        assert np.abs(frame_HWC.astype(int) - picture_HWC).max() <= 3


def test_the_model_is_told_the_rate(tmp_path: Path) -> None:
    """From MVBench's annotation to Qwen2.5-VL's seconds per grid: 12 pictures, 3 a second, a clip of 2 seconds."""
    rows = [MV_ROW | {"video": "v 1"}, MV_ROW | {"video": "v 1", "start": 1.0, "end": 3.0}]
    put_frames(tmp_path / "video" / "tvqa" / "frames_fps3_hq" / "v 1", [f"{i:05d}.jpg" for i in range(1, 13)])
    table = load("mvbench", put_json(tmp_path / "episodic_reasoning.json", rows), tmp_path / "video")
    processor = build_policy(0)[1]
    cache = VideoCache(processor.video_processor, FrameSampling(1, 16, 2))
    seconds = []
    for row in table:
        videos = [cache.read(source) for source in video_sources(row["prompt"])]
        seconds += encode_prompt(processor, row["prompt"], videos).second_per_grid_ts.tolist()
    # Whole: 4 of 12 pictures, one a second, two merged. Clip: 2 of 6 pictures in 2 s.
    assert seconds == pytest.approx([2.0, 2.0])
    assert [cache.timestamps(row["prompt"]) for row in table] == [(0.5, 2.5), (0.5,)]


# --- what is wrong -----------------------------------------------------------------------------------------------


def _frames(folder: Path, *names: str) -> Path:
    return put_frames(folder / "frames", names or [f"{i}.png" for i in range(6)])


def _broken(folder: Path) -> Path:
    frames = _frames(folder)
    data = (frames / "3.png").read_bytes()
    (frames / "3.png").write_bytes(data[: len(data) // 2])
    return frames


def _no_picture_inside(folder: Path) -> Path:
    (_frames(folder) / "3.png").write_text("<html>404 not found</html>\n")
    return folder / "frames"


def _sixteen_bits(folder: Path) -> Path:
    frames = _frames(folder)
    Image.fromarray(np.full((48, 64), 20_000, np.uint16)).save(frames / "2.png")
    return frames


def _mixed_sizes(folder: Path) -> Path:
    frames = _frames(folder)
    Image.fromarray(clips.counted_frames(1, height=50, width=60)[0]).save(frames / "4.png")
    return frames


def _empty(folder: Path) -> Path:
    (folder / "frames").mkdir()
    (folder / "frames" / ".DS_Store").touch()
    return folder / "frames"


def _other_file(folder: Path) -> Path:
    (_frames(folder) / "notes.txt").touch()
    return folder / "frames"


def _subfolder(folder: Path) -> Path:
    (_frames(folder) / "more").mkdir()
    return folder / "frames"


def _gap(folder: Path) -> Path:
    return _frames(folder, *(f"{i:05d}.jpg" for i in (1, 2, 3, 5, 6)))


def _same_number(folder: Path) -> Path:
    return _frames(folder, "1.jpg", "2.jpg", "02.jpg")


def _same_name(folder: Path) -> Path:
    return _frames(folder, "a.jpg", "b.jpg", "b.png")


def _one(folder: Path) -> Path:
    return _frames(folder, "1.png")


def _missing(folder: Path) -> Path:
    return folder / "none"


def _video_file(folder: Path) -> Path:
    return clips.write_clip(folder / "clip.mp4", clips.counted_frames(10), 5)


@pytest.mark.parametrize(
    ("make", "error", "named", "says"),
    [
        (_broken, CorruptVideoError, "3.png", "cannot be read as a picture"),
        (_no_picture_inside, CorruptVideoError, "3.png", "cannot be read as a picture"),
        (_sixteen_bits, CorruptVideoError, "2.png", r"more than 8 bits a colour, mode I;16"),
        (_mixed_sizes, CorruptVideoError, "4.png", "is 60 x 50 pixels, 0.png is 64 x 48"),
        (_empty, EmptyVideoError, "", "holds no pictures"),
        (_other_file, CorruptVideoError, "notes.txt", "is no picture"),
        (_subfolder, CorruptVideoError, "more", "is no picture"),
        (_gap, CorruptVideoError, "", "pictures are missing: after 00003.jpg comes 00005.jpg, elsewhere the step is 1"),
        (_same_number, CorruptVideoError, "02.jpg|2.jpg", "has the same place in the order as"),
        (_same_name, CorruptVideoError, "b.jpg|b.png", "has the same place in the order as"),
        (_one, TooFewFramesError, "", "has one frame"),
        (_missing, MissingVideoError, "", "No such file"),
        (_video_file, MissingVideoError, "", "is a file, while frames_fps speaks of a folder"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_every_bad_folder_has_its_error(
    tmp_path: Path, make: Callable[[Path], Path], error: type[VideoError], named: str, says: str
) -> None:
    path = make(tmp_path)
    with pytest.raises(error, match=says) as raised:
        read_video(VideoSource(str(path), frames_fps=3.0), KeepAll(), EVERY_FRAME)
    message = str(raised.value)
    assert type(raised.value) is error
    assert message.startswith(tuple(f"{path / name if name else path}: " for name in named.split("|")))
    assert "; " in message
    assert "\n" not in message
    assert str(pickle.loads(pickle.dumps(raised.value))) == message


def test_a_folder_without_a_rate_asks_for_it(tmp_path: Path) -> None:
    with pytest.raises(MissingVideoError, match=r"is a folder; .*\(frames_fps\)"):
        read_video(_frames(tmp_path), KeepAll(), EVERY_FRAME)


def test_a_clip_behind_the_last_picture(tmp_path: Path) -> None:
    with pytest.raises(ClipError, match=r"the clip \[2, 3\] s starts behind the video's 2\.00 s"):
        indices_of(_frames(tmp_path), start=2.0, end=3.0)


def test_messages_say_what_is_a_folder() -> None:
    question = VideoQA("id", VideoSource("frames", 1.0, 2.0, 3.0), "?", "yes", "word")
    assert video_sources(build_messages(question)) == [VideoSource("frames", 1.0, 2.0, 3.0)]
