"""prompt_cache: responses behind one copy of their prompt = every row run alone, anew, without a cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from appo.models.families import use_pretrained_positions
from appo.models.prompt_cache import PromptLayer, repeated_prompts
from appo.rollout.generation import respond
from tests.models.conformance import row_of
from tests.support.tiny import PromptShape, in_double, random_prompt, tiny_model

RESPONSES, TOKENS = 3, 40  # more tokens than the first buffer holds


def prompts_of(architecture):
    shapes = [PromptShape(videos=((1, 1, 2),), text=3), PromptShape(videos=((1, 2, 2),), images=((1, 2),), text=6)]
    prompts = [in_double(random_prompt(shape, seed)) for seed, shape in enumerate(shapes)]
    assert prompts[0].length != prompts[1].length, "one of them is padded"
    return prompts if architecture == "qwen2_5_vl" else [replace(one, second_per_grid_ts=None) for one in prompts]


def sampled_with_logits(model, prompts, monkeypatch):
    """Sampled responses, the logits of each token (N, B, V), and the cache."""
    outputs = []
    stock = model.generate

    def recording(*args, **kwargs):
        outputs.append(stock(*args, **kwargs, return_dict_in_generate=True, output_logits=True))
        return outputs[-1].sequences

    monkeypatch.setattr(model, "generate", recording)
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    torch.manual_seed(1)
    groups = respond(model, 0, prompts, RESPONSES, do_sample=True, top_k=0, max_new_tokens=TOKENS,
                     suppress_tokens=[92, 93, 94, 95])  # fmt: skip
    return groups, torch.stack(outputs[0].logits), outputs[0].past_key_values


@pytest.mark.parametrize(
    ("architecture", "kv_heads"),
    [("qwen2_vl", 2), ("qwen2_5_vl", 2), ("qwen3_vl", 2), ("qwen2_5_vl", 1), ("qwen2_5_vl", 4)],
)
def test_logits_are_those_of_rows_without_a_cache(architecture, kv_heads, monkeypatch):
    model = tiny_model(architecture=architecture, kv_heads=kv_heads, dtype=torch.float64)
    prompts = prompts_of(architecture)
    groups, logits_NBV, cache = sampled_with_logits(model, prompts, monkeypatch)
    assert all(type(layer) is PromptLayer for layer in cache.layers)
    rows = [(prompt, ids) for prompt, group in zip(prompts, groups, strict=True) for ids in group]
    assert len({tuple(ids.tolist()) for _, ids in rows}) == len(rows), "each response is another one"
    for row, (prompt, ids) in enumerate(rows):
        with torch.no_grad():
            alone_LV = model(**row_of(model, prompt, ids), use_cache=False).logits[0]
        # transformers rounds every step's logits to float32.
        expected_NV = alone_LV[prompt.length - 1 : -1].float()
        torch.testing.assert_close(logits_NBV[:, row], expected_NV, rtol=2e-7, atol=2e-7)


def test_half_precision_is_no_less_exact_than_the_kernel_of_the_model(monkeypatch):
    model, prompts = tiny_model(dtype=torch.float64), prompts_of("qwen2_5_vl")
    half = tiny_model(dtype=torch.bfloat16)
    half.load_state_dict(model.state_dict())
    groups, logits_NBV, _ = sampled_with_logits(half, prompts, monkeypatch)
    errors = []
    for row, (prompt, ids) in enumerate((prompts[row // 3], groups[row // 3][row % 3]) for row in range(6)):
        with torch.no_grad():
            exact_NV = model(**row_of(model, prompt, ids)).logits[0, prompt.length - 1 : -1]
            kernel_NV = half(**row_of(half, prompt, ids)).logits[0, prompt.length - 1 : -1]
        errors.append([float((one - exact_NV).norm()) for one in (logits_NBV[:, row], kernel_NV)])
    cached, kernel = torch.tensor(errors).sum(dim=0).tolist()
    assert cached < 1.2 * kernel


def test_a_prompt_is_there_once_and_buffers_are_seldom_copied(monkeypatch):
    model, prompts = tiny_model(), [random_prompt(PromptShape(), 0), random_prompt(PromptShape(text=9), 1)]
    places, update = set(), PromptLayer.update

    def noting(layer, *args, **kwargs):
        token = update(layer, *args, **kwargs)
        places.add((id(layer), layer.keys.shape[3], layer.keys.data_ptr()))
        return token

    monkeypatch.setattr(PromptLayer, "update", noting)
    _, _, cache = sampled_with_logits(model, prompts, monkeypatch)
    assert cache.get_seq_length() == max(prompt.length for prompt in prompts) + TOKENS - 1
    assert [layer.prompt_QKPD.shape[0] for layer in cache.layers] == [2] * 3
    assert [layer.keys.shape[:3] for layer in cache.layers] == [(2, 2, RESPONSES)] * 3
    assert sorted(size for _, size, _ in places) == [32] * 3 + [64] * 3


def read_by(model, prompt):
    use_pretrained_positions(model)
    with torch.no_grad():
        return model(**prompt.mapping(), use_cache=True).past_key_values


@pytest.mark.parametrize(
    "settings",
    [{"attention": "eager"}, {"text": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}}],
)
def test_other_kernels_and_sliding_windows_take_a_repeated_cache(settings):
    model, prompt = tiny_model(**settings), random_prompt(PromptShape(), 0)
    cache = read_by(model, prompt)
    base = model.config.get_text_config()._attn_implementation
    with repeated_prompts(model, cache, 1, 3):
        assert model.config.get_text_config()._attn_implementation == base
        assert not any(isinstance(layer, PromptLayer) for layer in cache.layers)
        assert {layer.keys.shape[0] for layer in cache.layers} == {3}


def test_the_kernel_of_the_model_comes_back_also_after_an_error():
    model = tiny_model()
    config = model.config.get_text_config()
    with pytest.raises(KeyError), repeated_prompts(model, read_by(model, random_prompt(PromptShape(), 0)), 1, 3):
        assert config._attn_implementation == "appo_prompt_cache"
        raise KeyError
    assert config._attn_implementation == "sdpa"


def test_an_attention_that_sees_no_prompt_is_noticed():
    model = tiny_model()
    cache = read_by(model, random_prompt(PromptShape(), 0))
    assert type(cache) is DynamicCache
    with pytest.raises(RuntimeError, match="sees no shared prompt"), repeated_prompts(model, cache, 1, 3):
        model.config.get_text_config()._attn_implementation_internal = "sdpa"
        with torch.no_grad():
            model(input_ids=torch.ones(3, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
