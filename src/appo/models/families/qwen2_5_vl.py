"""Qwen2.5-VL: as Qwen2-VL, with temporal positions in seconds (``second_per_grid_ts`` of the processor)."""

from __future__ import annotations

from appo.models.families.qwen2_vl import Qwen2VL


class Qwen25VL(Qwen2VL):
    """Qwen2.5-VL. Its ``get_rope_index`` scales time by the seconds that each prompt's videos have."""

    model_types = ("qwen2_5_vl",)
