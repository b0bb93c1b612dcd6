"""``mask_truncated_completions``: responses and groups of which nothing is trained, packed as in ordinary rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from trl.trainer.utils import add_fused_lm_head

from appo.models.frame_attention import use_appo_attention
from appo.rollout.generation import respond
from appo.training import trl_engine
from appo.training.update import PackedModel
from tests.support.runs import clips, logged, make_trainer, rows_of
from tests.support.tiny import PromptShape, random_prompt, random_responses, tiny_model

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
PROMPTS = [random_prompt(PromptShape(), 1), random_prompt(PromptShape(videos=((2, 2, 1),), text=3), 2)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return rows_of(clips(tmp_path_factory.mktemp("clips")))


def packed_call(model: Any, kept: list[list[bool]], rows_per_chunk: int) -> tuple[Any, dict[str, torch.Tensor | None]]:
    """Two groups of three responses through TRL's own head; what is read of it, and gradients of its sum."""
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    use_appo_attention(model)
    ids, labels = [], []
    longest = max(prompt.length for prompt in PROMPTS)
    for prompt, row_kept in zip(PROMPTS, kept, strict=True):
        for response, is_kept in zip(random_responses([4, 4, 4]), row_kept, strict=True):
            own = prompt.ids_1P[0]
            pad = torch.zeros(longest - len(own), dtype=torch.long)
            ids.append(torch.cat([pad, own, response]))
            ignored = torch.full((longest,), -100)
            labels.append(torch.cat([ignored, response if is_kept else torch.full_like(response, -100)]))
    packed = PackedModel(model, PROMPTS, 3, model, rows_per_chunk)
    outputs = packed(torch.stack(ids), labels=torch.stack(labels), attention_mask=None, fused_lm_head=True)
    (outputs.log_probs.sum() + outputs.entropy.sum()).backward()
    return outputs, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("rows_per_chunk", [0, 1, 2])
def test_masked_responses_give_zeros_and_change_no_other(rows_per_chunk):
    whole, _ = packed_call(tiny_model(), [[True] * 3] * 2, 0)
    outputs, _ = packed_call(tiny_model(), [[True, False, True], [False] * 3], rows_per_chunk)
    for found, expected in ((outputs.log_probs, whole.log_probs), (outputs.entropy, whole.entropy)):
        assert found.shape == expected.shape
        torch.testing.assert_close(found[[0, 2]], expected[[0, 2]])
        assert (found[[1, 3, 4, 5]] == 0).all()


@pytest.mark.parametrize("rows_per_chunk", [0, 1, 2])
def test_a_batch_of_which_nothing_is_trained_still_reaches_every_parameter(rows_per_chunk):
    """With zeros: DDP and FSDP wait for every gradient, on the process too that has nothing to train."""
    outputs, gradients = packed_call(tiny_model(), [[False] * 3] * 2, rows_per_chunk)
    assert (outputs.log_probs == 0).all()
    assert (outputs.entropy == 0).all()
    language = [gradient for name, gradient in gradients.items() if "visual" not in name]
    assert len(language) > 10
    assert all(gradient is not None and not gradient.any() for gradient in language)


def test_every_process_calls_every_layer_as_often_whatever_is_masked():
    calls = []
    for kept in ([[True] * 3] * 2, [[False] * 3, [True, False, False]], [[False] * 3] * 2):
        model = tiny_model()
        count: list[int] = []
        layer = model.model.language_model.layers[0]
        layer.register_forward_hook(lambda *_, count=count: count.append(1))
        packed_call(model, kept, 1)
        calls.append(len(count))
    assert calls[0] == calls[1] == calls[2] > 0


# --- through the trainer ------------------------------------------------------------------------------------------

ENDED = {
    "nothing": [[0, 0, 0, 0], [0, 0, 0, 0]],
    "one response a group": [[0, 0, 1, 0], [1, 0, 0, 0]],
    "one group": [[1, 1, 0, 1], [0, 0, 0, 0]],
}


def ending(ended: list[list[int]], end: int):
    """Sampling whose responses end with the end-of-sequence token, or nowhere, as told for each group of a rollout."""

    def sample(*args, **kwargs):
        groups = respond(*args, **kwargs)
        for ids_G, ended_G in zip(groups, ended, strict=True):
            for ids, has_ended in zip(ids_G, ended_G, strict=True):
                ids[ids == end] = 5
                ids[-1] = end if has_ended else 5
        return groups

    return sample


def train(folder, dataset, monkeypatch, ended, **settings):
    """Two steps of two groups; the trainer and the gradients of each micro-batch."""
    truncated = {"mask_truncated_completions": True, "max_resampling_rounds": 0, "overlong_cache": 0, "max_steps": 2}
    # Adam divides by the size of a gradient: without epsilon, one that is nothing but rounding makes a whole step.
    truncated |= {"adam_epsilon": 1e-2}
    trainer = make_trainer(folder, dataset, **truncated, **settings)
    monkeypatch.setattr(trl_engine, "respond", ending(ended, trainer.processing_class.tokenizer.eos_token_id))
    step, gradients = trainer.training_step, []

    def remembering(*args, **kwargs):
        loss = step(*args, **kwargs)
        gradients.append({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None})
        return loss

    trainer.training_step = remembering
    trainer.train()
    return trainer, gradients


@pytest.mark.parametrize(
    ("settings", "rows_per_chunk"),
    [({"method": "dapo"}, 0), ({"method": "appo"}, 1), ({"method": "appo", "steps_per_generation": 4}, 2)],
)
@pytest.mark.parametrize("ended", ENDED)
def test_truncated_responses_train_as_in_ordinary_rows(tmp_path, dataset, monkeypatch, settings, rows_per_chunk, ended):
    groups = ENDED[ended] * (settings.get("steps_per_generation", 2) // 2)
    chunks = {**settings, "rows_per_chunk": rows_per_chunk}
    packed, packed_grads = train(tmp_path / "packed", dataset, monkeypatch, groups, **chunks)
    rows, row_grads = train(tmp_path / "rows", dataset, monkeypatch, groups, shared_prefix=False, **settings)
    assert logged(packed, "completions/clipped_ratio") == logged(rows, "completions/clipped_ratio")
    for name in ("loss", "entropy", "grad_norm"):
        assert len(logged(rows, name)) == 2
        torch.testing.assert_close(torch.tensor(logged(packed, name)), torch.tensor(logged(rows, name)), **CLOSE)
    assert (max(logged(rows, "grad_norm")) == 0) == (ended == "nothing")
    assert len(packed_grads) == len(row_grads) == 4
    for ours, theirs in zip(packed_grads[:2], row_grads[:2], strict=True):  # then parameters have begun to differ
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            assert float((ours[name] - gradient).abs().max()) <= 1e-4 * max(float(gradient.abs().max()), 1e-2), name
