"""The cache of sampled frames: what comes out is what would be decoded, whatever happened to file, folder and entry."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from appo.rollout.generation import VideoCache
from appo.types import VideoSource
from appo.video import frame_cache
from appo.video.frame_cache import FrameCache, key_of
from appo.video.reader import FrameSampling, MissingVideoError, SampledVideo, read_video
from tests.support import clips
from tests.support.runs import clips as spotlight_clips
from tests.support.runs import make_trainer, rows_of

SAMPLING = FrameSampling(2, 16, 4)


@pytest.fixture(scope="module")
def processor() -> Qwen2VLVideoProcessor:
    return Qwen2VLVideoProcessor()


def put_clip(folder: Path, **options: Any) -> VideoSource:
    frames_THWC = clips.noise_frames(40, **options)  # noise: what loses anything loses it here
    return VideoSource(str(clips.write_clip(folder / "clip.mp4", frames_THWC, 10)))


def put_folder(folder: Path) -> VideoSource:
    (folder / "frames").mkdir()
    for index, frame_HWC in enumerate(clips.noise_frames(12)):
        Image.fromarray(frame_HWC).save(folder / "frames" / f"{index}.png")
    return VideoSource(str(folder / "frames"), frames_fps=3.0)


def entries(cache: FrameCache) -> list[Path]:
    return [path for path in cache.folder.rglob("*") if path.is_file()]


def same(one: SampledVideo, other: SampledVideo) -> bool:
    return (
        np.array_equal(one.frames_THWC, other.frames_THWC)
        and one.frames_THWC.dtype == other.frames_THWC.dtype == np.uint8
        and (one.path, one.timestamps_T, one.metadata) == (other.path, other.timestamps_T, other.metadata)
    )


@pytest.mark.parametrize("make", [put_clip, put_folder])
@pytest.mark.parametrize("clip", [(None, None), (1.0, 3.0)])
def test_what_comes_out_is_what_was_decoded(tmp_path: Path, processor: Any, make: Any, clip: Any) -> None:
    whole = make(tmp_path)
    source = VideoSource(whole.path, *clip, whole.frames_fps)
    cache = FrameCache(tmp_path / "cache")
    decoded, was_there = cache.read(source, processor, SAMPLING)
    again, was_there_again = FrameCache(tmp_path / "cache").read(source, processor, SAMPLING)
    assert (was_there, was_there_again) == (False, True)
    assert same(decoded, again)
    assert same(decoded, read_video(source, processor, SAMPLING))


@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 40), st.data())
@settings(max_examples=40)
def test_any_frames_survive(frames: int, height: int, width: int, data: st.DataObject) -> None:
    pixels = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 256, (frames, height, width, 3), np.uint8)
    times = tuple(data.draw(st.lists(st.floats(0, 1e4), min_size=frames, max_size=frames)))
    video = SampledVideo("v", pixels, times, data.draw(st.floats(0.1, 240)), 1000, tuple(range(frames)))
    assert same(frame_cache._unpack(frame_cache._pack(video, "{}"), VideoSource("v")), video)


class OtherRule(Qwen2VLVideoProcessor):
    """The same attributes, another class."""


def test_everything_that_decides_is_in_the_key(tmp_path: Path, processor: Any, monkeypatch: Any) -> None:
    source, folder = put_clip(tmp_path), put_folder(tmp_path)
    (tmp_path / "other").mkdir()
    copy = VideoSource(str(clips.write_clip(tmp_path / "other" / "clip.mp4", clips.noise_frames(40), 10)))
    for path in (source.path, copy.path):
        os.utime(path, ns=(10**18, 10**18))
    keys = [
        key_of(source, processor, SAMPLING),
        key_of(copy, processor, SAMPLING),
        key_of(VideoSource(source.path, 0.0, 2.0), processor, SAMPLING),
        key_of(VideoSource(source.path, 0.0, 2.5), processor, SAMPLING),
        key_of(VideoSource(source.path, 1.0), processor, SAMPLING),
        *(key_of(source, processor, FrameSampling(*bounds)) for bounds in ((1, 16, 4), (2, 8, 4), (2, 16, 2))),
        key_of(source, OtherRule(), SAMPLING),
        key_of(source, Qwen2VLVideoProcessor(temporal_patch_size=4), SAMPLING),
        key_of(folder, processor, SAMPLING),
        key_of(VideoSource(folder.path, frames_fps=4.0), processor, SAMPLING),
    ]
    for version in ("transformers.__version__", "av.__version__"):
        with monkeypatch.context() as patch:
            patch.setattr(version, "0.0.1")
            keys.append(key_of(source, processor, SAMPLING))
    os.utime(source.path, ns=(10**18, 10**18 + 1))
    keys.append(key_of(source, processor, SAMPLING))
    os.truncate(Path(folder.path) / "7.png", 100)
    keys.append(key_of(folder, processor, SAMPLING))
    os.remove(Path(folder.path) / "11.png")
    keys.append(key_of(folder, processor, SAMPLING))
    assert len(set(keys)) == len(keys)


def test_spellings_of_one_path_share_an_entry(tmp_path: Path, processor: Any, monkeypatch: Any) -> None:
    source, cache = put_clip(tmp_path), FrameCache(tmp_path / "cache")
    cache.read(source, processor, SAMPLING)
    monkeypatch.chdir(tmp_path)
    for spelling in (Path(source.path).as_uri(), "clip.mp4"):
        video, was_there = cache.read(VideoSource(spelling), processor, SAMPLING)
        assert (was_there, video.path) == (True, spelling)


def test_a_changed_file_is_decoded_again(tmp_path: Path, processor: Any) -> None:
    source, cache = put_clip(tmp_path), FrameCache(tmp_path / "cache")
    before, _ = cache.read(source, processor, SAMPLING)
    clips.write_clip(Path(source.path), clips.counted_frames(40), 10)
    after, was_there = cache.read(source, processor, SAMPLING)
    assert not was_there
    assert clips.indices_seen(after.frames_THWC) == after.frame_indices
    assert not same(before, after)
    os.remove(source.path)
    with pytest.raises(MissingVideoError, match="No such file"):
        cache.read(source, processor, SAMPLING)


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path: Path, processor: Any, monkeypatch: Any) -> None:
    source, cache = put_clip(tmp_path), FrameCache(tmp_path / "cache")

    def read_and_change(*arguments: Any) -> SampledVideo:
        video = read_video(*arguments)
        os.utime(source.path, ns=(1, 1))
        return video

    monkeypatch.setattr(frame_cache, "read_video", read_and_change)
    cache.read(source, processor, SAMPLING)
    assert entries(cache) == []


@pytest.mark.parametrize("place", [0, 16, 40, 200, 0.5, 0.99, -1])
def test_a_damaged_entry_is_decoded_again_and_replaced(tmp_path: Path, processor: Any, place: float) -> None:
    source, cache = put_clip(tmp_path), FrameCache(tmp_path / "cache")
    expected, _ = cache.read(source, processor, SAMPLING)
    (entry,) = entries(cache)
    healthy = entry.read_bytes()
    index = place if isinstance(place, int) else int(place * len(healthy))
    damaged = bytearray(healthy)
    damaged[index] ^= 1
    for content in (bytes(damaged), healthy[:index], b""):
        entry.write_bytes(content)
        video, was_there = cache.read(source, processor, SAMPLING)
        assert not was_there
        assert same(video, expected)
        assert entry.read_bytes() == healthy
        assert cache.read(source, processor, SAMPLING)[1]
    assert entries(cache) == [entry], "nothing unfinished is left"


WRITER = """
import sys
from appo.types import VideoSource
from appo.video.frame_cache import FrameCache
folder, key = sys.argv[1:]
cache = FrameCache(folder)
video = cache._load(key, VideoSource("v"))
for _ in range(40):
    cache._store(key, video)
"""


def test_two_processes_may_write_one_entry_while_others_read_it(tmp_path: Path, processor: Any) -> None:
    source, cache = put_clip(tmp_path), FrameCache(tmp_path / "cache")
    expected, _ = cache.read(source, processor, SAMPLING)
    command = [sys.executable, "-c", WRITER, str(cache.folder), key_of(source, processor, SAMPLING)]
    writers = [subprocess.Popen(command) for _ in range(2)]
    while any(writer.poll() is None for writer in writers):
        video, was_there = cache.read(source, processor, SAMPLING)
        assert was_there, "a reader never sees half an entry"
        assert same(video, expected)
        time.sleep(0.005)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert len(entries(cache)) == 1
    assert cache.read(source, processor, SAMPLING)[1]


def test_threads_share_it(tmp_path: Path, processor: Any) -> None:
    source, cache = put_clip(tmp_path), FrameCache(tmp_path / "cache")
    with ThreadPoolExecutor(4) as pool:
        videos = list(pool.map(lambda _: cache.read(source, processor, SAMPLING)[0], range(8)))
    assert all(same(video, videos[0]) for video in videos)
    assert len(entries(cache)) == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, processor: Any) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file: the cache of frames cannot be made \(.*\); free space, or set another"):
        FrameCache(tmp_path / "file")
    cache = FrameCache(tmp_path / "cache")
    cache.folder.rmdir()
    cache.folder.touch()
    with pytest.raises(OSError, match=r"cache: the cache of frames cannot be written to \(Not a directory\)"):
        cache.read(put_clip(tmp_path), processor, SAMPLING)


def test_frames_too_large_for_a_picture_are_decoded_each_time(tmp_path: Path, processor: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(frame_cache, "LONGEST_SIDE", 63)
    source, cache = put_clip(tmp_path), FrameCache(tmp_path / "cache")
    assert [cache.read(source, processor, SAMPLING)[1] for _ in range(2)] == [False, False]
    assert entries(cache) == []


def test_a_rollout_counts_what_it_decoded_and_what_it_found(tmp_path: Path, processor: Any) -> None:
    source, cache = put_clip(tmp_path), FrameCache(tmp_path / "cache")
    for decoded, hits in ((1, 0), (0, 1)):
        videos = VideoCache(processor, SAMPLING, cache)
        assert videos.read(source) is videos.read(source)
        assert (videos.decoded, videos.hits) == (decoded, hits)


def test_training_takes_its_frames_from_the_cache(tmp_path: Path) -> None:
    """The second run decodes nothing and trains the same policy."""
    table = rows_of(spotlight_clips(tmp_path / "clips"))
    states = []
    for run in ("first", "second"):
        trainer = make_trainer(tmp_path / run, table, frame_cache=str(tmp_path / "cache"), max_steps=2)
        trainer.train()
        states.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
    assert (trainer.encoder.videos.decoded, trainer.encoder.videos.hits > 0) == (0, True)
    assert all((states[0][name] == states[1][name]).all() for name in states[0])
