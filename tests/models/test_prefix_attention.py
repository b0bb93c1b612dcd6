"""Attention of a packed group without copies of the prompt's keys = plain softmax, one response at a time."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from appo.models import frame_attention
from appo.models.log_probs import score_group
from appo.models.prefix_attention import PrefixLayout, _attend, _attend_backward, merged_attention, merges
from tests.models.test_prefix_packing import assert_equal_scores, score_both_ways
from tests.support.tiny import PromptShape, in_double, random_prompt, random_responses, tiny_model

D = 8
HEADS = [(2, 2), (4, 2), (7, 1), (14, 2)]


def layout_of(prefix: int, lengths: list[int]) -> PrefixLayout:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return PrefixLayout(prefix, prefix + (mask.flatten().cumsum(0) - 1).clamp(min=0).view(mask.shape), mask, 1)


def random_qkv(layout: PrefixLayout, heads: tuple[int, int], seed: int = 0, dtype: torch.dtype = torch.float64):
    """Laid out as a model's projections are: positions before heads."""
    generator = torch.Generator().manual_seed(seed)
    length = layout.prefix + int(layout.mask_GN.sum())
    made = (torch.randn(1, length, n, D, generator=generator, dtype=torch.float64) for n in (*heads, heads[1]))
    return tuple(x.to(dtype).transpose(1, 2).requires_grad_() for x in made)


def plain_attention(query, key, value, layout, scaling):
    """Each response alone behind the prompt: softmax of all scores, query by query."""
    (_, A, _, _), K, S = query.shape, key.shape[1], layout.prefix
    rows = [list(range(S))]
    end = S
    for length in layout.mask_GN.sum(1).tolist():
        rows.append([*range(S), *range(end, end + length)])
        end += length
    outputs = torch.zeros(1, end, A, D, dtype=query.dtype)
    for number, row in enumerate(rows):
        for place in range(S if number else 0, len(row)):
            seen = row[: place + 1]
            for head in range(A):
                k, v = (x[0, head // (A // K), seen] for x in (key, value))
                weights = (k @ query[0, head, row[place]] * scaling).softmax(0)
                outputs = outputs.index_put(
                    (torch.tensor(0), torch.tensor(row[place]), torch.tensor(head)), weights @ v
                )
    return outputs


segment_lengths = st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any)


@settings(max_examples=30, deadline=None)
@given(prefix=st.integers(1, 6), lengths=segment_lengths, heads=st.sampled_from(HEADS), seed=st.integers(0, 99))
def test_values_and_gradients_are_those_of_plain_softmax(prefix, lengths, heads, seed):
    """Ragged and empty segments, query heads that share key heads."""
    layout = layout_of(prefix, lengths)
    qkv = random_qkv(layout, heads, seed)
    assert merges(qkv, layout, {})
    outputs = [merged_attention(qkv, layout, 0.7), plain_attention(*qkv, layout, 0.7)]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    weights = torch.sin(torch.arange(outputs[0].numel())).view(outputs[0].shape)
    gradients = [torch.autograd.grad((output * weights).sum(), qkv) for output in outputs]
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("heads", HEADS)
def test_gradcheck(heads):
    layout = layout_of(3, [2, 0, 4])
    qkv = random_qkv(layout, heads)
    assert torch.autograd.gradcheck(lambda *x: merged_attention(x, layout, 0.5), qkv)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_exact_within_its_rounding(dtype):
    layout = layout_of(20, [7, 3, 12])
    qkv = random_qkv(layout, (4, 2), dtype=dtype)
    exact = tuple(x.detach().double().requires_grad_() for x in qkv)
    rounding = torch.finfo(dtype).eps
    outputs = [merged_attention(inputs, layout, 0.5) for inputs in (qkv, exact)]
    gradients = [torch.autograd.grad(x.double().sin().sum(), i) for x, i in zip(outputs, (qkv, exact), strict=True)]
    for one, two in zip([outputs[0].detach(), *gradients[0]], [outputs[1].detach(), *gradients[1]], strict=True):
        assert float((one - two).abs().max()) < 8 * rounding * float(two.abs().max())


def test_nothing_is_kept_for_the_backward_pass_but_what_goes_in_and_out():
    """No copy per response, per query head or of the prefix."""
    layout = layout_of(64, [4] * 16)
    qkv = random_qkv(layout, (8, 2))
    kept: dict[int, int] = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = merged_attention(qkv, layout, 0.5)
    log_sum_exps = 8 * out.shape[1] * out.itemsize
    assert sum(kept.values()) == sum(x.nbytes for x in (*qkv, out)) + log_sum_exps


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"dropout": 0.0, "sliding_window": 9, "scaling": 0.5, "softcap": None}, True),
        ({"sliding_window": 8}, False),
        ({"dropout": 0.1}, False),
        ({"softcap": 30.0}, False),
        ({"s_aux": torch.zeros(4)}, False),
        ({"position_bias": torch.zeros(1)}, False),
    ],
)
def test_what_flash_attention_does_not_know_goes_the_other_way(change, expected):
    layout = layout_of(5, [4, 2])
    assert merges(random_qkv(layout, (4, 2)), layout, change) == expected


def test_the_user_can_refuse_flash_attention_and_a_prompt_of_one_token_shares_nothing():
    layout = layout_of(5, [4, 2])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert not merges(random_qkv(layout, (4, 2)), layout, {})
    alone = layout_of(0, [4, 2])
    assert not merges(random_qkv(alone, (4, 2)), alone, {})


def test_both_ways_are_the_same(monkeypatch):
    prompt, responses = in_double(random_prompt(PromptShape())), random_responses([3, 5, 1])
    merged, rows = score_both_ways(tiny_model(dtype=torch.float64), prompt, responses)
    monkeypatch.setattr(frame_attention, "merges", lambda *_: False)
    copied, _ = score_both_ways(tiny_model(dtype=torch.float64), prompt, responses)
    assert_equal_scores(copied, rows, 1e-9)
    assert_equal_scores(merged, copied, 1e-12)


def test_attention_dropout_is_applied_in_training():
    prompt, responses = random_prompt(PromptShape()), random_responses([3, 5])
    model = tiny_model(text={"attention_dropout": 0.5})

    def log_probs(seed):
        torch.manual_seed(seed)
        return score_group(model, prompt, responses).log_probs_GN.detach()

    without = log_probs(0)
    assert torch.equal(without, log_probs(1))
    model.train()
    assert torch.equal(log_probs(0), log_probs(0))
    assert not torch.allclose(log_probs(0), log_probs(1))
    assert not torch.allclose(log_probs(0), without)


@pytest.mark.parametrize("heads", HEADS)
def test_cuda_kernels_take_these_arguments(heads):
    """By torch's own description of its CUDA kernels (names, shapes, types): no device is needed."""
    with FakeTensorMode():
        on_cuda = partial(torch.empty, dtype=torch.bfloat16, device="cuda")
        query, key, value = (on_cuda(1, 11, n, 16).transpose(1, 2) for n in (*heads, heads[1]))
        keys = (key[:, :, :6], value[:, :, :6])
        out, lse = _attend((query[:, :, 6:], *keys), False, 0.5)
        assert (out.shape, lse.shape, lse.dtype) == ((1, heads[0], 5, 16), (1, heads[0], 5), torch.float32)
        gradients = _attend_backward((out, out, lse, query[:, :, 6:]), keys, False, 0.5)
        assert [x.shape for x in gradients] == [
            (1, n, rows, 16) for n, rows in zip((*heads, heads[1]), (5, 6, 6), strict=True)
        ]
