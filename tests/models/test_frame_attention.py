"""attention + scoring against transformers' eager attention, and against the model's own logits."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as flex
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from appo.method.perception import TILE_ROWS, token_weights
from appo.models.families import family_of
from appo.models.frame_attention import FrameCapture, _visible_keys, _wrapped, capture_frame_attention
from appo.models.log_probs import log_probs_at, score_group
from appo.models.prefix_packing import group_rows
from tests.support.tiny import VOCAB, PromptShape, in_double, random_prompt, random_responses
from tests.support.tiny import tiny_model as build_tiny_model

HEADS = [(4, 4), (4, 2), (4, 1), (6, 3)]


tiny_model = cache(build_tiny_model)  # the tests that share one only read it


def eager_frame_attention(rows, frame_BL, query_BN, frames, layers, **model_kwargs):
    """The oracle: transformers' eager `output_attentions`, averaged by plain loops in float64."""
    model = model_kwargs.get("model") or tiny_model(attention="eager", **model_kwargs)
    with torch.no_grad():
        attentions = model(**rows, output_attentions=True, use_cache=False).attentions
    B, N = query_BN.shape
    expected = torch.zeros(B, N, frames, dtype=torch.float64)
    for b in range(B):
        for n in range(N):
            for f in range(frames):
                tokens = (frame_BL[b] == f).nonzero()[:, 0]
                if len(tokens) == 0:
                    continue
                per_layer = [a[b, :, query_BN[b, n], tokens].double().mean() for a in attentions[-layers:]]
                expected[b, n, f] = sum(per_layer) / layers
    return expected


def assert_same_attention(actual, expected):
    """Relative error < 1e-5, element by element where the layers below are float64 (eager's softmax is float32 even
    then); in float32, where they round, relative to the largest value of the same token."""
    if actual.dtype == torch.float64:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-12)
    else:
        scale = expected.amax(-1, keepdim=True).clamp(min=1e-4)
        assert float(((actual.double() - expected).abs() / scale).max()) < 1e-5


video_sizes = st.tuples(st.integers(1, 4), st.integers(1, 2), st.integers(1, 3))
prompt_shapes = st.builds(
    PromptShape,
    videos=st.lists(video_sizes, min_size=1, max_size=2).map(tuple),
    images=st.lists(st.tuples(st.integers(1, 2), st.integers(1, 2)), max_size=1).map(tuple),
    text=st.integers(1, 6),
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    shape=prompt_shapes,
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    heads=st.sampled_from(HEADS),
    layers=st.integers(1, 3),
    chunk=st.sampled_from([None, 1, 2, 5]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_capture_equals_eager_output_attentions(shape, lengths, heads, layers, chunk, dtype, seed):
    """Any head ratio, chunk size, number of videos, an image beside them, ragged responses."""
    prompt, responses = random_prompt(shape, seed), random_responses(lengths, seed)
    kwargs = {"heads": heads[0], "kv_heads": heads[1], "dtype": dtype}
    model = tiny_model(**kwargs)
    rows, mask = group_rows(model, prompt, responses)
    spans = family_of(model).spans(prompt)
    frame_BL = torch.nn.functional.pad(spans.frame_L, (0, mask.shape[1]), value=-1).expand(len(lengths), -1)
    query_BN = (len(spans.frame_L) - 1 + torch.arange(mask.shape[1])).expand(len(lengths), -1)
    with (
        torch.no_grad(),
        capture_frame_attention(
            model, frame_BL, query_BN, frames=spans.frames, layers=layers, query_chunk=chunk
        ) as capture,
    ):
        model(**rows, frame_capture=capture)
    expected = eager_frame_attention(rows, frame_BL, query_BN, spans.frames, layers, **kwargs)
    assert_same_attention(capture.attention_BNF[mask], expected[mask])


def left_padded_batch():
    """Two different prompts (two videos of different sizes; one video and an image), left-padded as trainers do."""
    prompts = [
        random_prompt(PromptShape(videos=((2, 1, 2), (3, 2, 1)), text=3), 1),
        random_prompt(PromptShape(videos=((4, 1, 1),), images=((1, 2),), text=6), 2),
    ]
    longest = max(p.length for p in prompts)

    def left(x, value):
        return torch.nn.functional.pad(x, (longest - x.shape[1], 0), value=value)

    rows = {
        "input_ids": torch.cat([left(p.ids_1P, 0) for p in prompts]),
        "attention_mask": torch.cat([left(torch.ones_like(p.ids_1P), 0) for p in prompts]),
        "mm_token_type_ids": torch.cat([left(p.types_1P, 0) for p in prompts]),
        "pixel_values_videos": torch.cat([p.pixel_values_videos for p in prompts]),
        "video_grid_thw": torch.cat([p.video_grid_thw for p in prompts]),
        "second_per_grid_ts": torch.cat([p.second_per_grid_ts for p in prompts]),
        "pixel_values": prompts[1].pixel_values,
        "image_grid_thw": prompts[1].image_grid_thw,
    }
    assert rows["attention_mask"].min() == 0
    family = family_of(tiny_model())
    frame_BL = torch.cat([left(family.spans(p).frame_L[None], -1) for p in prompts])
    query_BN = torch.tensor([[longest - 3, longest - 2, longest - 1]] * 2)
    return rows, frame_BL, query_BN


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_capture_equals_eager_in_a_left_padded_batch(heads, kv_heads):
    rows, frame_BL, query_BN = left_padded_batch()
    model = tiny_model(heads=heads, kv_heads=kv_heads)
    with torch.no_grad(), capture_frame_attention(model, frame_BL, query_BN, frames=5) as capture:
        model(**rows, frame_capture=capture)
    expected = eager_frame_attention(rows, frame_BL, query_BN, 5, 3, heads=heads, kv_heads=kv_heads)
    assert_same_attention(capture.attention_BNF, expected)
    assert (capture.attention_BNF[1, :, 4] == 0).all(), "row 1 has only four frames"


def test_logits_and_gradients_with_capture_equal_those_without_bit_for_bit():
    rows, frame_BL, query_BN = left_padded_batch()

    def run(captured):
        model = build_tiny_model()
        if captured:
            with capture_frame_attention(model, frame_BL, query_BN, frames=5) as capture:
                logits = model(**rows, frame_capture=capture).logits
        else:
            logits = model(**rows).logits
        logits.square().mean().backward()
        return logits.detach(), {name: p.grad for name, p in model.named_parameters()}

    (plain, plain_grads), (captured, captured_grads) = run(False), run(True)
    assert torch.equal(plain, captured)
    assert all(torch.equal(plain_grads[name], captured_grads[name]) for name in plain_grads)


def test_leaving_the_context_leaves_no_trace():
    model = tiny_model()
    _, frame_BL, query_BN = left_padded_batch()
    before = dict(vars(model.config.get_text_config()))
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    with (
        pytest.raises(RuntimeError, match="stop"),
        capture_frame_attention(model, frame_BL, query_BN, frames=5),
    ):
        assert model.config.get_text_config()._attn_implementation == "appo_sdpa"
        raise RuntimeError("stop")
    assert vars(model.config.get_text_config()) == before
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert model.config.get_text_config()._attn_implementation == "sdpa"


def test_without_a_layout_the_registered_function_is_the_base_kernel():
    rows, frame_BL, query_BN = left_padded_batch()
    model = tiny_model()
    with torch.no_grad():
        plain = model(**rows).logits
        with capture_frame_attention(model, frame_BL, query_BN, frames=5) as capture:
            assert torch.equal(model(**rows).logits, plain)
    assert "appo_sdpa" in ALL_ATTENTION_FUNCTIONS.valid_keys()
    with pytest.raises(RuntimeError, match="no attention was captured in layers"):
        _ = capture.attention_BNF


@pytest.mark.parametrize("layers", [0, 4])
def test_layers_out_of_range_are_refused(layers):
    _, frame_BL, query_BN = left_padded_batch()
    with (
        pytest.raises(ValueError, match="between 1 and the model's 3 decoder layers"),
        capture_frame_attention(tiny_model(), frame_BL, query_BN, frames=5, layers=layers),
    ):
        pass


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_any_kernel_can_be_captured_and_packed(attention, window, monkeypatch):
    """Also those that add their mask, or hide it in a block mask. Flex runs forward only on a CPU."""
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(torch.nn.functional, "softmax", softmax_in_double)
    text = {} if window is None else {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
    prompt, responses = in_double(random_prompt(PromptShape(videos=((3, 1, 2),) * 7))), random_responses([3, 5, 1])
    expected = score_group(build_tiny_model(dtype=torch.float64, text=text), prompt, responses, shared_prefix=False)
    model = build_tiny_model(dtype=torch.float64, text=text)
    model.config.get_text_config()._attn_implementation_internal = attention
    for shared_prefix in (True, False):
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            scores = score_group(model, prompt, responses, shared_prefix=shared_prefix)
        torch.testing.assert_close(scores.log_probs_GN, expected.log_probs_GN, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(scores.frame_attention_GNF, expected.frame_attention_GNF, rtol=1e-9, atol=1e-15)


def softmax_in_double(x, dim, dtype=None):
    """transformers' eager attention rounds its softmax to float32 even in a float64 model."""
    return x.softmax(dim, None if x.dtype == torch.float64 else dtype)


def test_eager_attention_packs_with_the_gradients_of_rows():
    prompt, responses = random_prompt(PromptShape()), random_responses([3, 5, 1])
    results = []
    for attention, shared_prefix in (("eager", True), ("sdpa", False)):
        model = build_tiny_model(attention=attention)
        score_group(model, prompt, responses, shared_prefix=shared_prefix).log_probs_GN.sin().sum().backward()
        results.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in results[1].items():
        torch.testing.assert_close(results[0][name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


def test_an_unknown_kernel_is_refused_with_the_fix():
    """Its mask would silently be none at all."""
    _, frame_BL, query_BN = left_padded_batch()
    model = build_tiny_model()
    model.config.get_text_config()._attn_implementation_internal = "unregistered"
    with (
        pytest.raises(ValueError, match='attn_implementation="sdpa"'),
        capture_frame_attention(model, frame_BL, query_BN, frames=5),
    ):
        pass


def test_every_mask_form_of_transformers_means_the_same():
    """None and causal, boolean, additive; and flash attention's (B, L) padding mask."""
    L, query_BC = 5, torch.tensor([[2, 4]])
    causal = torch.ones(L, L).tril().bool()[None, None]
    additive = torch.zeros(1, 1, L, L).masked_fill(~causal, float("-inf"))
    expected = additive[:, :, [2, 4]]
    assert torch.equal(_visible_keys(None, query_BC, L), expected)
    assert torch.equal(_visible_keys(causal, query_BC, L), expected)
    assert torch.equal(_visible_keys(additive, query_BC, L), expected)
    padded = causal & torch.tensor([False, True, True, True, True])
    assert torch.equal(_visible_keys(torch.tensor([[0, 1, 1, 1, 1]]), query_BC, L), _visible_keys(padded, query_BC, L))


@settings(max_examples=25, deadline=None)
@given(
    shape=prompt_shapes,
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    temperature=st.sampled_from([0.5, 1.0, 1.3]),
    seed=st.integers(0, 100),
)
def test_scores_equal_one_row_at_a_time(shape, lengths, temperature, seed):
    """Log-probs of a batched, padded group = each response alone, from the model's full logits in float64."""
    prompt, responses = random_prompt(shape, seed), random_responses(lengths, seed)
    model = tiny_model()
    with torch.no_grad():
        scores = score_group(model, prompt, responses, temperature=temperature)
        at = log_probs_at(model, scores, temperature=temperature)
        for i, response in enumerate(responses):
            rows, _ = group_rows(model, prompt, [response])
            logits = model(**rows).logits[0, prompt.length - 1 : -1]
            expected = (logits.double() / temperature).log_softmax(-1)
            j = torch.arange(len(response))
            chosen = expected[j, response]
            torch.testing.assert_close(scores.log_probs_GN[i, : len(response)].double(), chosen, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(at(torch.full_like(j, i), j).double(), expected, rtol=1e-5, atol=1e-5)
            assert (scores.log_probs_GN[i, len(response) :] == 0).all()
            assert (scores.frame_attention_GNF[i, len(response) :] == 0).all()
    assert scores.mask_GN.sum(1).tolist() == lengths


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_log_prob_gradients_equal_those_of_the_full_logits(shared_prefix):
    prompt, responses = random_prompt(PromptShape()), random_responses([3, 5])
    prompt = in_double(prompt)
    model = build_tiny_model(dtype=torch.float64)
    score_group(model, prompt, responses, shared_prefix=shared_prefix).log_probs_GN.sum().backward()
    actual = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    rows, mask = group_rows(model, prompt, responses)
    P = prompt.length
    log_probs = model(**rows).logits[:, P - 1 : -1].log_softmax(-1).gather(-1, rows["input_ids"][:, P:, None])[..., 0]
    log_probs[mask].sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(actual[name], parameter.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("divergence", ["kl", "k3"])
@pytest.mark.parametrize("tile", [1, 7, VOCAB, 1000])
def test_weights_from_vocabulary_tiles_equal_those_from_all_log_probs(divergence, tile, monkeypatch):
    """Never (G, N, V), nor more words at once than the tile: the head is asked for pieces, and they add up."""
    prompt, responses = random_prompt(PromptShape()), random_responses([9, 5, 12, 7])
    model = tiny_model()
    with torch.no_grad():
        scores = score_group(model, prompt, responses, temperature=0.8)
        full_GNV = (model.lm_head(scores.hidden_GNH) / 0.8).log_softmax(-1)
    shapes = []
    linear = torch.nn.functional.linear

    def counting(x, weight, bias=None):
        result = linear(x, weight, bias)
        shapes.append(tuple(result.shape))
        return result

    monkeypatch.setattr(torch.nn.functional, "linear", counting)
    at = replace(log_probs_at(model, scores, temperature=0.8), vocabulary_tile=tile)
    settings = {"score_tokens": 4, "top_frames": 2, "frame_tokens": 5, "divergence": divergence}
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0])
    tiled = token_weights(scores.frame_attention_GNF, scores.mask_GN, rewards, at, **settings)
    assert shapes
    assert all(rows <= TILE_ROWS and words <= tile for rows, words in shapes)
    monkeypatch.undo()
    full = token_weights(scores.frame_attention_GNF, scores.mask_GN, rewards, full_GNV, **settings)
    assert full.weights_GN.max() > 1.1
    torch.testing.assert_close(tiled.weights_GN, full.weights_GN, rtol=0, atol=1e-5)


def test_capture_layers_zero_captures_nothing_and_attention_never_carries_gradients():
    prompt, responses = random_prompt(PromptShape()), random_responses([3, 5])
    model = tiny_model()
    assert score_group(model, prompt, responses, capture_layers=0).frame_attention_GNF is None
    scores = score_group(model, prompt, responses)
    assert scores.log_probs_GN.requires_grad
    assert not scores.frame_attention_GNF.requires_grad
    assert not scores.hidden_GNH.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"responses": []}, "non-empty list"),
        ({"responses": [torch.tensor([], dtype=torch.long)]}, "at least one token"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_bad_groups_are_refused(change, message):
    arguments = {"responses": random_responses([2]), "temperature": 1.0} | change
    with pytest.raises(ValueError, match=message):
        score_group(tiny_model(), random_prompt(PromptShape()), **arguments)


@pytest.mark.parametrize("name", ["s_aux", "softcap"])
def test_layers_whose_softmax_has_more_than_keys_are_not_captured_wrongly(name):
    """Sinks take part in the softmax, a softcap bends its scores: neither is in what the capture computes."""
    layer, qkv = SimpleNamespace(layer_idx=0), [torch.randn(1, 2, 3, 4) for _ in range(3)]
    capture = FrameCapture(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 3, 1), frozenset({0}))
    with pytest.raises(ValueError, match=f"cannot be captured in layers with {name}: set method to dapo"):
        _wrapped("sdpa")(layer, *qkv, None, frame_capture=capture, **{name: torch.ones(2)})
