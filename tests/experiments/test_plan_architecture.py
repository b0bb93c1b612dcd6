"""What the plan knows of a model and of a video, against the model (built without memory) and the real processor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLVideoProcessor

from appo.experiments.plan.architecture import PUBLISHED, Architecture, read_architecture, video_shape
from appo.world import policy_path

ODD = Architecture(96, 3, 6, 3, 200, 333, tied=False, vision_depth=2, vision_hidden=48, vision_intermediate=70)


def config_of(a: Architecture) -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": a.vocabulary, "hidden_size": a.hidden, "intermediate_size": a.intermediate,
            "num_hidden_layers": a.layers, "num_attention_heads": a.heads, "num_key_value_heads": a.kv_heads,
            "tie_word_embeddings": a.tied, "bos_token_id": 0, "eos_token_id": 1,
        },
        vision_config={
            "depth": a.vision_depth, "hidden_size": a.vision_hidden, "num_heads": 16,
            "intermediate_size": a.vision_intermediate, "out_hidden_size": a.hidden,
        },
        tie_word_embeddings=a.tied,
    )  # fmt: skip


def on_meta(a: Architecture) -> Qwen2_5_VLForConditionalGeneration:
    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration(config_of(a))


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("a", [*PUBLISHED.values(), ODD], ids=[*PUBLISHED, "odd"])
def test_parameters_are_those_of_the_model(a: Architecture) -> None:
    model = on_meta(a)
    assert a.vision_parameters == count(model.model.visual)
    assert a.layer_parameters == count(model.model.language_model.layers[0])
    assert a.language_parameters + a.vision_parameters == count(model)


def test_adapters_are_as_many_as_peft_makes() -> None:
    from peft import LoraConfig, get_peft_model

    targets = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    model = get_peft_model(on_meta(ODD), LoraConfig(r=5, target_modules=targets))
    assert ODD.lora_parameters(5) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_folder_is_known_by_its_config(tmp_path) -> None:
    config_of(ODD).save_pretrained(tmp_path)
    assert read_architecture(str(tmp_path)) == ODD
    assert read_architecture("Qwen2.5-VL-3B") is PUBLISHED["qwen2.5-vl-3b"]
    tiny = read_architecture(str(policy_path()))
    assert (tiny.hidden, tiny.layers, tiny.tied) == (128, 4, True)


def test_other_models_are_refused_by_name(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match=r"qwen2_5_vl, and this is qwen2"):
        read_architecture(str(tmp_path))


@settings(max_examples=40, deadline=None)
@given(
    frames=st.integers(1, 9),
    height=st.integers(28, 400),
    width=st.integers(28, 400),
    least=st.sampled_from([784, 3136, 12544]),
    most=st.sampled_from([12544, 50176, 100352]),
)
def test_tokens_are_those_of_the_processor(frames: int, height: int, width: int, least: int, most: int) -> None:
    size = {"shortest_edge": least, "longest_edge": most}
    processor = Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False, do_sample_frames=False)
    video = np.zeros((frames, height, width, 3), dtype=np.uint8)
    inputs = processor(videos=[video], return_tensors="pt")
    shape = video_shape(PUBLISHED["qwen2.5-vl-3b"], frames, height, width, least, most)
    grid = inputs["video_grid_thw"][0].tolist()
    assert [shape.frames, shape.height // 14, shape.width // 14] == grid
    assert (shape.patches, PUBLISHED["qwen2.5-vl-3b"].patch_values) == tuple(inputs["pixel_values_videos"].shape)
    assert shape.tokens == shape.patches // 4 == shape.tokens_per_frame * shape.frames


def test_videos_that_the_processor_refuses_are_refused() -> None:
    with pytest.raises(ValueError, match="takes none such"):
        video_shape(ODD, 16, 10, 3000, 784, 50176)
