"""LoRA and QLoRA by settings, under the names that TRL's own scripts have for them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any

from trl import ModelConfig, get_peft_config, get_quantization_config

from appo.training.setting_rules import setting

# The language model's linear layers. All of them, not PEFT's two of four: QLoRA (arXiv 2305.14314) sec. 4. The vision
# tower stays as it is, as in APPO sec. 4; neither is the head adapted, which TRL multiplies with by itself.
LANGUAGE_LAYERS = r".*(language|text)_model.*(_proj|in_proj_\w+|_projection|_gate)"
# What is never quantized: the tower that sees, what follows it, and the head.
_PRECISE = ("visual", "vision_tower", "vision_model", "multi_modal_projector", "connector", "lm_head")


@dataclass
class AdapterSettings:
    """Whether low-rank adapters are trained instead of the model, and on what precision of it."""

    use_peft: bool = setting(False, "Train LoRA adapters; policy/ then holds the adapter, which loading merges.")
    lora_r: int = setting(16, "Rank of the adapters. TRL's default.")
    lora_alpha: int = setting(32, "Adapters are scaled by alpha / r. TRL's default.")
    lora_dropout: float = setting(0.05, "Dropout before the adapters. TRL's default.")
    lora_target_modules: list[str] | None = setting(
        None, "Layers with adapters: names, or one regular expression; default: the language model's."
    )
    use_rslora: bool = setting(False, "Scale adapters by alpha / sqrt(r) instead.")
    use_dora: bool = setting(False, "Decompose weights into size and direction (DoRA).")
    load_in_4bit: bool = setting(False, "QLoRA: the language model's weights in 4 bits.")
    load_in_8bit: bool = setting(False, "The language model's weights in 8 bits.")
    bnb_4bit_quant_type: str = setting("nf4", "nf4 or fp4.")
    use_bnb_nested_quant: bool = setting(False, "Quantize the quantization's constants too.")

    def check(self) -> None:
        """Refuse what would have no effect, or what a library is missing for.

        Raises:
            ValueError: names the setting and the fix.
        """
        changed = [one.name for one in fields(AdapterSettings) if getattr(self, one.name) != one.default]
        if changed and not self.use_peft:
            raise ValueError(f"{changed[0]} is about adapters: set use_peft to true, or leave it out")
        if self.use_peft and find_spec("peft") is None:
            raise ValueError("use_peft needs PEFT: pip install 'appo[peft]', or set use_peft to false")
        for name in ("load_in_4bit", "load_in_8bit"):
            if getattr(self, name) and find_spec("bitsandbytes") is None:
                raise ValueError(f"{name} needs bitsandbytes: pip install bitsandbytes, or set {name} to false")


def adapter_config(settings: AdapterSettings) -> Any:
    """PEFT's configuration of the adapters, None without. Raises ValueError as :meth:`AdapterSettings.check`."""
    settings.check()
    return get_peft_config(_for_trl(settings))


def loading_settings(settings: AdapterSettings) -> dict[str, Any]:
    """What loading the model needs to know: how it is quantized. Raises ValueError as :meth:`AdapterSettings.check`."""
    settings.check()
    quantization = get_quantization_config(_for_trl(settings))
    if quantization is None:
        return {}
    quantization.llm_int8_skip_modules = list(_PRECISE)  # read for 4 bits too, in spite of its name
    return {"quantization_config": quantization}


def _for_trl(settings: AdapterSettings) -> ModelConfig:
    named = {one.name: getattr(settings, one.name) for one in fields(AdapterSettings)}
    named["lora_target_modules"] = named["lora_target_modules"] or [LANGUAGE_LAYERS]
    return ModelConfig(dtype="bfloat16", **named)  # the precision of products with 4-bit weights
