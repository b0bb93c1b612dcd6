"""A clip is its frames and no others, read as a video of its own. Folders of frames: test_frame_folders.py."""

from __future__ import annotations

import math
import pickle
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recipes.tiny_policy.build import build_policy
from transformers import Qwen3VLProcessor, Qwen3VLVideoProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.video_utils import VideoMetadata

from appo.data import load
from appo.data.table import PART
from appo.rewards.templates import build_messages
from appo.rollout.generation import VideoCache, encode_prompt, video_sources
from appo.types import VideoQA, VideoSource
from appo.video.frame_sampling import Timeline
from appo.video.pyav_reader import read_timeline
from appo.video.reader import ClipError, FrameSampling, TooFewFramesError, VideoError, read_video
from tests.support import clips
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.data_fixtures import perception_test

EVERY_FRAME = FrameSampling(1000.0, 80, 1)


class KeepAll:
    """A processor whose rule keeps every frame."""

    temporal_patch_size = 1

    def sample_frames(self, metadata: VideoMetadata, **_: Any) -> list[int]:
        return list(range(metadata.total_num_frames))


@pytest.fixture(scope="module")
def ten_a_second(tmp_path_factory: pytest.TempPathFactory) -> str:
    """50 frames, 5 seconds."""
    return str(clips.write_clip(tmp_path_factory.mktemp("clip") / "ten.mp4", clips.counted_frames(50), 10))


# --- which frames ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "end", "first", "last", "remark"),
    [
        (1.0, 2.0, 10, 19, "the frame at the end belongs to what follows"),
        (0.0, 0.5, 0, 4, "from the beginning"),
        (None, 0.5, 0, 4, "no start is the beginning"),
        (4.5, None, 45, 49, "no end is the video's"),
        (4.0, 5.0, 40, 49, "the clip ends with the video"),
        (4.0, 99.0, 40, 49, "annotations round: what is behind the end is nothing"),
        (0.96, 1.24, 10, 11, "middles at 1.05 and 1.15 s; those at 0.95 and 1.25 s are outside"),
        (1.04, 1.26, 10, 12, "a start just behind a frame still takes it"),
        (1.06, 1.34, 11, 12, "half a frame behind it no longer"),
        (4.8, 5.0, 48, 49, "the last two"),
        (0.0, 5.0, 0, 49, "all"),
    ],
)
def test_the_frames_of_a_clip(
    ten_a_second: str, start: float | None, end: float | None, first: int, last: int, remark: str
) -> None:
    video = read_video(VideoSource(ten_a_second, start, end), KeepAll(), EVERY_FRAME)
    count = last - first + 1
    assert clips.indices_seen(video.frames_THWC) == tuple(range(first, last + 1)), remark
    assert (video.total_frames, video.fps, video.path) == (count, 10.0, ten_a_second)
    assert video.frame_indices == tuple(range(count))
    assert video.timestamps_T == pytest.approx([i / 10 for i in range(count)])
    assert video.metadata["duration"] == pytest.approx(count / 10)


@pytest.mark.parametrize(
    ("suffix", "codec", "options", "fps"),
    [
        ("mp4", "libx264", {}, clips.NTSC),
        ("mp4", "libx264", {"x264-params": "open-gop=1:keyint=12:bframes=3"}, 24),
        ("mkv", "libx264", {}, clips.NTSC),
        ("ts", "libx264", {}, 25),
        ("avi", "mpeg4", {"b": "20M"}, 30),
        ("h264", "libx264", {}, 25),
    ],
    ids=["mp4", "open-gop", "matroska-in-milliseconds", "transport-stream-not-from-zero", "avi", "bare"],
)
@pytest.mark.parametrize(("first", "stop"), [(0, 20), (13, 14 + 13), (37, 50)])
def test_a_clip_is_a_video_of_its_own(
    tmp_path: Path, suffix: str, codec: str, options: dict[str, str], fps: float, first: int, stop: int
) -> None:
    """Oracle: a file that holds nothing but the clip's frames."""
    sampling, processor = FrameSampling(5, 16, 4), Qwen2VLVideoProcessor()
    if not clips.has_encoder(codec):
        pytest.skip(f"this FFmpeg has no {codec} encoder")
    frames_THWC = clips.counted_frames(50)
    whole = clips.write_clip(tmp_path / f"whole.{suffix}", frames_THWC, fps, codec, options=options)
    alone = clips.write_clip(tmp_path / f"alone.{suffix}", frames_THWC[first:stop], fps, codec, options=options)
    clip = read_video(VideoSource(str(whole), first / float(fps), stop / float(fps)), processor, sampling)
    expected = read_video(alone, processor, sampling)
    assert clips.indices_seen(clip.frames_THWC) == clips.indices_seen(expected.frames_THWC)
    assert clip.metadata == expected.metadata
    assert clip.timestamps_T == pytest.approx(expected.timestamps_T, abs=1.1e-3), "Matroska rounds to milliseconds"


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_video_cut_at_a_frame_never_shows_it(tmp_path: Path, suffix: str) -> None:
    """Perception Test's cup games: the frame at the cut shows the answer. Every cut, though times round."""
    path = str(clips.write_clip(tmp_path / f"cups.{suffix}", clips.counted_frames(70), clips.NTSC))
    timeline = read_timeline(path)
    for cut in range(2, 70):
        shown = timeline.cut(VideoSource(path, 0.0, cut / float(clips.NTSC)))
        assert (shown.first, len(shown.times), shown.fps) == (0, cut, float(clips.NTSC))


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    """Any frame times, in milliseconds: even, uneven, with pauses."""
    durations = draw(st.lists(st.integers(1, 2000), min_size=2, max_size=30))
    times = [sum(durations[:i]) / 1000 for i in range(len(durations))]
    return Timeline(times, durations[-1] / 1000, draw(st.sampled_from([0.0, 1.0, 25.0])))


def frames_in(timeline: Timeline, start: float, end: float) -> list[int]:
    """The rule, frame by frame in exact arithmetic: a border may be off by half a frame, to the nearer side."""
    found = []
    ends = [*timeline.times[1:], timeline.times[-1] + timeline.last_duration]
    for index, (time, following) in enumerate(zip(timeline.times, ends, strict=True)):
        half = min(Fraction(following) - Fraction(time), 1 / Fraction(timeline.fps)) / 2
        if Fraction(start) - half <= Fraction(time) < Fraction(end) - half:
            found.append(index)
    return found


@given(timelines(), st.lists(st.integers(0, 60_000), min_size=2, max_size=8, unique=True))
def test_any_cut_of_any_timeline(timeline: Timeline, cuts: list[int]) -> None:
    """Against the rule in exact arithmetic (borders lie between milliseconds); neighbours share and lose nothing."""
    borders = [cut / 1000 + 0.000123 for cut in sorted(cuts)]
    expected = [frames_in(timeline, start, end) for start, end in pairwise(borders)]
    assert [i for found in expected for i in found] == frames_in(timeline, borders[0], borders[-1])
    for (start, end), indices in zip(pairwise(borders), expected, strict=True):
        try:
            shown = timeline.cut(VideoSource("v", start, end))
        except ClipError:
            assert frames_in(timeline, start, math.ldexp(1, 40)) == []
        except TooFewFramesError:
            assert len(indices) < 2
        else:
            assert [shown.first + i for i in range(len(shown.times))] == indices
            assert list(shown.times) == list(timeline.times[indices[0] : indices[-1] + 1])


def test_a_variable_rate_is_measured_within_the_clip(tmp_path: Path) -> None:
    times = [i * 0.1 for i in range(20)] + [2 + i * 0.5 for i in range(20)]  # 10, then 2 frames a second
    path = str(clips.write_clip(tmp_path / "vfr.mp4", clips.counted_frames(40), 10, times=times))
    fast = read_video(VideoSource(path, 0, 2), KeepAll(), EVERY_FRAME)
    slow = read_video(VideoSource(path, 4, 8), KeepAll(), EVERY_FRAME)
    assert (fast.total_frames, slow.total_frames) == (20, 8)
    assert (fast.fps, slow.fps) == (pytest.approx(10), pytest.approx(2))
    assert slow.timestamps_T == pytest.approx([i * 0.5 for i in range(8)])


# --- what the model is told --------------------------------------------------------------------------------------


def messages_of(path: str, *clip: float) -> list[dict[str, Any]]:
    return build_messages(VideoQA("id", VideoSource(path, *clip), "?", "yes", "word"), instruction="")


def encoded(processor: Any, messages: list[dict[str, Any]], sampling: FrameSampling) -> Any:
    cache = VideoCache(processor.video_processor, sampling)
    return encode_prompt(processor, messages, [cache.read(source) for source in video_sources(messages)]), cache


@pytest.mark.parametrize(
    ("clip", "frames", "seconds"),
    [
        ([1, 3], 4, 1.0),  # 20 frames, 2 s: 4 frames, two merged ones 1 s apart
        ([0, 5], 10, 1.0),  # all 5 s at 2 frames a second
        ([2.5, 3.5], 4, 0.5),  # 1 s: at least 4 frames, so 4 a second, two of them half a second
    ],
)
def test_seconds_per_grid_of_qwen2_5_vl(ten_a_second: str, clip: list[float], frames: int, seconds: float) -> None:
    processor = build_policy(0)[1]
    inputs, _ = encoded(processor, messages_of(ten_a_second, *clip), FrameSampling(2, 16, 4))
    assert inputs.video_grid_thw[0, 0] == frames // 2
    assert inputs.second_per_grid_ts.tolist() == pytest.approx([seconds])


def test_timestamps_of_qwen3_vl_count_from_the_start_of_the_clip(ten_a_second: str) -> None:
    words = build_policy(0)[1]
    size = {"shortest_edge": 4 * 32 * 32, "longest_edge": 8 * 32 * 32}
    processor = Qwen3VLProcessor(
        words.image_processor, byte_tokenizer(), Qwen3VLVideoProcessor(size=size), chat_template=words.chat_template
    )
    inputs, cache = encoded(processor, messages_of(ten_a_second, 3, 5), FrameSampling(2, 16, 4))
    text = processor.tokenizer.decode(inputs.ids_1P[0], skip_special_tokens=True)
    # 20 frames, 4 of them evenly from the first to the last: 0, 6, 13, 19, so (0 + 0.6) / 2 and (1.3 + 1.9) / 2 s.
    assert [part.split(">")[0] for part in text.split("<")[1:]] == ["0.3 seconds", "1.6 seconds"]
    assert cache.timestamps(messages_of(ten_a_second, 3, 5)) == pytest.approx((0.3, 1.6))


def test_a_cup_game_is_shown_up_to_its_cut(tmp_path: Path) -> None:
    """From the annotation to the model: the files' 12 frames at 4 a second, cut at frame 45 of 30 a second."""
    table = load("perception-test", *perception_test(tmp_path, cut=45), split="valid")
    cache = VideoCache(KeepAll(), EVERY_FRAME)
    for row in table:
        (source,) = video_sources(row["prompt"])
        assert clips.indices_seen(cache.read(source).frames_THWC) == (0, 1, 2, 3, 4, 5)
    assert cache.decoded == 1, "both questions are about the same clip"


def test_clips_of_one_file_are_different_videos(ten_a_second: str) -> None:
    cache = VideoCache(build_policy(0)[1].video_processor, FrameSampling(2, 16, 4))
    one, two, all_ = (messages_of(ten_a_second, *clip) for clip in ((0, 2), (2, 5), ()))
    read = [cache.read(video_sources(messages)[0]) for messages in (one, two, all_, one)]
    assert [video.total_frames for video in read] == [20, 30, 50, 20]
    assert read[0] is read[3]
    assert cache.decoded == 3
    assert [len(cache.timestamps(messages)) for messages in (one, two, all_)] == [2, 3, 5]


# --- what is wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "end", "error", "says"),
    [
        (5.0, 6.0, ClipError, r"the clip \[5, 6\] s starts behind the video's 5\.00 s"),
        (4.97, None, ClipError, r"the clip \[4\.97, the end\] s starts behind"),
        (2.0, 2.0, ClipError, "is no time"),
        (3.0, 2.0, ClipError, "is no time"),
        (-1.0, 2.0, ClipError, "is no time"),
        (math.nan, 2.0, ClipError, "is no time"),
        (1.0, math.nan, ClipError, "is no time"),
        (math.inf, None, ClipError, "is no time"),
        (None, 0.0, ClipError, "is no time"),
        (2.0, 2.04, TooFewFramesError, "has no frames"),
        (2.0, 2.1, TooFewFramesError, "has one frame"),
        (4.9, None, TooFewFramesError, "has one frame"),
        (2.0, 2.3, TooFewFramesError, r"the clip \[2, 2\.3\] s has 3 frames, the model merges 4 into one"),
    ],
)
def test_bad_clips_have_their_errors(
    ten_a_second: str, start: float | None, end: float | None, error: type[VideoError], says: str
) -> None:
    with pytest.raises(error, match=says) as raised:
        read_video(VideoSource(ten_a_second, start, end), Qwen2VLVideoProcessor(temporal_patch_size=4), FrameSampling())
    message = str(raised.value)
    assert type(raised.value) is error
    assert message.startswith(f"{ten_a_second}: ")
    assert "; " in message
    assert "\n" not in message
    assert str(pickle.loads(pickle.dumps(raised.value))) == message


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, math.inf])
def test_a_rate_that_is_none(rate: float) -> None:
    with pytest.raises(VideoError, match="frames_fps is"):
        VideoSource("frames", frames_fps=rate)


TIMES = st.floats(0, 100) | st.none()


@given(st.text(min_size=1), TIMES, TIMES, st.floats(0.1, 60) | st.none())
def test_a_source_is_the_part_of_a_message_and_back(path, start, seconds, rate) -> None:
    end = None if seconds is None else (start or 0.0) + seconds + 0.1
    source = VideoSource(path, start, end, rate)
    part = source.to_part()
    assert VideoSource.from_part(part) == source
    assert VideoSource.from_part({key: part.get(key) for key in PART}) == source, "as Arrow gives it back"
    assert None not in part.values()
    assert set(part) <= set(PART)
    assert (source.whole.is_whole, source.whole.path, source.whole.frames_fps) == (True, path, rate)


def test_a_source_in_words() -> None:
    assert str(VideoSource("a.mp4")) == "a.mp4"
    assert str(VideoSource("a.mp4", 1.5, 3)) == "a.mp4, the clip [1.5, 3] s"
    assert str(VideoSource("a.mp4", 1.5)) == "a.mp4, the clip [1.5, the end] s"
    assert str(VideoSource("frames", None, 3.0, 3.0)) == "frames, the clip [0, 3] s, 3 pictures per second"
