"""The trainer on what is not just one video a prompt: images, text, a reference model, adapters."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from PIL import Image
from recipes.tiny_policy.build import build_policy

from appo import APPOConfig, APPOTrainer
from appo.rollout.generation import has_video
from appo.world import load_policy, policy_path
from tests.support.runs import FAST, accuracy_reward, clips, logged, make_trainer, rows_of


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return clips(tmp_path_factory.mktemp("clips"))


def prompt_of(*parts):
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "what colour is the star ?"}]}]


def test_video_image_and_text_prompts_train_in_one_batch(tmp_path, questions):
    """SEED-Bench-R1 has an image beside the video, and rows with an image only; text-only rows may be mixed in."""
    image = tmp_path / "image.png"
    Image.new("RGB", (70, 56), (200, 30, 30)).save(image)
    video, picture = {"type": "video", "video": questions[0].video.path}, {"type": "image", "image": str(image)}
    prompts = [prompt_of(video, picture), prompt_of(picture), prompt_of(video), prompt_of()]
    dataset = Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    runs = {}
    for shared_prefix in (True, False):
        settings = {"max_steps": 2, "gradient_accumulation_steps": 4, "shared_prefix": shared_prefix}
        trainer = make_trainer(tmp_path / str(shared_prefix), dataset, method="appo", **settings)
        groups = []
        trainer.on_rollout = lambda step, scored, groups=groups: groups.extend(scored)
        trainer.train()
        runs[shared_prefix] = logged(trainer, "loss")
        assert {len(group.timestamps_F) for group in groups} == {0, 8}
        for group in groups:
            assert (group.weights is None) == (len(group.timestamps_F) == 0), "weights need frames"
            if group.weights is not None:
                assert group.scores.frame_attention_GNF.shape[-1] == 8
    torch.testing.assert_close(torch.tensor(runs[True]), torch.tensor(runs[False]), rtol=1e-4, atol=1e-5)


def test_a_text_only_rollout_is_never_joined_by_a_video(tmp_path, questions):
    """Dynamic sampling draws from the whole dataset, but TRL's own path cannot carry videos."""

    def flat(completions, **kwargs):
        return [0.0] * len(completions)

    rows = [{"prompt": prompt_of({"type": "video", "video": q.video.path})} for q in questions[:2]]
    dataset = Dataset.from_list([*rows, {"prompt": prompt_of()}, {"prompt": prompt_of()}])
    settings = {"max_resampling_rounds": 2, "max_steps": 4, "gradient_accumulation_steps": 1, "overlong_cache": 0}
    trainer = make_trainer(tmp_path, dataset, rewards=flat, method="dapo", **settings)
    kinds = []
    sample = trainer.pipeline.sample

    def spying(rows, responses, vision):
        kinds.append((vision, any(has_video(row["prompt"]) for row in rows)))
        return sample(rows, responses, vision)

    trainer.pipeline.sample = spying
    trainer.train()
    assert len(kinds) == 4 * 3, "four rollouts of one group, each with two rounds of resampling"
    assert (False, True) not in kinds
    assert {(True, True), (False, False)} <= set(kinds)


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_the_reference_model_starts_as_the_policy_it_was_given(tmp_path, questions, shared_prefix):
    """TRL loads it from the path in the configuration, whatever has happened to the policy since."""
    model, processor = load_policy()
    with torch.no_grad():
        model.model.language_model.norm.weight.mul_(1.5)
    settings = {**FAST, "max_steps": 2, "beta": 0.1, "method": "grpo", "shared_prefix": shared_prefix}
    args = APPOConfig(str(tmp_path), **settings)
    trainer = APPOTrainer(model, accuracy_reward, args, train_dataset=rows_of(questions), processing_class=processor)
    trainer.train()
    first, second = logged(trainer, "kl")
    assert first == pytest.approx(0.0, abs=1e-6)
    assert second > 1e-6


def test_more_attention_layers_than_the_model_has_are_refused_at_the_start(tmp_path, questions):
    """Both numbers, before anything is sampled; methods that capture nothing do not mind."""
    depth = build_policy(0)[0].config.get_text_config().num_hidden_layers
    with pytest.raises(ValueError, match=f"^attention_layers .* 1 .* {depth} decoder layers, got {depth + 1}$"):
        make_trainer(tmp_path, rows_of(questions), method="appo", attention_layers=depth + 1)
    make_trainer(tmp_path, rows_of(questions), method="appo", attention_layers=depth)
    make_trainer(tmp_path, rows_of(questions), method="dapo", attention_layers=depth + 1)


def test_lora_adapters_train_and_nothing_else(tmp_path, questions):
    peft = pytest.importorskip("peft")
    model, processor = build_policy(0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    args = APPOConfig(str(tmp_path), **{**FAST, "max_steps": 2, "method": "appo"})
    config = peft.LoraConfig(target_modules=r".*language_model.*(q_proj|v_proj)", r=2)
    trainer = APPOTrainer(
        model, accuracy_reward, args, train_dataset=rows_of(questions), processing_class=processor, peft_config=config
    )
    trainer.train()
    trained = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert trained
    assert all("lora" in name for name in trained)
    assert any(float(value.detach().abs().max()) > 0 for name, value in trained.items() if "lora_B" in name)
    base = trainer.model.get_base_model().state_dict()
    for name, value in before.items():
        kept = base[name] if name in base else base[name.replace("_proj.", "_proj.base_layer.")]
        assert torch.equal(kept, value), name


def test_a_model_given_by_its_folder_is_loaded_with_its_processor(tmp_path, questions):
    """As in the README: TRL loads both."""
    args = APPOConfig(str(tmp_path), **{**FAST, "max_steps": 1, "method": "appo"})
    trainer = APPOTrainer(str(policy_path()), [accuracy_reward], args, train_dataset=rows_of(questions))
    trainer.train()
    assert len(logged(trainer, "appo/mean_weight")) == 1
    assert not any(parameter.requires_grad for parameter in trainer.model.model.visual.parameters())
