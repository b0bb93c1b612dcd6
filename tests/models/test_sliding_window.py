"""Layers with a sliding window: a packed group equals ordinary rows, and the capture equals eager attention."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from appo.models.families import family_of, use_pretrained_positions
from appo.models.log_probs import score_group
from appo.models.prefix_packing import group_rows
from appo.rollout.generation import respond
from tests.models.test_frame_attention import eager_frame_attention
from tests.models.test_prefix_packing import assert_equal_scores, score_both_ways
from tests.rollout.test_generation import stock_generate
from tests.support.tiny import VIDEO, PromptShape, in_double, random_prompt, random_responses, tiny_model

# A prompt of 20 positions: windows that end in the response, in the prompt's text, in its video, and beyond all.
WINDOWS = (1, 2, 4, 9, 16, 64)
SHAPE = PromptShape(videos=((3, 1, 2), (2, 1, 1)), text=7)


@cache
def windowed_model(window: int, architecture: str = "qwen2_5_vl", attention: str = "sdpa", double: bool = True):
    """The first layer attends to all that precedes, the others to `window` tokens."""
    dtype = torch.float64 if double else torch.float32
    sliding = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
    return tiny_model(architecture=architecture, attention=attention, dtype=dtype, text=sliding)


@pytest.mark.parametrize("chunk", [0, 1])
@pytest.mark.parametrize("architecture", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("window", WINDOWS)
def test_packed_equals_rows(window, architecture, chunk):
    model = windowed_model(window, architecture)
    prompt, responses = in_double(random_prompt(SHAPE)), random_responses([6, 1, 9, 3])
    packed, rows = score_both_ways(model, prompt, responses, rows_per_chunk=chunk)
    assert_equal_scores(packed, rows, 1e-9)
    full = score_group(windowed_model(10_000, architecture), prompt, responses)
    assert torch.allclose(full.log_probs_GN, rows[0].log_probs_GN) == (window == 64), "the window is not felt"


@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize("window", WINDOWS)
def test_capture_equals_eager_output_attentions(window, shared_prefix):
    """Each response alone for the oracle: eager attention makes NaN of padding that sees nothing but padding."""
    prompt, responses = in_double(random_prompt(SHAPE)), random_responses([6, 1, 9])
    with torch.no_grad():
        scores = score_group(windowed_model(window), prompt, responses, shared_prefix=shared_prefix)
    eager = use_pretrained_positions(windowed_model(window, attention="eager"))
    spans = family_of(eager).spans(prompt)
    for response, attention_NF in zip(responses, scores.frame_attention_GNF, strict=True):
        N, P = len(response), len(spans.frame_L)
        frame_1L = functional.pad(spans.frame_L, (0, N), value=-1)[None]
        query_1N = (P - 1 + torch.arange(N))[None]
        rows, _ = group_rows(eager, prompt, [response])
        expected_1NF = eager_frame_attention(rows, frame_1L, query_1N, spans.frames, 3, model=eager)
        torch.testing.assert_close(attention_NF[:N], expected_1NF[0], rtol=1e-5, atol=1e-12)
        assert (attention_NF[N:] == 0).all()


def flash_with_a_window(module, query, key, value, attention_mask, scaling=None, sliding_window=None, **kwargs):
    """Flash attention's contract: the last query sees the last key, `sliding_window` keys at most, padding by rows."""
    N, L = query.shape[2], key.shape[2]
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    visible = torch.ones(N, L, dtype=torch.bool).tril(L - N)
    if sliding_window is not None:
        visible &= torch.ones(N, L, dtype=torch.bool).triu(L - N - sliding_window + 1)
    visible = visible[None, None]
    if attention_mask is not None:  # a row of padding alone still needs a key
        visible = visible & (attention_mask[:, None, None].bool() | torch.eye(N, L, dtype=torch.bool))
    return functional.scaled_dot_product_attention(query, key, value, visible, scale=scaling).transpose(1, 2), None


@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_kernel_that_knows_the_window_itself(window, shared_prefix):
    """It is told the window, and needs no mask for it; what is captured beside it must know the window too."""
    AttentionInterface.register("windowed_flash", flash_with_a_window)
    AttentionMaskInterface.register("windowed_flash", flash_attention_mask)
    prompt, responses = in_double(random_prompt(SHAPE)), random_responses([6, 1, 9])
    expected = score_both_ways(windowed_model(window), prompt, responses)[1]
    model = tiny_model(
        dtype=torch.float64, text={"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
    )
    model.config.get_text_config()._attn_implementation_internal = "windowed_flash"
    with torch.no_grad():
        scores = score_group(model, prompt, responses, shared_prefix=shared_prefix)
    torch.testing.assert_close(scores.log_probs_GN, expected[0].log_probs_GN, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(scores.frame_attention_GNF, expected[0].frame_attention_GNF, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window", [4, 16])
def test_responses_are_those_of_stock_generation(window, monkeypatch):
    """The cache of a layer with a window holds the last keys only; it is made once a prompt and repeated."""
    model = windowed_model(window, double=False)
    model.generation_config.update(eos_token_id=1, pad_token_id=0)
    prompts = [random_prompt(PromptShape(videos=((3, 1, 2),), text=4)), random_prompt(SHAPE, 1)]
    settings = {"do_sample": False, "max_new_tokens": 10, "suppress_tokens": [VIDEO]}
    groups = respond(model, 0, prompts, 2, **settings)
    longest = max(prompt.length for prompt in prompts)
    stock = stock_generate(model, prompts, 2, 0, **settings).sequences[:, longest:]
    for ids, row in zip([ids for group in groups for ids in group], stock, strict=True):
        assert torch.equal(ids, row[: len(ids)])
