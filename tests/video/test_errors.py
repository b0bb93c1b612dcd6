"""Every bad file has its typed error of one line, and damage never passes for frames."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from appo.video import pyav_reader as decoding
from appo.video.reader import (
    CorruptVideoError,
    EmptyVideoError,
    FrameSampling,
    MissingVideoError,
    NoVideoStreamError,
    TooFewFramesError,
    VideoError,
    ZeroDurationError,
    read_video,
)
from tests.support import clips

FASTSTART = {"movflags": "faststart"}


@pytest.fixture(scope="module")
def processor() -> Qwen2VLVideoProcessor:
    return Qwen2VLVideoProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56}, cap_pixels_per_frame=False)


def _healthy(folder: Path, suffix: str = "mp4", codec: str = "libx264", **options: Any) -> Path:
    return clips.write_clip(folder / f"healthy.{suffix}", clips.noise_frames(40), 20, codec, **options)


def _missing(folder: Path) -> Path:
    return folder / "none.mp4"


def _folder(folder: Path) -> Path:
    return folder


def _empty(folder: Path) -> Path:
    (folder / "empty.mp4").touch()
    return folder / "empty.mp4"


def _random_bytes(folder: Path) -> Path:
    path = folder / "random.mp4"
    path.write_bytes(np.random.default_rng(1).integers(0, 255, 50_000, dtype=np.uint8).tobytes())
    return path


def _text(folder: Path) -> Path:
    path = folder / "page.mp4"
    path.write_text("<html>404 not found</html>\n")
    return path


def _cut_index_last(folder: Path) -> Path:
    return clips.cut_file(folder / "cut.mp4", _healthy(folder), 0.6)


def _cut_index_first(folder: Path) -> Path:
    return clips.cut_file(folder / "cut.mp4", _healthy(folder, container_options=FASTSTART), 0.6)


def _cut_between_packets(folder: Path) -> Path:
    import av

    source = _healthy(folder, container_options=FASTSTART)
    with av.open(str(source)) as container:
        ends = [p.pos + p.size for p in container.demux(video=0) if p.size]
    path = folder / "cut.mp4"
    path.write_bytes(source.read_bytes()[: ends[19]])
    return path


def _cut_matroska(folder: Path) -> Path:
    return clips.cut_file(folder / "cut.mkv", _healthy(folder, "mkv"), 0.6)


def _cut_avi(folder: Path) -> Path:
    return clips.cut_file(folder / "cut.avi", _healthy(folder, "avi", "mpeg4"), 0.6)


def _damaged_much(folder: Path) -> Path:
    return clips.damage_file(folder / "bad.mp4", _healthy(folder, container_options=FASTSTART), 0.4, 0.6)


def _damaged_little(folder: Path) -> Path:
    """The decoder conceals the damage and goes on, but says so."""
    return clips.damage_file(folder / "bad.mp4", _healthy(folder, container_options=FASTSTART), 0.3, 0.305)


def _start_missing(folder: Path) -> Path:
    """The key frame is gone: the packets are counted, but do not all become frames."""
    return clips.write_clip(
        folder / "headless.mp4",
        clips.noise_frames(20),
        10,
        options={"bf": "0", "g": "8", "sc_threshold": "0"},
        packet_filter=lambda packets: packets[1:],
    )


def _sound_m4a(folder: Path) -> Path:
    return clips.write_sound(folder / "sound.m4a")


def _sound_wav(folder: Path) -> Path:
    return clips.write_sound(folder / "sound.wav", "pcm_s16le")


def _sound_with_cover(folder: Path) -> Path:
    return clips.write_sound(folder / "song.flac", "flac", cover_HWC=clips.counted_frames(1)[0])


def _one_frame(folder: Path) -> Path:
    return clips.write_clip(folder / "one.mp4", clips.counted_frames(1), 10)


def _picture(folder: Path) -> Path:
    return clips.write_clip(folder / "one.png", clips.counted_frames(1), 1, "png", pix_fmt="rgb24")


def _no_duration(folder: Path) -> Path:
    times = [i * 1e-6 for i in range(6)]  # Matroska rounds to milliseconds: all the same
    return clips.write_clip(folder / "zero.mkv", clips.counted_frames(6), 10, "ffv1", times=times)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (_missing, MissingVideoError, "No such file"),
        (_folder, MissingVideoError, "is a folder"),
        (_empty, EmptyVideoError, "0 bytes"),
        (_random_bytes, CorruptVideoError, "cannot be decoded"),
        (_text, CorruptVideoError, "cannot be decoded"),
        (_cut_index_last, CorruptVideoError, "cannot be decoded"),
        (_cut_index_first, CorruptVideoError, "is cut off"),
        (_cut_between_packets, CorruptVideoError, "is cut off: 20 of 40 frames are there"),
        (_cut_matroska, CorruptVideoError, "of 2.00 seconds are there"),
        (_cut_avi, CorruptVideoError, "is cut off"),
        (_damaged_much, CorruptVideoError, "is damaged|cannot be decoded"),
        (_damaged_little, CorruptVideoError, "is damaged|cannot be decoded"),
        (_start_missing, CorruptVideoError, "only 12 of 19 frames can be decoded"),
        (_sound_m4a, NoVideoStreamError, "no video stream"),
        (_sound_wav, NoVideoStreamError, "no video stream"),
        (_sound_with_cover, NoVideoStreamError, "no video stream"),
        (_one_frame, TooFewFramesError, "has one frame"),
        (_picture, TooFewFramesError, "has one frame"),
        (_no_duration, ZeroDurationError, "lasts 0 seconds"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_every_bad_file_has_its_error(
    tmp_path: Path,
    processor: Qwen2VLVideoProcessor,
    make: Callable[[Path], Path],
    error: type[VideoError],
    says: str,
) -> None:
    path = make(tmp_path)
    with pytest.raises(error, match=says) as raised:
        read_video(path, processor, FrameSampling(fps=20, max_frames=40))
    message = str(raised.value)
    assert type(raised.value) is error
    assert isinstance(raised.value, ValueError)
    assert message.startswith(f"{path}: "), "names the file"
    assert "; " in message, "and the fix"
    assert "\n" not in message
    assert str(pickle.loads(pickle.dumps(raised.value))) == message, "survives a worker process"


def test_damage_is_seen_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With FFmpeg's threads over frames one time in a hundred it was not; in ten with sixteen threads, as here."""
    path, opened = str(_damaged_little(tmp_path)), decoding._open

    @contextmanager
    def with_many_threads(file: str) -> Iterator[Any]:
        with opened(file) as (container, stream):
            stream.codec_context.thread_count = 16
            yield container, stream

    timeline = decoding.read_timeline(path)
    monkeypatch.setattr(decoding, "_open", with_many_threads)
    for _ in range(100):
        with pytest.raises(CorruptVideoError):
            decoding.decode(path, range(40), timeline)


@pytest.mark.parametrize("address", ["https://example.org/a.mp4", "s3://bucket/a.mp4"])
def test_an_address_is_no_file(processor: Qwen2VLVideoProcessor, address: str) -> None:
    with pytest.raises(MissingVideoError, match="download it and pass the local path"):
        read_video(address, processor, FrameSampling())


def test_a_model_that_merges_more_frames_than_there_are(tmp_path: Path) -> None:
    path = clips.write_clip(tmp_path / "three.mp4", clips.counted_frames(3), 10)
    with pytest.raises(TooFewFramesError, match="has 3 frames, the model merges 4 into one"):
        read_video(path, Qwen2VLVideoProcessor(temporal_patch_size=4), FrameSampling())


def test_the_file_is_closed_again(tmp_path: Path, processor: Qwen2VLVideoProcessor) -> None:
    files = Path("/proc/self/fd")
    if not files.exists():
        pytest.skip("open files are listed on Linux only")
    good, bad = _healthy(tmp_path), _cut_matroska(tmp_path)
    before = len(list(files.iterdir()))
    for _ in range(5):
        read_video(good, processor, FrameSampling())
        with pytest.raises(CorruptVideoError):
            read_video(bad, processor, FrameSampling())
    assert len(list(files.iterdir())) == before


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "libx264"), ("mkv", "libx264"), ("avi", "mpeg4")])
def test_any_damage_gives_true_frames_or_a_typed_error(
    tmp_path: Path, processor: Qwen2VLVideoProcessor, suffix: str, codec: str
) -> None:
    """Noise anywhere in the file, its header included: frames as promised or a `VideoError`, nothing else."""
    source = _healthy(tmp_path, suffix, codec)
    refused: list[str] = []
    for step in range(60):
        path = clips.damage_file(tmp_path / f"damaged.{suffix}", source, step / 60, step / 60 + 0.004)
        try:
            video = read_video(path, processor, FrameSampling(fps=20, max_frames=40))
        except VideoError as error:
            refused.append(str(error))
        else:
            assert len(video.frames_THWC) == len(video.timestamps_T) == len(video.frame_indices)
            assert list(video.timestamps_T) == sorted(video.timestamps_T)
            assert video.fps > 0
    assert len(refused) > 10, "damage must be noticed where the format lets it be"
    assert not any("\n" in message for message in refused)
