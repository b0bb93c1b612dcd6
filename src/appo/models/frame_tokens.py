"""Input ids + grid sizes, or runs of placeholders -> which input positions are which video frame.

Shape suffixes: B rows, L input positions, F frames as the language model sees them.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from appo.types import FrameSpans


def frame_spans(
    input_ids_L: Tensor, video_grid_thw: Tensor | None, *, video_token_id: int, merge_size: int
) -> FrameSpans:
    """Number the video tokens of one row by the frame (temporal patch) they belong to. Source: paper step 1.

    The placeholders of a video stand in the order time, height, width; text may stand between frames (Qwen3-VL
    writes a timestamp before each), so only their order counts, not their adjacency.

    Args:
        input_ids_L: int64 (L,), one row of processor output, placeholders expanded.
        video_grid_thw: int64 (videos, 3), patches in time, height and width of each video; None: no video.
        video_token_id: id of the video placeholder.
        merge_size: spatial patches merged into one token, per side.

    Raises:
        ValueError: the number of placeholders is not what the grids say.
    """
    grids = [] if video_grid_thw is None else [tuple(grid) for grid in video_grid_thw.tolist()]
    tokens_per_frame = [height * width // merge_size**2 for _, height, width in grids]
    frames_per_video = tuple(frames for frames, _, _ in grids)
    expected = sum(frames * tokens for frames, tokens in zip(frames_per_video, tokens_per_frame, strict=True))
    is_video_L = input_ids_L == video_token_id
    found = int(is_video_L.sum())
    if found != expected:
        raise ValueError(
            f"the prompt holds {found} video placeholder tokens but video_grid_thw {grids} asks for {expected}: "
            "pass the ids and grids of the same processor call, for one row"
        )
    frame_L = torch.full_like(input_ids_L, -1)
    frame_L[is_video_L] = _frame_of_each_token(frames_per_video, tokens_per_frame).to(frame_L)
    return FrameSpans(frame_L=frame_L, frames_per_video=frames_per_video)


def _frame_of_each_token(frames_per_video: tuple[int, ...], tokens_per_frame: list[int]) -> Tensor:
    """(video tokens,) int64: 0 0 .. 1 1 .. over all videos, each with its own number of tokens a frame."""
    counts = [tokens for frames, tokens in zip(frames_per_video, tokens_per_frame, strict=True) for _ in range(frames)]
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.long))


def spans_of_runs(is_vision_L: Tensor, video_spans_V3: Tensor) -> FrameSpans:
    """The same by runs of placeholders, for processors without grids. Source: paper step 1.

    In the tokens that stand for a video, each run is a frame; or one run is all frames, of equally many tokens, with at
    most one token (a newline) behind them that belongs to none.

    Args:
        is_vision_L: bool (L,), the placeholders of one row, expanded.
        video_spans_V3: int64 (videos, 3), where each video starts and ends, and its frames.

    Raises:
        ValueError: a video's placeholders are neither.
    """
    frame_L = torch.full(is_vision_L.shape, -1, device=is_vision_L.device)
    frames_per_video: list[int] = []
    for start, end, frames in video_spans_V3.tolist():
        edges = torch.nn.functional.pad(is_vision_L[start:end].int(), (1, 1)).diff().nonzero()[:, 0] + start
        runs = [(first, stop) for first, stop in edges.view(-1, 2).tolist()]
        tokens, rest = divmod(runs[0][1] - runs[0][0], frames) if len(runs) == 1 else (0, 0)
        if tokens and rest <= 1:
            runs = [(runs[0][0] + frame * tokens, runs[0][0] + (frame + 1) * tokens) for frame in range(frames)]
        if len(runs) != frames:
            lengths = [stop - first for first, stop in runs]
            raise ValueError(f"a video of {frames} frames stands as runs of {lengths} tokens: which are which frame?")
        for frame, (first, stop) in enumerate(runs, start=sum(frames_per_video)):
            frame_L[first:stop] = frame
        frames_per_video.append(frames)
    return FrameSpans(frame_L, tuple(frames_per_video))


def frame_pool(frame_BL: Tensor, frames: int) -> Tensor:
    """Matrix that averages per-token attention over the tokens of each frame.

    Args:
        frame_BL: int64 (B, L), frame index of each position, -1 where none.
        frames: F.

    Returns:
        float32 (B, L, F): 1 / (tokens of frame f) at its tokens, 0 elsewhere.
    """
    belongs_BLF = frame_BL[..., None] == torch.arange(frames, device=frame_BL.device)
    counts_BF = belongs_BLF.sum(dim=1)
    return belongs_BLF / counts_BF.clamp(min=1)[:, None]


def check_time_advances(position_ids_3L: Tensor, spans: FrameSpans) -> None:
    """Assert that consecutive frames of a video have growing temporal positions. Not in the paper.

    With the fps metadata lost, processors fall back to a guess and every frame can land on one temporal position:
    the model then sees a pile of pictures instead of a video, without any error.

    Args:
        position_ids_3L: int64 (3, L), M-RoPE positions of one row from the model's ``get_rope_index``.
        spans: frames of the same row.

    Raises:
        ValueError: two consecutive frames of one video share a temporal position.
    """
    first_F = [int((spans.frame_L == frame).nonzero()[0]) for frame in range(spans.frames)]
    time_F = position_ids_3L[0, first_F].tolist()
    start = 0
    for video, frames in enumerate(spans.frames_per_video):
        times = time_F[start : start + frames]
        if any(later <= earlier for earlier, later in pairwise(times)):
            raise ValueError(
                f"video {video} of the prompt has temporal positions {times}, which do not grow from frame to frame: "
                "pass the video's true fps as video_metadata, or sample fewer frames a second"
            )
        start += frames
