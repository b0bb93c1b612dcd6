"""Which parameters a frozen vision tower is, in architectures that name it differently."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recipes.tiny_policy.processor import build_tokenizer
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2ForCausalLM,
)

from appo.models.families import family_of
from appo.models.vision_tower import PASSES, equal_vision_passes, freeze_vision_tower
from tests.support.tiny import ARCHITECTURES, MROPE, PromptShape, random_prompt, tiny_model
from tests.training.side_by_side import small

TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
OTHERS = {
    "gemma3": lambda: Gemma3ForConditionalGeneration(Gemma3Config(text_config=TEXT, vision_config=VISION)),
    "llava_next": lambda: LlavaNextForConditionalGeneration(
        LlavaNextConfig(
            text_config={**TEXT, "model_type": "mistral"}, vision_config={**VISION, "model_type": "clip_vision_model"}
        )
    ),
}


def built(architecture: str) -> Any:
    return OTHERS[architecture]() if architecture in OTHERS else tiny_model(architecture=architecture)


PARTS = {name: {"visual"} for name in MROPE} | {
    "internvl": {"vision_tower", "multi_modal_projector"},
    "smolvlm": {"vision_model", "connector"},
    "gemma4": {"vision_tower", "embed_vision"},
    **{name: {"vision_tower", "multi_modal_projector"} for name in OTHERS},
}


@pytest.mark.parametrize("architecture", PARTS)
def test_what_stands_before_the_language_model_is_frozen_and_nothing_else(architecture):
    """TRL trains them all: without the tower by its name, the trainer would end in an AttributeError."""
    model = built(architecture)
    freeze_vision_tower(model)
    frozen = {name.split(".")[1] for name, value in model.named_parameters() if not value.requires_grad}
    trained = {name.split(".")[1] for name, value in model.named_parameters() if value.requires_grad}
    assert frozen == PARTS[architecture]
    assert trained & {"language_model", "text_model"}
    assert not frozen & trained


def test_a_model_without_a_tower_is_refused_and_stays_as_it_was():
    model = Qwen2ForCausalLM(small(build_tokenizer()))
    with pytest.raises(ValueError, match="freeze_vision_tower finds no vision tower in a qwen2 model: set it to false"):
        freeze_vision_tower(model)
    assert all(value.requires_grad for value in model.parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_process_without_a_picture_runs_the_tower_as_often_as_others(architecture):
    """Where it is trained: the logits stay, and every parameter before the language model has a gradient."""
    model, prompt = tiny_model(architecture=architecture), random_prompt(PromptShape(videos=()), 0, architecture)
    inputs = {"input_ids": prompt.ids_1P, "attention_mask": torch.ones_like(prompt.ids_1P)}
    expected = model(**inputs).logits
    passes: list[int] = []
    family_of(model).tower.register_forward_hook(lambda *_: passes.append(1))
    equal_vision_passes(model)
    equal_vision_passes(model)
    found = model(**inputs).logits
    assert torch.equal(found, expected)
    assert len(passes) == PASSES
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in family_of(model).vision_parameters)
