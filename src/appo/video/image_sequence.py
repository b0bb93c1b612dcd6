"""A folder of pictures, taken of a video at an even rate, in the order of the numbers in their names.

Shape suffixes: T wanted frames, H height, W width, C = 3 colours (RGB).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from appo.video.frame_sampling import CorruptVideoError, EmptyVideoError, MissingVideoError, Timeline, TooFewFramesError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_HIDDEN = ("thumbs.db", "desktop.ini")  # written by systems, as are files whose names start with a point
_NUMBER = re.compile(r"(\d+)")


def list_pictures(folder: Path) -> list[Path]:
    """The pictures of a folder in order: frame10 follows frame9. Hidden files are left out, no picture is opened.

    Raises:
        VideoError: there are no pictures, or something else too, or their names leave the order or a gap open.
    """
    try:
        found = [path for path in folder.iterdir() if path.name[0] != "." and path.name.lower() not in _HIDDEN]
    except OSError as error:
        reason = error.strerror or error
        raise MissingVideoError(str(folder), f"cannot be listed ({reason})", "check the folder's rights") from error
    for path in found:
        if path.suffix.lower() not in SUFFIXES:
            known = ", ".join(SUFFIXES)
            raise CorruptVideoError(str(path), f"is no picture ({known}) in a folder of frames", "move it elsewhere")
    if not found:
        raise EmptyVideoError(str(folder), "holds no pictures", "extract the frames again, or check the path")
    pictures = sorted(found, key=lambda path: _order(path.stem))
    _check_order(pictures)
    return pictures


def _order(stem: str) -> list[tuple[str, int]]:
    """Words and numbers in turn, each number compared as one: "cam2_f10" is [("cam", 2), ("_f", 10), ("", 0)]."""
    words = _NUMBER.split(stem)
    return list(zip(words[::2], [*map(int, words[1::2]), 0], strict=True))


def _check_order(pictures: Sequence[Path]) -> None:
    """Refuse two pictures of one number, and gaps in an even numbering."""
    for before, after in pairwise(pictures):
        if _order(before.stem) == _order(after.stem):
            raise CorruptVideoError(str(after), f"has the same place in the order as {before.name}", "keep one of both")
    numbers = [_NUMBER.findall(path.stem) for path in pictures]
    if len({_NUMBER.sub("#", path.stem) for path in pictures}) > 1 or any(len(found) != 1 for found in numbers):
        return  # with several numbers, or none, a gap is not known
    values = [int(found[0]) for found in numbers]
    steps = [after - before for before, after in pairwise(values)]
    for index, step in enumerate(steps):
        if step != min(steps):
            place = f"after {pictures[index].name} comes {pictures[index + 1].name}, elsewhere the step is {min(steps)}"
            raise CorruptVideoError(str(pictures[0].parent), f"pictures are missing: {place}", "extract them again")


def folder_timeline(folder: Path, pictures: Sequence[Path], fps: float) -> Timeline:
    """The time of each picture. Raises TooFewFramesError where there is but one."""
    if len(pictures) < 2:
        raise TooFewFramesError(str(folder), "has one frame", "use at least 2 frames")
    return Timeline([i / fps for i in range(len(pictures))], 1 / fps, fps)


def read_pictures(pictures: Sequence[Path]) -> npt.NDArray[np.uint8]:
    """Pictures as uint8 (T, H, W, 3), turned upright.

    Raises:
        CorruptVideoError: one cannot be read, or is of another size than the first.
    """
    frames: list[npt.NDArray[np.uint8]] = []
    for path in pictures:
        frame_HWC = _upright_rgb(path)
        if frames and frame_HWC.shape != frames[0].shape:
            (height, width), (tall, wide) = frame_HWC.shape[:2], frames[0].shape[:2]
            problem = f"is {width} x {height} pixels, {pictures[0].name} is {wide} x {tall}"
            raise CorruptVideoError(str(path), problem, "give all frames one size")
        frames.append(frame_HWC)
    return np.stack(frames)


def _upright_rgb(path: Path) -> npt.NDArray[np.uint8]:
    """One picture as uint8 (H, W, 3), all of it read."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            if picture.mode[0] in "IF":  # Pillow would cut brightness off at 255: white pictures
                raise ValueError(f"more than 8 bits a colour, mode {picture.mode}")
            return np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error).replace(str(path), "it").splitlines()[0] if str(error) else type(error).__name__
        problem = f"cannot be read as a picture ({reason})"
        raise CorruptVideoError(str(path), problem, "extract this frame again") from error
