"""Real files: the right frames at the true times. What is wrong with bad ones is in test_video_errors.py."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from appo.types import VideoSource
from appo.video.reader import (
    FrameSampling,
    SampledVideo,
    lm_frame_timestamps,
    read_video,
)
from tests.support import clips

FINE = {"b": "20M"}
FAST_VP9 = {"deadline": "realtime", "cpu-used": "8"}


def needs(codec: str) -> Any:
    return pytest.mark.skipif(not clips.has_encoder(codec), reason=f"this FFmpeg has no {codec} encoder")


@pytest.fixture(scope="module")
def processor() -> Qwen2VLVideoProcessor:
    return Qwen2VLVideoProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56}, cap_pixels_per_frame=False)


# --- the right frames at the true times ---------------------------------------------------------------------


@pytest.mark.parametrize("fps", [5, 24, clips.NTSC, 30], ids=["5", "24", "29.97", "30"])
@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [
        pytest.param("mp4", "libx264", {}, id="h264-with-b-frames", marks=needs("libx264")),
        pytest.param("mp4", "mpeg4", FINE, id="mpeg4"),
        pytest.param("avi", "mpeg4", FINE, id="avi"),
        pytest.param("mkv", "libx264", {}, id="matroska-in-milliseconds", marks=needs("libx264")),
        pytest.param("webm", "libvpx-vp9", FAST_VP9, id="vp9", marks=needs("libvpx-vp9")),
        pytest.param("ts", "libx264", {}, id="transport-stream-not-from-zero", marks=needs("libx264")),
    ],
)
def test_frames_times_and_rate_are_those_of_the_file(
    tmp_path: Path,
    processor: Qwen2VLVideoProcessor,
    fps: float | Fraction,
    suffix: str,
    codec: str,
    options: dict[str, str],
) -> None:
    path = clips.write_clip(tmp_path / f"clip.{suffix}", clips.counted_frames(50), fps, codec, options=options)
    video = read_video(path, processor, FrameSampling(fps=2, max_frames=16, min_frames=4))

    assert video.fps == pytest.approx(float(fps), rel=1e-12)  # exactly the container's, not 33 ms rounded
    assert video.total_frames == 50
    assert clips.indices_seen(video.frames_THWC) == video.frame_indices
    assert video.frames_THWC.dtype == np.uint8
    assert video.frames_THWC.shape == (len(video.frame_indices), 48, 64, 3)
    assert video.timestamps_T == pytest.approx([i / float(fps) for i in video.frame_indices], abs=1e-3)
    wanted = {5: 16, 24: 4, 30: 4}.get(math.ceil(fps))  # 2 per second, even, within 4 .. 16
    assert len(video.frame_indices) == wanted


def test_variable_frame_rate_gives_true_times_and_the_mean_rate(
    tmp_path: Path, processor: Qwen2VLVideoProcessor
) -> None:
    times = [i * 0.1 for i in range(20)] + [2 + i * 0.5 for i in range(20)]  # 10, then 2 frames a second
    for suffix in ("mp4", "mkv"):
        path = clips.write_clip(tmp_path / f"vfr.{suffix}", clips.counted_frames(40), 10, times=times)
        video = read_video(path, processor, FrameSampling(fps=1, max_frames=8))
        assert video.timestamps_T == pytest.approx([times[i] for i in video.frame_indices], abs=2e-3)
        assert clips.indices_seen(video.frames_THWC) == video.frame_indices
        assert video.total_frames / video.fps == pytest.approx(11.5, abs=0.6)  # the last frame's length is open


def test_a_rate_the_header_lies_about_is_measured(tmp_path: Path, processor: Qwen2VLVideoProcessor) -> None:
    # An encoder told 30 frames a second while the frames come every quarter of a second.
    times = [i * 0.25 for i in range(24)]
    path = clips.write_clip(tmp_path / "liar.mkv", clips.counted_frames(24), 30, times=times)
    video = read_video(path, processor, FrameSampling())
    assert video.fps == pytest.approx(4, rel=0.02)
    assert len(video.frame_indices) == 12


def test_a_stream_without_times_uses_its_rate(tmp_path: Path, processor: Qwen2VLVideoProcessor) -> None:
    path = clips.write_clip(tmp_path / "bare.h264", clips.counted_frames(40), 25)
    video = read_video(path, processor, FrameSampling(fps=5))
    assert (video.fps, video.total_frames) == (25.0, 40)
    assert clips.indices_seen(video.frames_THWC) == video.frame_indices
    assert video.timestamps_T == pytest.approx([i / 25 for i in video.frame_indices])


def test_frames_before_an_edit_list_are_not_counted(tmp_path: Path, processor: Qwen2VLVideoProcessor) -> None:
    def start_ten_frames_in(packets: list[Any]) -> list[Any]:
        for packet in packets:
            packet.pts, packet.dts = packet.pts - 10, packet.dts - 10
        return packets

    path = clips.write_clip(
        tmp_path / "trimmed.mp4",
        clips.counted_frames(30),
        10,
        options={"bf": "0"},
        container_options={"avoid_negative_ts": "disabled"},
        packet_filter=start_ten_frames_in,
    )
    video = read_video(path, processor, FrameSampling(fps=2))
    assert (video.total_frames, video.fps) == (20, 10.0)
    assert clips.indices_seen(video.frames_THWC) == tuple(i + 10 for i in video.frame_indices)
    assert video.timestamps_T == pytest.approx([i / 10 for i in video.frame_indices])


def test_a_fragmented_file_without_a_frame_count(tmp_path: Path, processor: Qwen2VLVideoProcessor) -> None:
    path = clips.write_clip(
        tmp_path / "fragments.mp4",
        clips.counted_frames(40),
        20,
        options={"g": "10"},
        container_options={"movflags": "frag_keyframe+empty_moov"},
    )
    video = read_video(path, processor, FrameSampling(fps=4))
    assert (video.total_frames, video.fps) == (40, 20.0)
    assert clips.indices_seen(video.frames_THWC) == video.frame_indices
    assert video.timestamps_T[0] == 0


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_pictures_are_turned_upright(tmp_path: Path, processor: Qwen2VLVideoProcessor, rotation: int) -> None:
    frames_THWC = np.full((6, 48, 64, 3), 20, np.uint8)
    frames_THWC[:, :24, :32] = 230  # the top left quarter is bright
    path = clips.write_clip(tmp_path / "turned.mp4", frames_THWC, 10, rotation=rotation)
    video = read_video(path, processor, FrameSampling())
    expected_HWC = np.rot90(frames_THWC[0], rotation // 90)
    assert video.frames_THWC.shape[1:] == expected_HWC.shape
    assert np.abs(video.frames_THWC[0].astype(int) - expected_HWC).mean() < 8
    assert (video.metadata["height"], video.metadata["width"]) == expected_HWC.shape[:2]


@pytest.mark.parametrize(("height", "width"), [(47, 63), (1, 17), (50, 34)])
def test_odd_sizes(tmp_path: Path, processor: Qwen2VLVideoProcessor, height: int, width: int) -> None:
    frames_THWC = clips.counted_frames(10, height=height, width=width)
    path = clips.write_clip(tmp_path / "odd.mkv", frames_THWC, 5, "ffv1", pix_fmt="yuv444p")
    video = read_video(path, processor, FrameSampling())
    assert video.frames_THWC.shape[1:] == (height, width, 3)
    assert clips.indices_seen(video.frames_THWC) == video.frame_indices


def test_colours_are_rgb(tmp_path: Path, processor: Qwen2VLVideoProcessor) -> None:
    frames_THWC = np.zeros((6, 48, 64, 3), np.uint8)
    frames_THWC[..., 0] = 200
    video = read_video(clips.write_clip(tmp_path / "red.mp4", frames_THWC, 10), processor, FrameSampling())
    assert video.frames_THWC.reshape(-1, 3).mean(axis=0) == pytest.approx([200, 0, 0], abs=6)


def test_ways_to_write_a_path(
    tmp_path: Path, processor: Qwen2VLVideoProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = clips.write_clip(tmp_path / "a clip%20é.mp4", clips.counted_frames(10), 5)
    expected = read_video(path, processor, FrameSampling())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "http:x.mp4").write_bytes(path.read_bytes())  # FFmpeg alone would take it for an address
    for spelling in (str(path), path.as_uri(), path.name, "http:x.mp4"):
        video = read_video(spelling, processor, FrameSampling())
        assert video.path == spelling
        np.testing.assert_array_equal(video.frames_THWC, expected.frames_THWC)


# --- the processor's rule and what it makes of our metadata -------------------------------------------------


@pytest.mark.parametrize("frames", [2, 3, 5, 17, 60])
@pytest.mark.parametrize("sampling", [FrameSampling(), FrameSampling(1, 8, 2), FrameSampling(30, 768, 4)])
def test_same_as_letting_the_processor_sample_the_whole_video(
    tmp_path: Path, processor: Qwen2VLVideoProcessor, frames: int, sampling: FrameSampling
) -> None:
    path = clips.write_clip(tmp_path / "clip.mp4", clips.counted_frames(frames), 5)
    video = read_video(path, processor, sampling)
    ours = processor(
        videos=[video.frames_THWC],
        video_metadata=[video.metadata],
        do_sample_frames=False,
        return_metadata=True,
        return_tensors="pt",
    )
    whole_THWC = read_video(path, KeepAll(), FrameSampling(5, 80, 1)).frames_THWC
    theirs = processor(
        videos=[whole_THWC],
        video_metadata=[{"total_num_frames": frames, "fps": 5.0}],
        do_sample_frames=True,
        fps=sampling.fps,
        min_frames=sampling.min_frames,
        max_frames=sampling.max_frames,
        return_metadata=True,
        return_tensors="pt",
    )
    assert tuple(int(i) for i in theirs["video_metadata"][0].frames_indices) == video.frame_indices
    assert ours["video_grid_thw"].tolist() == [[len(video.frame_indices) // 2, 4, 4]]  # 48x64 -> 56x56
    assert ours["video_grid_thw"].equal(theirs["video_grid_thw"])
    assert ours["pixel_values_videos"].equal(theirs["pixel_values_videos"])
    assert ours["video_metadata"][0].sampled_fps == theirs["video_metadata"][0].sampled_fps


class KeepAll:
    """A processor whose rule keeps every frame."""

    def sample_frames(self, metadata: VideoMetadata, **_: Any) -> list[int]:
        return list(range(metadata.total_num_frames))


def test_the_metadata_gives_the_true_sampled_rate(tmp_path: Path, processor: Qwen2VLVideoProcessor) -> None:
    path = clips.write_clip(tmp_path / "clip.mp4", clips.counted_frames(40), 5)
    video = read_video(path, processor, FrameSampling(fps=2))
    assert VideoMetadata(**video.metadata).sampled_fps == pytest.approx(2.0)  # 16 frames of 8 seconds
    assert VideoMetadata(**video.metadata).timestamps == pytest.approx(video.timestamps_T)
    assert video.metadata["duration"] == pytest.approx(8.0)


def test_a_processor_that_keeps_its_bounds_as_attributes(tmp_path: Path) -> None:
    theirs = Qwen3VLVideoProcessor()
    path = clips.write_clip(tmp_path / "clip.mp4", clips.counted_frames(60), 5)
    video = read_video(path, theirs, FrameSampling(fps=4, max_frames=10, min_frames=4))
    assert video.frame_indices == tuple(np.linspace(0, 59, 10).round().astype(int))
    assert theirs.max_frames != 10, "the caller's processor must stay as it was"


def test_a_sampling_that_does_not_fit_the_processor(tmp_path: Path, processor: Qwen2VLVideoProcessor) -> None:
    path = clips.write_clip(tmp_path / "clip.mp4", clips.counted_frames(20), 5)
    with pytest.raises(ValueError, match=r"min_frames=1 must be at least temporal_patch_size=2"):
        read_video(path, processor, FrameSampling(min_frames=1))
    with pytest.raises(ValueError, match=r"KeepAll sampled 20 frames .*max_frames=8"):
        read_video(path, KeepAll(), FrameSampling(max_frames=8))


def test_an_index_past_the_end_is_left_out(processor: Qwen2VLVideoProcessor) -> None:
    """The rule of Qwen2-VL gives 127 indices for 126 of 1165 frames, the last of them past the end."""
    from appo.video.frame_sampling import choose_frames

    metadata = VideoMetadata(total_num_frames=1165, fps=1.0)
    theirs = processor.sample_frames(metadata, fps=1.0, min_frames=4, max_frames=126)
    assert int(theirs[-1]) == 1165, "fixed upstream: the guard can go"
    ours = choose_frames(VideoSource("file"), 1165, 1.0, processor, FrameSampling(1.0, 126))
    assert ours == tuple(theirs.tolist()[:-1])


@pytest.mark.parametrize(
    "bad",
    [{"fps": 0}, {"fps": -1}, {"fps": math.nan}, {"fps": math.inf}, {"min_frames": 0}, {"max_frames": 3}],
)
def test_frame_sampling_refuses_nonsense(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        FrameSampling(**bad)


@pytest.mark.parametrize(
    ("times", "patch", "expected"),
    [
        ((0.0, 1.0, 2.0, 3.0), 2, (0.5, 2.5)),
        ((0.0, 0.5, 4.0), 2, (0.25, 4.0)),  # the processor repeats the last frame
        ((0.0, 1.0, 5.0), 3, (2.0,)),
        ((0.0, 1.0), 1, (0.0, 1.0)),
    ],
)
def test_lm_frame_timestamps(times: tuple[float, ...], patch: int, expected: tuple[float, ...]) -> None:
    frames_THWC = np.zeros((len(times), 2, 2, 3), np.uint8)
    video = SampledVideo("clip", frames_THWC, times, 1.0, len(times), tuple(range(len(times))))
    assert lm_frame_timestamps(video, patch) == expected
