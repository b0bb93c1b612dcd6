"""A packed group equals ordinary rows: log-probs, hidden states, frame attention and every parameter's gradient."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from appo.models.families import use_pretrained_positions
from appo.models.frame_attention import use_appo_attention
from appo.models.log_probs import score_group
from appo.models.prefix_packing import group_rows, pack_group
from tests.support.tiny import (
    ARCHITECTURES,
    BY_RUNS,
    TIMESTAMPED,
    PromptShape,
    in_double,
    random_prompt,
    random_responses,
    tiny_model,
)

shared_model = cache(tiny_model)
video_sizes = st.tuples(st.integers(1, 4), st.integers(1, 2), st.integers(1, 3))
prompt_shapes = st.builds(
    PromptShape,
    videos=st.lists(video_sizes, max_size=2).map(tuple),
    images=st.lists(st.tuples(st.integers(1, 2), st.integers(1, 2)), max_size=1).map(tuple),
    text=st.integers(1, 6),
)
# All layers attend, or half of them are linear attention; positions are ordinary, layers have windows or shared keys.
KINDS = {"qwen2_5_vl": PromptShape(), "qwen3_5": PromptShape(timestamps=True)} | dict.fromkeys(BY_RUNS, PromptShape())


def score_both_ways(model, prompt, responses, *, rows_per_chunk=0, **kwargs):
    """(scores, gradients) packed (in chunks, if asked) and as rows."""
    results = []
    for shared_prefix in (True, False):
        model.zero_grad()
        chunk = rows_per_chunk if shared_prefix else 0
        scores = score_group(model, prompt, responses, shared_prefix=shared_prefix, rows_per_chunk=chunk, **kwargs)
        weights = torch.sin(torch.arange(scores.log_probs_GN.numel())).view(scores.log_probs_GN.shape)
        (scores.log_probs_GN * weights).sum().backward()
        results.append((scores, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad(set_to_none=True)
    return results


def assert_equal_scores(packed, rows, tolerance):
    (one, one_grads), (two, two_grads) = packed, rows
    mask = two.mask_GN
    assert torch.equal(one.mask_GN, mask)
    pairs = {
        "log_probs": (one.log_probs_GN, two.log_probs_GN),
        "hidden": (one.hidden_GNH[mask], two.hidden_GNH[mask]),
        "frame_attention": (one.frame_attention_GNF, two.frame_attention_GNF),
    }
    assert one_grads.keys() == two_grads.keys()
    assert one_grads
    pairs |= {name: (one_grads[name], two_grads[name]) for name in two_grads}
    for name, (a, b) in pairs.items():
        assert a.shape == b.shape
        if "vision_model" in name and name.endswith("k_proj.bias"):
            continue  # without rotary positions it moves all scores of a query alike: its gradient is rounding alone
        # transformers rotates vision queries and keys in float32 whatever the model's dtype: one copy of the video
        # rounds once, G copies round G times.
        allowed = max(tolerance, 1e-6) if "visual" in name else tolerance
        if b.numel():
            scale = max(float(b.detach().abs().max()), 1e-3)
            assert float((a - b).detach().abs().max()) <= allowed * scale, name


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    shape=prompt_shapes,
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    architecture=st.sampled_from(ARCHITECTURES),
    heads=st.sampled_from([(4, 2), (4, 4), (6, 2)]),
    precision=st.sampled_from([(torch.float64, 1e-9), (torch.float32, 1e-4)]),
    temperature=st.sampled_from([1.0, 0.7]),
    chunk=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_packed_equals_rows(shape, lengths, architecture, heads, precision, temperature, chunk, seed):
    shape = replace(shape, timestamps=architecture in TIMESTAMPED)
    dtype, tolerance = precision
    model = shared_model(architecture=architecture, heads=heads[0], kv_heads=heads[1], dtype=dtype)
    prompt, responses = random_prompt(shape, seed, architecture), random_responses(lengths, seed)
    prompt = in_double(prompt) if dtype == torch.float64 else prompt
    assert_equal_scores(
        *score_both_ways(model, prompt, responses, temperature=temperature, rows_per_chunk=chunk), tolerance
    )


def test_states_go_on_wherever_a_prompt_ends_among_the_chunks_of_linear_attention():
    """transformers runs 64 tokens at once, counted from the start of a row or of a segment."""
    prompt, responses = in_double(random_prompt(PromptShape(text=130, timestamps=True))), random_responses([70, 3])
    model = shared_model(architecture="qwen3_5", dtype=torch.float64)
    assert_equal_scores(*score_both_ways(model, prompt, responses), 1e-9)


def test_packing_is_as_small_as_it_can_be():
    """P - 1 shared positions and one for each response token; every label once."""
    prompt, responses = random_prompt(PromptShape()), random_responses([2, 5, 1])
    packed = pack_group(shared_model(), prompt, responses)
    P = prompt.length
    assert packed.inputs["input_ids"].shape == (1, P - 1 + 8)
    assert packed.labels_1T[0, P - 1 :].tolist() == torch.cat(responses).tolist()
    assert (packed.labels_1T[0, : P - 1] == -100).all()
    last = int(prompt.ids_1P[0, -1])
    assert packed.inputs["input_ids"][0, [P - 1, P + 1, P + 6]].tolist() == [last] * 3
    segment_starts = packed.inputs["position_ids"][0, 0, [P - 1, P + 1, P + 6]]
    assert len(set(segment_starts.tolist())) == 1, "every response starts right after the prompt"
    assert packed.inputs["pixel_values_videos"] is prompt.pixel_values_videos, "pixels exist once"


def test_an_empty_response_takes_no_position():
    """TRL masks truncated responses away entirely."""
    prompt, responses = random_prompt(PromptShape()), random_responses([2, 3])
    model = shared_model()
    with torch.no_grad():
        packed = pack_group(model, prompt, [responses[0], responses[0][:0], responses[1]])
        use_appo_attention(model)
        hidden = model.model(**packed.inputs).last_hidden_state[0][packed.layout.index_GN]
        without = pack_group(model, prompt, responses)
        expected = model.model(**without.inputs).last_hidden_state[0][without.layout.index_GN]
    assert packed.layout.mask_GN.sum(1).tolist() == [2, 0, 3]
    torch.testing.assert_close(hidden[[0, 2]][without.layout.mask_GN], expected[without.layout.mask_GN])


@pytest.mark.parametrize("architecture", KINDS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_recomputes_through_the_same_layout(reentrant, architecture):
    if reentrant and architecture == "gemma4":
        pytest.skip("transformers itself loses gradients of shared keys: refused by the trainer")
    prompt, responses = in_double(random_prompt(KINDS[architecture], 0, architecture)), random_responses([3, 5])
    plain = score_both_ways(tiny_model(dtype=torch.float64, architecture=architecture), prompt, responses)[0]
    model = tiny_model(dtype=torch.float64, architecture=architecture)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    use_appo_attention(model)
    assert_equal_scores(score_both_ways(model, prompt, responses)[0], plain, 1e-9)


@pytest.mark.parametrize("architecture", KINDS)
def test_bfloat16_autocast_packs_within_its_rounding(architecture):
    prompt, responses = random_prompt(KINDS[architecture], 0, architecture), random_responses([3, 5])
    model = tiny_model(architecture=architecture)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        packed = score_group(model, prompt, responses)
        rows = score_group(model, prompt, responses, shared_prefix=False)
    with torch.no_grad():
        exact = score_group(model, prompt, responses, shared_prefix=False)
    rounding = float((rows.log_probs_GN - exact.log_probs_GN).abs().max())
    assert rounding > 0
    assert float((packed.log_probs_GN - exact.log_probs_GN).abs().max()) <= 3 * rounding
    ours, theirs = (float((x.frame_attention_GNF - exact.frame_attention_GNF).abs().max()) for x in (packed, rows))
    assert 0 < ours <= 2 * theirs


def test_a_kernel_whose_causal_mask_is_end_aligned_packs_without_a_mask():
    """Flash attention's contract, kept by a plain stand-in: no mask tensor, the last query sees the last key."""

    def kernel(module, query, key, value, attention_mask, scaling=None, **kwargs):
        assert attention_mask is None
        N, L = query.shape[2], key.shape[2]
        repeat = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        visible = torch.ones(N, L, dtype=torch.bool).tril(L - N)
        return functional.scaled_dot_product_attention(query, key, value, visible, scale=scaling).transpose(1, 2), None

    AttentionInterface.register("plain_flash", kernel)
    AttentionMaskInterface.register("plain_flash", flash_attention_mask)
    prompt, responses = random_prompt(PromptShape()), random_responses([3, 5, 1])
    expected = score_both_ways(tiny_model(), prompt, responses)[1]
    model = tiny_model()
    model.config.get_text_config()._attn_implementation_internal = "plain_flash"
    scores = score_group(model, prompt, responses)
    torch.testing.assert_close(scores.log_probs_GN, expected[0].log_probs_GN, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores.frame_attention_GNF, expected[0].frame_attention_GNF, rtol=1e-4, atol=1e-6)


def test_chunks_hold_less_for_the_backward_pass():
    """Bytes autograd saves for a packed group's update, whole and in chunks of one response."""
    from types import SimpleNamespace

    from appo.training.update import PackedModel

    prompt, responses = random_prompt(PromptShape()), random_responses([24] * 8)
    model = tiny_model()
    use_appo_attention(model)

    def fused(shift_labels, **inputs):
        logits = model(**inputs).logits
        assert logits.shape[1] == shift_labels.shape[1] == 24 * (chunk or 8), "the head runs over responses alone"
        log_probs = -functional.cross_entropy(logits[0], shift_labels[0], reduction="none", ignore_index=-100)
        return SimpleNamespace(log_probs=log_probs[None], entropy=None)

    rows, mask = group_rows(model, prompt, responses)
    labels = rows["input_ids"].clone()
    labels[:, : -mask.shape[1]] = -100
    saved = {}
    results = {}
    for chunk in (0, 1):
        sizes: list[int] = []

        def count(tensor, sizes=sizes):
            sizes.append(tensor.nbytes)
            return tensor

        packed = PackedModel(fused, [prompt], 8, model, rows_per_chunk=chunk)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            results[chunk] = packed(rows["input_ids"], labels, attention_mask=None).log_probs
        saved[chunk] = sum(sizes)
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    assert saved[1] < 0.1 * saved[0]


@pytest.mark.parametrize("architecture", KINDS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_lora_adapters_train_alike(reentrant, architecture):
    """Packed and as rows, through PEFT's wrapper, with gradient checkpointing."""
    peft = pytest.importorskip("peft")
    prompt, responses = in_double(random_prompt(KINDS[architecture], 0, architecture)), random_responses([3, 5])
    linear = ["in_proj_qkv", "in_proj_a", "out_proj"] if architecture == "qwen3_5" else []
    targets = ["q_proj", "v_proj", "down_proj", *linear]
    tower = r".*vision_tower.*" if architecture == "gemma4" else None  # of layers that PEFT does not know
    config = peft.LoraConfig(target_modules=targets, exclude_modules=tower, r=2, init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_model(dtype=torch.float64, architecture=architecture), config).double()
    if not reentrant:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        model.train()
    use_appo_attention(model.get_base_model())
    packed, rows = score_both_ways(model, prompt, responses)
    assert all(any("lora" in name and target in name for name in packed[1]) for target in targets)
    assert all("lora" in name for name in packed[1])
    assert_equal_scores(packed, rows, 1e-9)


def test_an_attention_function_that_ignores_the_layout_is_noticed():
    """Responses would see each other, and nothing else would tell."""
    model = tiny_model()
    packed = pack_group(model, random_prompt(PromptShape()), random_responses([2, 3]))
    with torch.no_grad():
        model.model(**packed.inputs)
        with pytest.raises(RuntimeError, match="ignores its layout"):
            packed.layout.assert_kept()
        use_appo_attention(model)
        model.model(**packed.inputs)
    packed.layout.assert_kept()


def test_a_copy_of_a_model_packs_by_itself():
    """The forward that layers of linear attention are given is of the copy, not of the model it was copied from."""
    model = use_pretrained_positions(tiny_model(architecture="qwen3_5", dtype=torch.float64))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    prompt, responses = in_double(random_prompt(KINDS["qwen3_5"])), random_responses([2, 3])
    assert_equal_scores(*score_both_ways(twin, prompt, responses), 1e-9)


def test_layers_of_linear_attention_that_ignore_the_layout_are_noticed():
    model = tiny_model(architecture="qwen3_5")
    packed = pack_group(model, random_prompt(KINDS["qwen3_5"]), random_responses([2, 3]))
    del model.base_model.language_model.layers[2].linear_attn.forward
    use_appo_attention(model)
    with torch.no_grad():
        model.model(**packed.inputs)
    with pytest.raises(RuntimeError, match="ignores its layout"):
        packed.layout.assert_kept()


def test_layers_with_a_state_are_refused_with_the_way_out(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(model.config.get_text_config(), "layer_types", ["linear_attention", *["full_attention"] * 2])
    with pytest.raises(ValueError, match=r"qwen2_5_vl models .* set shared_prefix to false"):
        pack_group(model, random_prompt(PromptShape()), random_responses([2]))
