"""Scores and weights of the update's own forward pass are those of a scoring pass before it, in every kind of run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from recipes.tiny_policy.build import build_policy
from torch import nn

from appo import APPOConfig, APPOTrainer
from appo.models.log_probs import log_normalizers, score_group
from appo.rollout import pipeline as pipeline_module
from appo.training import trainer as trainer_module
from appo.training.fault_tolerance import NotFiniteError
from appo.world import load_policy
from tests.support.runs import FAST, accuracy_reward, clips
from tests.support.tiny import PromptShape, in_double, random_prompt, random_responses, tiny_model

# Log-probabilities of TRL's fused head, and weights, are float32 whatever the model is.
FLOAT32, EXACT = 1e-6, 1e-12
# Of measured time, not of what was trained.
OF_TIME = ("time/", "step_time", "appo/score_share", "train_")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    """Rows of all kinds: a video, a picture beside one, a picture, text, and a video that comes twice."""
    folder = tmp_path_factory.mktemp("clips")
    questions = clips(folder)
    image = folder / "image.png"
    Image.new("RGB", (70, 56), (200, 30, 30)).save(image)
    videos = [{"type": "video", "video": question.video.path} for question in questions]
    picture = {"type": "image", "image": str(image)}
    shown = [[videos[0]], [videos[1], picture], [picture], [], [videos[2]], [videos[0]]]
    text = {"type": "text", "text": "what colour is the star ?"}
    return Dataset.from_list([{"prompt": [{"role": "user", "content": [*parts, text]}]} for parts in shown])


def lora() -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(target_modules=r".*language_model.*(q_proj|v_proj|down_proj)", r=2, init_lora_weights=False)


def run(
    folder: Any, dataset: Dataset, dtype: torch.dtype = torch.float64, adapter: Any = None, **settings: Any
) -> tuple[APPOTrainer, list[Any], list[Any]]:
    """A short run, what `on_rollout` was called with, and the gradients after each micro-batch."""
    model, processor = load_policy() if settings.get("beta") else build_policy(0)  # TRL loads a reference by its path
    args = APPOConfig(str(folder), **{**FAST, "optim": "sgd", "max_steps": 3, "method": "appo", **settings})
    torch.manual_seed(0)
    trainer = APPOTrainer(
        model.to(dtype), accuracy_reward, args, train_dataset=dataset, processing_class=processor, peft_config=adapter
    )
    rollouts: list[Any] = []
    gradients: list[Any] = []
    trainer.on_rollout = lambda step, groups: rollouts.append((step, groups))
    training_step = trainer.training_step

    def remembering(*given: Any, **kwargs: Any) -> Any:
        loss = training_step(*given, **kwargs)
        gradients.append({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
        return loss

    trainer.training_step = remembering
    trainer.train()
    return trainer, rollouts, gradients


def assert_close(one: Any, two: Any, allowed: float) -> None:
    one, two = torch.as_tensor(one, dtype=torch.float64), torch.as_tensor(two, dtype=torch.float64)
    assert one.shape == two.shape
    if two.numel():
        assert float((one - two).abs().max()) <= allowed * max(float(two.abs().max()), 1e-3)


def assert_same(one: Any, two: Any, allowed: float) -> None:
    """Logs, rollouts and gradients of two runs."""
    (first, rollouts, gradients), (second, others, other_gradients) = one, two
    for mine, other in zip(first.state.log_history, second.state.log_history, strict=True):
        assert mine.keys() == other.keys()
        for name in (name for name in mine if not name.startswith(OF_TIME)):
            assert mine[name] == pytest.approx(other[name], rel=allowed, abs=allowed), name
    assert [step for step, _ in rollouts] == [step for step, _ in others]
    groups = [(step, a, b) for (step, own), (_, theirs) in zip(rollouts, others, strict=True)
              for a, b in zip(own, theirs, strict=True)]  # fmt: skip
    assert any(a.weights is not None for _, a, _ in groups)
    for step, a, b in groups:
        assert [sample.ids for sample in a.samples] == [sample.ids for sample in b.samples]
        assert (a.weights is None) == (b.weights is None) == (not a.timestamps_F)
        assert torch.equal(a.advantages_G, b.advantages_G)
        if a.weights is not None:
            for name in ("weights_GN", "crucial_F", "scores_GF", "chosen_GN"):
                assert_close(getattr(a.weights, name), getattr(b.weights, name), allowed)
            assert torch.equal(a.scores.mask_GN, b.scores.mask_GN)
            for name in ("log_probs_GN", "hidden_GNH", "log_normalizer_GN", "frame_attention_GNF"):
                mask, of_layers = a.scores.mask_GN, name in ("hidden_GNH", "frame_attention_GNF")
                bound = min(allowed, EXACT) if of_layers and not step else allowed
                assert_close(getattr(a.scores, name)[mask], getattr(b.scores, name)[mask], bound)
    assert len(gradients) == len(other_gradients) > 0
    for own, theirs in zip(gradients, other_gradients, strict=True):
        assert own.keys() == theirs.keys()
        for name, gradient in own.items():
            assert_close(gradient, theirs[name], allowed)


CASES: dict[str, dict[str, Any]] = {
    "micro-batches": {},
    "one micro-batch": {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 8},
    "a rollout a micro-batch": {"steps_per_generation": 1},
    "chunks": {"rows_per_chunk": 3},
    "checkpointing": {"gradient_checkpointing": True},
    "a trained tower": {"freeze_vision_tower": False},
    "a reference": {"beta": 0.1},
    "dynamic sampling": {"max_resampling_rounds": 2},
    "base weight": {"base_weight": 0.2, "strategy": "hard", "divergence": "k3"},
    "adapters": {"adapter": True},
    "adapters, chunks, checkpointing": {"adapter": True, "rows_per_chunk": 1, "gradient_checkpointing": True},
    "float32": {"dtype": torch.float32},
    "autocast": {"dtype": torch.float32, "bf16": True},
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_without_a_scoring_pass_is_the_run_with_one(tmp_path, dataset, monkeypatch, name):
    settings = dict(CASES[name])
    adapter = lora() if settings.pop("adapter", False) else None
    passes = []
    score = pipeline_module.score_group
    monkeypatch.setattr(pipeline_module, "score_group", lambda *a, **k: passes.append(1) or score(*a, **k))
    own = run(tmp_path / "own", dataset, adapter=adapter, **settings)
    assert not passes
    monkeypatch.setattr(trainer_module, "scores_first", lambda *given: "the test asks for it")
    first = run(tmp_path / "first", dataset, adapter=adapter, **settings)
    assert passes
    allowed = {"float32": 1e-4, "autocast": 0.02}.get(name, FLOAT32)
    assert_same(own, first, allowed)


NEEDED = {
    "several updates": {"steps_per_generation": 4},
    "iterations": {"num_iterations": 2},
    "ordinary rows": {"shared_prefix": False},
    "mean one": {"normalize_weights": True},
    "relative attention": {"frame_attention": "relative"},
    "truncated are masked": {"mask_truncated_completions": True},
}


@pytest.mark.parametrize("name", [*NEEDED, "adapters with dropout", "dropout of attention"])
def test_a_scoring_pass_stays_where_weights_need_more_than_one_forward_pass(tmp_path, dataset, name):
    model, processor = build_policy(0)
    adapter = lora() if "adapters" in name else None
    if adapter is not None:
        adapter.lora_dropout = 0.1
    if name == "dropout of attention":
        model.config.get_text_config().attention_dropout = 0.1
    args = APPOConfig(str(tmp_path), **{**FAST, "method": "appo", **NEEDED.get(name, {})})
    trainer = APPOTrainer(
        model, accuracy_reward, args, train_dataset=dataset, processing_class=processor, peft_config=adapter
    )
    assert trainer.scores_first
    assert not trainer.pipeline.settings.in_update


def test_numbers_that_are_not_finite_are_the_losss_to_report_with_a_replay(tmp_path, dataset):
    """The weights cannot be made of them, and must not be what stops the run: the loss keeps the step for a replay."""
    model, processor = build_policy(0)
    args = APPOConfig(str(tmp_path), **{**FAST, "method": "appo"})
    trainer = APPOTrainer(model, accuracy_reward, args, train_dataset=dataset, processing_class=processor)
    sample = trainer.pipeline.sample

    def breaking(*given: Any) -> Any:
        groups = sample(*given)
        with torch.no_grad():
            trainer.base_model.model.language_model.layers[-1].mlp.down_proj.weight[0] = torch.nan
        return groups

    trainer.pipeline.sample = breaking  # type: ignore[method-assign]
    with pytest.raises(NotFiniteError, match="appo replay"):
        trainer.train()


@pytest.mark.parametrize("kind", ["plain", "bias", "softcap"])
def test_normalisers_from_one_words_log_probability_are_those_over_the_vocabulary(kind):
    model, prompt = tiny_model(dtype=torch.float64), in_double(random_prompt(PromptShape()))
    model.config.get_text_config().final_logit_softcapping = 2.0 if kind == "softcap" else None
    if kind == "bias":
        head = model.get_output_embeddings()
        head.bias = nn.Parameter(torch.randn(len(head.weight), dtype=torch.float64))
    responses = random_responses([3, 1, 4])
    scores = score_group(model, prompt, responses, temperature=0.7)
    ids_GN = nn.utils.rnn.pad_sequence(responses, batch_first=True)
    found_GN = log_normalizers(model, scores.hidden_GNH, ids_GN, scores.log_probs_GN.detach(), 0.7)
    mask_GN = scores.mask_GN
    torch.testing.assert_close(found_GN[mask_GN], scores.log_normalizer_GN[mask_GN], rtol=1e-12, atol=1e-12)
