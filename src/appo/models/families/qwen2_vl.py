"""Qwen2-VL: rotary positions in time, height and width; what follows a video stands behind its last frame in time.

transformers 5 (5.17 to 5.23, at least) puts it behind the larger side of a frame instead, however long the video is,
while its own generation goes on behind the last frame. So a policy would read its prompts at positions its weights have
never seen, and be scored at other positions than it was sampled at. vLLM and transformers 4 have the rule below.

Shape suffixes: B rows, L positions of a row (padded), n of them that are not padding, P prompt tokens.
"""

from __future__ import annotations

import inspect
from itertools import groupby
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor

from appo.models.families.base import Family
from appo.models.prompt import Features, Prompt

_RULE = "get_rope_index"


class Qwen2VL(Family):
    """Qwen2-VL, and what Qwen2.5-VL and Qwen3-VL have in common with it."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl",)
    vllm = True

    def prepare(self) -> None:
        """Have the model number its positions as it was pre-trained; where they are right already, nothing changes."""
        inner = self.base.base_model
        if _RULE not in vars(inner):
            setattr(inner, _RULE, MethodType(_rope_index, inner))

    def positions(self, prompt: Prompt) -> Tensor:
        """int64 (3, 1, P), by the model's own ``get_rope_index``."""
        if prompt.types_1P is None:
            return super().positions(prompt).expand(3, 1, -1)
        self.prepare()
        grids = {"image_grid_thw": prompt.image_grid_thw, "video_grid_thw": prompt.video_grid_thw}
        known = {
            key: value
            for key, value in {**grids, "second_per_grid_ts": prompt.second_per_grid_ts}.items()
            if value is not None
        }
        positions_31P: Tensor = self.base.base_model.get_rope_index(
            input_ids=prompt.ids_1P, mm_token_type_ids=prompt.types_1P, **known
        )[0]
        return positions_31P

    def generation_positions(self, mask_BP: Tensor) -> Tensor | None:
        """None: the model's forward calls ``get_rope_index``, and remembers where each response goes on."""

    def run_on_blank_pixels(self) -> Tensor:
        """One pass of the tower on the smallest picture there is; a float scalar that depends on all its parameters."""
        vision, merged = self.config.vision_config, self.config.vision_config.spatial_merge_size
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        device = next(self.tower.parameters()).device
        pixels = torch.zeros(merged**2, values, device=device)
        grid = torch.tensor([[1, merged, merged]], device=device)
        features = Features.of(self.base.base_model.get_image_features(pixels, grid, return_dict=True))
        parts = [*features.tokens, *(part for layer in features.deepstack for part in layer)]
        return torch.stack([part.float().sum() for part in parts]).sum()


def _rope_index(inner: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """transformers' ``get_rope_index``, each run of text or vision moved behind all that precedes it."""
    own_rule = getattr(type(inner), _RULE)
    given = inspect.signature(own_rule).bind(inner, *args, **kwargs).arguments
    positions_3BL, _ = own_rule(inner, *args, **kwargs)
    ids_BL, types_BL, mask_BL = given["input_ids"], given["mm_token_type_ids"], given.get("attention_mask")
    kept_BL = torch.ones_like(ids_BL, dtype=torch.bool) if mask_BL is None else mask_BL.bool()
    deltas = []
    for row, kept_L in enumerate(kept_BL):
        positions_3n, end = in_sequence(positions_3BL[:, row, kept_L], types_BL[row, kept_L].tolist())
        positions_3BL[:, row, kept_L] = positions_3n
        deltas.append(end - positions_3n.shape[1])
    return positions_3BL, torch.tensor(deltas, device=ids_BL.device)[:, None]


def in_sequence(positions_3n: Tensor, types_n: list[int]) -> tuple[Tensor, int]:
    """Move each run of one modality so that it begins right behind the largest position before it.

    Args:
        positions_3n: int64 (3, n), time, height and width of each token.
        types_n: modality of each token: 0 text, 1 image, 2 video.

    Returns:
        The moved positions, and the position that comes next.
    """
    moved_3n, start, end = positions_3n.clone(), 0, 0
    for _, run in groupby(types_n):
        tokens = slice(start, start + len(list(run)))
        moved_3n[:, tokens] += end - positions_3n[:, tokens].min()
        start, end = tokens.stop, int(moved_3n[:, tokens].max()) + 1
    return moved_3n, end
