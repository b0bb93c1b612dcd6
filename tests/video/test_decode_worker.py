"""Videos decoded in another process: the same frames; what hangs, crashes or raises costs one file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from recipes.tiny_policy.build import build_policy

from appo.rollout.generation import VideoCache
from appo.types import VideoSource
from appo.video import decode_worker as decoder_module
from appo.video import reader as video
from appo.video.decode_worker import Decoder
from appo.video.frame_cache import FrameCache
from appo.video.reader import CorruptVideoError, FrameSampling, MissingVideoError, read_video
from tests.support import clips
from tests.support.stand_ins import own_process, stuck_decode_frames, unguarded

SAMPLING = FrameSampling(4, 8, 4)
FAR = Decoder(60.0)


@pytest.fixture(scope="module")
def processor():
    return build_policy(0)[1].video_processor


@pytest.fixture
def source(tmp_path: Path) -> VideoSource:
    return VideoSource(str(clips.write_clip(tmp_path / "a.mp4", clips.counted_frames(20), 10)))


@pytest.mark.parametrize("room", [1 << 40, 0])
def test_frames_are_those_of_this_process_with_and_without_shared_memory(source, processor, monkeypatch, room) -> None:
    monkeypatch.setattr(decoder_module, "_fits", lambda size: size <= room)
    near, far = read_video(source, processor, SAMPLING), read_video(source, processor, SAMPLING, FAR)
    np.testing.assert_array_equal(near.frames_THWC, far.frames_THWC)
    assert (near.timestamps_T, near.fps, near.frame_indices) == (far.timestamps_T, far.fps, far.frame_indices)
    assert decoder_module._unshare(decoder_module._share(near.frames_THWC)) is not None


def test_clips_folders_and_the_cache_go_the_same_way(source, processor, tmp_path) -> None:
    clip = VideoSource(source.path, 0.5, 1.5)
    expected = read_video(clip, processor, SAMPLING)
    cached = VideoCache(processor, SAMPLING, FrameCache(tmp_path / "cache"), FAR)
    np.testing.assert_array_equal(cached.read(clip).frames_THWC, expected.frames_THWC)
    assert (cached.decoded, cached.hits) == (1, 0)


def test_one_process_serves_all_and_it_is_another(source) -> None:
    assert FAR(own_process, source) == Decoder(5.0)(own_process, source) != os.getpid()


def test_errors_come_back_as_they_are(tmp_path, processor) -> None:
    with pytest.raises(MissingVideoError) as near:
        read_video(str(tmp_path / "no.mp4"), processor, SAMPLING)
    with pytest.raises(MissingVideoError) as far:
        read_video(str(tmp_path / "no.mp4"), processor, SAMPLING, FAR)
    assert str(near.value) == str(far.value)


@pytest.mark.parametrize(("sign", "message"), [("hang", "did not end within 1 s"), ("crash", "exit code -11")])
def test_a_decoder_that_hangs_or_crashes_is_given_up_and_the_next_file_is_read(
    source, processor, monkeypatch, sign, message
) -> None:
    monkeypatch.setattr(video, "decode_frames", stuck_decode_frames)
    marker = Path(source.path).with_suffix(f".{sign}")
    marker.touch()
    with pytest.raises(CorruptVideoError, match=message) as error:
        read_video(source, processor, SAMPLING, Decoder(1.0))
    assert source.path in str(error.value)
    asked = Path(source.path).with_suffix(".asked").read_text().split()
    assert len(asked) == (1 if sign == "hang" else 2), "a process that ended is given one more chance"
    for number in asked:
        with pytest.raises(ProcessLookupError):
            os.kill(int(number), 0)
    marker.unlink()
    assert read_video(source, processor, SAMPLING, FAR).frames_THWC.shape[0] == 8


def test_a_process_that_was_told_to_end_is_no_fault_of_the_file(source, processor) -> None:
    """A scheduler that stops a job tells all of its processes; the trainer wants to end its step first."""
    os.kill(FAR(own_process, source), signal.SIGTERM)
    assert read_video(source, processor, SAMPLING, FAR).frames_THWC.shape[0] == 8


def test_a_script_without_a_guard_is_not_run_twice(tmp_path) -> None:
    """What multiprocessing does to a main module that does all its work at the top."""
    script = tmp_path / "unguarded.py"
    script.write_text(
        "from appo.video.decode_worker import Decoder\nfrom appo.types import VideoSource\n"
        "from tests.support.stand_ins import unguarded\n"
        "print('begun', Decoder(60.0)(unguarded, VideoSource('a.mp4')))\n"
    )
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "begun {'main': None, 'torch': False}\n", done.stderr[-2000:]
    assert unguarded(None)["torch"] is True, "the question can be answered otherwise"
