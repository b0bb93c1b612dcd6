"""The frames of a group as one small picture, for pages on machines without the videos.

Shape suffixes: T sampled frames, H height, W width, C = 3 colours; F frames of the language model.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image

from appo.video.frame_sampling import SampledVideo

TILE = (128, 96)  # pixels of a frame at most (not in the paper: a page of 200 groups stays small)
WIDEST = 16_000  # pixels; WebP ends at 16383
QUALITY = 62  # of WebP, 0 to 100 (not in the paper)


def filmstrip(videos: Sequence[SampledVideo], merged: int) -> bytes:
    """The frames of the language model, side by side, as a WebP picture F tiles wide; b"" if there is none.

    All tiles have the size of the first; other frames are fitted into it.

    Args:
        videos: the sampled videos of one prompt, in order.
        merged: sampled frames that the model merges into one of its own (temporal_patch_size); the first is used.
    """
    frames = [frame_HWC for video in videos for frame_HWC in video.frames_THWC[::merged]]
    if not frames:
        return b""
    height, width = frames[0].shape[:2]
    scale = min(TILE[0] / width, TILE[1] / height, WIDEST / (len(frames) * width), 1.0)
    tile = max(1, round(width * scale)), max(1, round(height * scale))
    strip = Image.new("RGB", (tile[0] * len(frames), tile[1]))
    for number, frame_HWC in enumerate(frames):
        picture = Image.fromarray(frame_HWC)
        picture.thumbnail(tile, Image.Resampling.LANCZOS, reducing_gap=2.0)
        left, top = ((space - size) // 2 for space, size in zip(tile, picture.size, strict=True))
        strip.paste(picture, (number * tile[0] + left, top))
    buffer = io.BytesIO()
    strip.save(buffer, "WEBP", quality=QUALITY, method=4)
    return buffer.getvalue()
