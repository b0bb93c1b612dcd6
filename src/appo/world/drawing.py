"""A scene as pixels, in a few milliseconds a clip, and as a small H.264 file."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from appo.world.world import MAX_SECONDS, Scene

Frames = NDArray[np.uint8]
Floats = NDArray[np.float32]

WIDTH = 112  # pixels, square; the model's processor halves it, and H.264 keeps chroma at half size
FPS = 4  # of the file; the model samples 2 per second, so both of a second's frames show its event
CLOCK_HEIGHT = 7
# One thread, no B-frames: reproducible bytes, cheap to decode. Quality 18 keeps colours within a few levels.
X264 = {"preset": "ultrafast", "crf": "18", "threads": "1"}

# Far apart in hue or lightness, because 4:2:0 video keeps one colour sample for four pixels.
RGB = {
    "red": (225, 35, 40),
    "green": (35, 165, 50),
    "blue": (45, 75, 235),
    "yellow": (250, 230, 40),
    "pink": (255, 130, 205),
    "cyan": (60, 225, 230),
    "orange": (250, 135, 15),
    "purple": (135, 40, 180),
}


def render(scene: Scene) -> Frames:
    """Draw all frames of a scene, uint8 (seconds * FPS, WIDTH, WIDTH, 3)."""
    rng = np.random.default_rng(scene.pixel_seed)
    frames = np.repeat(background(scene.texture, rng)[None], scene.seconds * FPS, axis=0)
    if scene.noise:
        _add_noise(frames, scene.noise, rng)
    for number, frame in enumerate(frames):
        for distractor in scene.distractors:
            x, y = distractor.position(number / FPS)
            mask = glyph(distractor.shape, 20)
            space = WIDTH - 20
            _blend(frame, mask, round(x * space), round(y * (space - CLOCK_HEIGHT)), RGB[distractor.colour])
    for event in scene.events:
        size = 38 + 2 * round(3 * event.size)
        slack = WIDTH // 2 - size
        left = (event.cell % 2) * WIDTH // 2 + round((event.dx + 1) / 2 * slack)
        top = (event.cell // 2) * WIDTH // 2 + round((event.dy + 1) / 2 * (slack - CLOCK_HEIGHT))
        for frame in frames[event.second * FPS : (event.second + 1) * FPS]:
            _blend(frame, glyph(event.shape, size), left, top, RGB[event.colour])
    _draw_clock(frames)
    return frames


@lru_cache(maxsize=256)
def glyph(shape: str, size: int) -> Floats:
    """Coverage of a shape, float32 (size, size, 1) in [0, 1], smoothed by 4 x 4 samples a pixel."""
    axis = (np.arange(size * 4) + 0.5) / (size * 2) - 1
    x, y = np.meshgrid(axis, axis)
    inside = np.asarray(_inside(shape, x, y), dtype=np.float32)
    coverage: Floats = inside.reshape(size, 4, size, 4).mean(axis=(1, 3))[..., None]
    return coverage


def background(texture: str, rng: np.random.Generator) -> Frames:
    """A muted, dark background, uint8 (WIDTH, WIDTH, 3), so that saturated glyphs stand out."""
    grey = rng.uniform(45, 95)
    low = grey + rng.uniform(-14, 14, 3)
    high = low + rng.uniform(16, 34)
    blend = _pattern(texture, rng)[..., None]
    return np.clip(low + (high - low) * blend, 0, 255).astype(np.uint8)


def _pattern(texture: str, rng: np.random.Generator) -> Floats:
    y, x = np.mgrid[0:WIDTH, 0:WIDTH] / WIDTH
    angle, phase, scale = rng.uniform(0, np.pi), rng.uniform(0, 1), rng.uniform(3, 7)
    along = np.cos(angle) * x + np.sin(angle) * y
    across = np.cos(angle) * y - np.sin(angle) * x
    if texture == "plain":
        field = np.full_like(x, phase)
    elif texture == "gradient":
        field = (along - along.min()) / (along.max() - along.min())
    elif texture == "stripes":
        field = (np.floor(along * scale + phase) % 2).astype(float)
    elif texture == "checks":
        field = ((np.floor(x * scale + phase) + np.floor(y * scale + phase)) % 2).astype(float)
    elif texture == "clouds":
        field = _clouds(rng)
    elif texture == "waves":
        bend = 0.35 * np.sin(4 * np.pi * across + phase)
        field = 0.5 + 0.5 * np.sin(2 * np.pi * (along * scale + bend))
    elif texture == "rays":
        field = 0.5 + 0.5 * np.sign(np.sin(np.arctan2(y - phase, x - 0.5) * round(2 * scale)))
    else:
        raise ValueError(f"unknown texture {texture!r}")
    return np.asarray(field, dtype=np.float32)


def _clouds(rng: np.random.Generator) -> Floats:
    coarse = rng.random((8, 8), dtype=np.float32)
    at = np.linspace(0, 6.99, WIDTH)
    i = at.astype(int)
    t = (at - i).astype(np.float32)
    rows = coarse[i] * (1 - t)[:, None] + coarse[i + 1] * t[:, None]
    field: Floats = rows[:, i] * (1 - t) + rows[:, i + 1] * t
    return field


def _inside(shape: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> Any:
    """Which points of [-1, 1]² (y down) belong to a shape, as booleans of the same form."""
    ax, ay = np.abs(x), np.abs(y)
    radius = np.hypot(x, y)
    if shape == "square":
        return np.maximum(ax, ay) < 0.78
    if shape == "diamond":
        return ax * 1.25 + ay < 0.98
    if shape == "cross":
        return (np.minimum(ax, ay) < 0.27) & (np.maximum(ax, ay) < 0.95)
    if shape == "triangle":
        return (ax < (y + 0.9) / 1.7 * 0.95) & (y < 0.8)
    if shape == "star":
        turn = (np.arctan2(x, -y) / (2 * np.pi) * 5) % 1
        return radius < 0.36 + 0.62 * np.abs(2 * turn - 1) ** 1.2
    if shape == "heart":
        u, v = x * 1.25, 0.15 - y * 1.2
        return (u**2 + v**2 - 0.9) ** 3 < u**2 * v**3
    if shape == "moon":
        return (radius < 0.95) & (np.hypot(x - 0.42, y + 0.1) > 0.72)
    if shape == "arrow":
        return ((ay < 0.24) & (x > -0.95) & (x < 0.1)) | ((x >= 0.05) & (ay < 0.95 * (0.97 - x)))
    if shape == "ball":
        return radius < 0.9
    if shape == "ring":
        return (radius < 0.97) & (radius > 0.5)
    if shape == "bar":
        return (ay < 0.34) & (ax < 0.97)
    raise ValueError(f"unknown shape {shape!r}")


def _blend(frame: Frames, mask: Floats, left: int, top: int, rgb: tuple[int, int, int]) -> None:
    size = mask.shape[0]
    patch = frame[top : top + size, left : left + size]
    patch[...] = patch + mask * (np.array(rgb, dtype=np.float32) - patch)


def _add_noise(frames: Frames, noise: float, rng: np.random.Generator) -> None:
    """One noise tile, moved about once a second: costs one draw and keeps the files small."""
    tile = np.round(rng.normal(0, noise, (WIDTH, WIDTH, 3))).astype(np.int16)
    for start in range(0, len(frames), FPS):
        shifted = np.roll(tile, tuple(rng.integers(0, WIDTH, 2)), axis=(0, 1))
        frames[start : start + FPS] = np.clip(frames[start] + shifted, 0, 255)


def _draw_clock(frames: Frames) -> None:
    """One white segment along the bottom edge for every second begun."""
    top = WIDTH - CLOCK_HEIGHT + 1
    frames[:, top:] = 20
    for second in range(len(frames) // FPS):
        left = round(second * WIDTH / MAX_SECONDS)
        right = round((second + 1) * WIDTH / MAX_SECONDS) - 1
        frames[second * FPS :, top + 1 :, left + 1 : right + 1] = 245


def encode(frames: Frames) -> bytes:
    """Frames, uint8 (T, H, W, 3), as the bytes of an H.264 mp4 (yuv420p) of `FPS` frames per second."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=FPS, options=X264)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def decode(data: bytes, every: int = 1) -> Frames:
    """Every `every`-th frame of an mp4 file's bytes, uint8 (T, H, W, 3)."""
    with av.open(io.BytesIO(data)) as container:
        # Starting decoder threads costs more than they save on such small frames.
        container.streams.video[0].codec_context.thread_count = 1
        frames = enumerate(container.decode(video=0))
        return np.stack([frame.to_ndarray(format="rgb24") for number, frame in frames if number % every == 0])
