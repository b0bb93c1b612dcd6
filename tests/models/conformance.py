"""What every model family must do, as checks of a tiny model with random weights in float64 and its prompts.

A family's test calls :func:`check_family`. The oracles are independent of the family's class: the model's own logits of
whole rows, transformers' eager attention, and a loop that runs the whole model anew for each token.

Shape suffixes: G responses, N response tokens, F frames, P prompt tokens, L input positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from appo.models.families import Family, family_of, use_pretrained_positions
from appo.models.log_probs import log_probs_at, score_group
from appo.models.prompt import Prompt
from appo.rollout.generation import respond

CLOSE = 1e-9


@dataclass(frozen=True)
class FamilyCase:
    """One family under test.

    Attributes:
        build: makes a tiny model in float64; ``attention`` is the attention implementation.
        prompts: prompts with one video at least, float64 pixels; each may hold images too.
        frames: of each prompt, the true frame of each token, -1 where none: written down by whoever made the prompt.
        positions: of each prompt, P rows of its positions (one number, or time, height and width), by a writing of the
            family's rule that shares no code with it.
        responses: G int64 tensors.
    """

    build: Callable[[str], Any]
    prompts: list[Prompt]
    frames: list[list[int]]
    positions: list[list[list[int]]]
    responses: list[Tensor]


def check_family(case: FamilyCase) -> None:
    """All of it."""
    model = case.build("sdpa")
    for prompt, frames, positions in zip(case.prompts, case.frames, case.positions, strict=True):
        check_tokens(model, prompt, frames)
        check_positions(model, prompt, positions)
        check_packed_is_rows(model, prompt, case.responses)
        check_head(model, prompt, case.responses)
        check_capture_is_eager(model, case.build("eager"), prompt, case.responses, frames)
        check_features_are_pixels(model, prompt, case.responses)
    check_generation_is_greedy(model, case.prompts)
    check_blank_pixels_reach_the_whole_tower(model)


def row_of(model: Any, prompt: Prompt, response: Tensor) -> dict[str, Any]:
    """One response behind its prompt as transformers takes it, from pixels, unpadded."""
    ids_1L = torch.cat([prompt.ids_1P, response[None]], dim=1)
    row = prompt.mapping() | {"input_ids": ids_1L, "attention_mask": torch.ones_like(ids_1L)}
    row.pop("video_spans", None)  # which pictures are frames is nothing to the model
    if prompt.types_1P is not None:
        row["mm_token_type_ids"] = functional.pad(prompt.types_1P, (0, len(response)))
    return row


def close(one: Tensor, two: Tensor, allowed: float = CLOSE) -> bool:
    """Whether they differ by no more than so much of the largest value of the second."""
    return one.shape == two.shape and bool((one - two).abs().max() <= allowed * max(float(two.abs().max()), 1e-3))


def check_tokens(model: Any, prompt: Prompt, frames: list[int]) -> None:
    """Frames are where they truly are, and no placeholder may be sampled."""
    family = family_of(model)
    spans = family.spans(prompt)
    assert spans.frame_L.tolist() == frames
    assert spans.frames == max(frames) + 1
    placeholders = set(prompt.ids_1P[0, torch.tensor(frames) >= 0].tolist())
    assert placeholders <= set(family.banned_ids)
    family.check_time(prompt)


def check_positions(model: Any, prompt: Prompt, positions: list[list[int]]) -> None:
    """By the family = by an independent writing, and a row goes on one by one behind them."""
    family = family_of(model)
    found = family.positions(prompt)
    assert found.reshape(-1, prompt.length).T.tolist() == positions
    after = family.positions_after(found, torch.arange(3))
    assert after.reshape(-1, 3).T.tolist() == [[number + step for number in positions[-1]] for step in range(3)]


def check_packed_is_rows(model: Any, prompt: Prompt, responses: list[Tensor]) -> None:
    """Log-probabilities and the gradients of all parameters, packed, as padded rows, and one plain row at a time."""
    results = []
    for way in ("packed", "rows", "alone"):
        model.zero_grad(set_to_none=True)
        if way == "alone":
            log_probs = [row_log_probs(model, prompt, response) for response in responses]
        else:
            scores = score_group(model, prompt, responses, capture_layers=0, shared_prefix=way == "packed")
            log_probs = [scores.log_probs_GN[g, : len(response)] for g, response in enumerate(responses)]
        joined = torch.cat(log_probs)
        (joined * torch.sin(torch.arange(len(joined)))).sum().backward()
        results.append((joined.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    model.zero_grad(set_to_none=True)
    expected, gradients = results[-1]
    decoder = {id(parameter) for parameter in model.get_decoder().parameters()}
    assert {name for name, parameter in model.named_parameters() if id(parameter) in decoder} <= gradients.keys()
    for log_probs_n, own in results[:2]:
        assert close(log_probs_n, expected)
        assert own.keys() == gradients.keys()
        tower = {id(parameter) for parameter in family_of(model).vision_parameters}
        for name, parameter in model.named_parameters():
            if name in gradients:
                # transformers rotates vision queries in float32: one pass rounds once, G passes round G times.
                assert close(own[name], gradients[name], 1e-6 if id(parameter) in tower else CLOSE), name


def row_log_probs(model: Any, prompt: Prompt, response: Tensor) -> Tensor:
    return _all_log_probs(model, prompt, response).gather(1, response[:, None])[:, 0]


def _all_log_probs(model: Any, prompt: Prompt, response: Tensor) -> Tensor:
    logits_NV = model(**row_of(model, prompt, response)).logits[0, prompt.length - 1 : -1]
    return logits_NV.log_softmax(-1)


@torch.no_grad()
def check_head(model: Any, prompt: Prompt, responses: list[Tensor]) -> None:
    """What the weights compare, the log-probabilities of all words, are those of the model's own logits."""
    known = log_probs_at(model, score_group(model, prompt, responses, capture_layers=0))
    for g, response in enumerate(responses):
        steps = torch.arange(len(response))
        assert close(known(torch.full_like(steps, g), steps), _all_log_probs(model, prompt, response))


@torch.no_grad()
def check_capture_is_eager(
    model: Any, eager: Any, prompt: Prompt, responses: list[Tensor], frames: list[int], layers: int = 2
) -> None:
    """Attention of each response token to each frame, packed, as rows, and of eager = eager's by plain loops."""
    use_pretrained_positions(eager)
    eager.load_state_dict(model.state_dict())
    found = [score_group(model, prompt, responses, capture_layers=layers, shared_prefix=way) for way in (True, False)]
    with mock.patch.object(functional, "softmax", _softmax):
        found.append(score_group(eager, prompt, responses, capture_layers=layers))
    for g, response in enumerate(responses):
        with mock.patch.object(functional, "softmax", _softmax):
            attentions = eager(**row_of(eager, prompt, response), output_attentions=True, use_cache=False).attentions
        expected_NF = torch.zeros(len(response), max(frames) + 1, dtype=torch.float64)
        for n in range(len(response)):
            for f in range(expected_NF.shape[1]):
                tokens = [at for at, frame in enumerate(frames) if frame == f]
                mass = [layer[0, :, prompt.length - 1 + n, tokens].double().mean() for layer in attentions[-layers:]]
                expected_NF[n, f] = sum(mass) / layers
        for scores in found:
            assert scores.frame_attention_GNF is not None
            torch.testing.assert_close(
                scores.frame_attention_GNF[g, : len(response)], expected_NF, rtol=CLOSE, atol=1e-15
            )


def _softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """transformers' eager attention rounds its softmax to float32 even in a float64 model."""
    return x.softmax(dim, None if x.dtype == torch.float64 else dtype)


@torch.no_grad()
def check_features_are_pixels(model: Any, prompt: Prompt, responses: list[Tensor]) -> None:
    """Where the tower's output is reused: the same scores from it, and the pixels are gone."""
    family = family_of(model)
    if not family.reuses_vision:
        return
    encoded = family.encode_vision(prompt)
    assert prompt.has_pixels
    assert not encoded.has_pixels
    passes: list[Any] = []
    hook = family.tower.register_forward_hook(lambda *_: passes.append(1))
    found = [score_group(model, encoded, responses, shared_prefix=shared) for shared in (True, False)]
    hook.remove()
    assert not passes
    expected = score_group(model, prompt, responses)
    for scores in found:
        assert close(scores.log_probs_GN, expected.log_probs_GN)
        assert close(scores.frame_attention_GNF, expected.frame_attention_GNF)
    again = Prompt.of(encoded.mapping())
    assert close(score_group(model, again, responses).log_probs_GN, expected.log_probs_GN)


@torch.no_grad()
def check_generation_is_greedy(model: Any, prompts: list[Prompt], tokens: int = 6) -> None:
    """Prompts of different lengths together, each continued twice = the whole model run anew for each token."""
    family = family_of(model)
    banned = family.banned_ids
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    settings = {"do_sample": False, "max_new_tokens": tokens, "suppress_tokens": banned}
    expected = []
    for prompt in prompts:
        response = torch.empty(0, dtype=torch.long)
        for _ in range(tokens):
            logits_V = model(**row_of(model, prompt, response), use_cache=False).logits[0, -1]
            logits_V[banned] = -torch.inf
            response = torch.cat([response, logits_V.argmax()[None]])
        expected.append([response.tolist()] * 2)
    ways = [prompts]
    if family.reuses_vision:
        ways.append([family.encode_vision(prompt) for prompt in prompts])
    for given in ways:
        sampled = respond(model, 0, given, 2, **settings)
        assert [[ids.tolist() for ids in group] for group in sampled] == expected


def check_blank_pixels_reach_the_whole_tower(model: Any) -> None:
    """Several processes: one that has no picture takes part in the gradient of every parameter before the decoder."""
    family = family_of(model)
    model.zero_grad(set_to_none=True)
    if type(family).run_on_blank_pixels is Family.run_on_blank_pixels:
        return  # the family runs in one process only, and says so
    family.run_on_blank_pixels().backward()
    reached = {id(parameter) for parameter in family.vision_parameters if parameter.grad is not None}
    before = {*map(id, model.parameters())} - {*map(id, model.get_decoder().parameters())}
    assert reached == before - {*map(id, model.get_output_embeddings().parameters())}
    model.zero_grad(set_to_none=True)
