"""What TRL's own vLLM code hands to an engine, with a stand-in for it; the real one: test_vllm_engine.py."""

from __future__ import annotations

import inspect
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from recipes.tiny_policy.processor import build_tokenizer
from trl.generation.vllm_generation import VLLMGeneration

from appo.rollout.vllm import colocate as room
from appo.rollout.vllm.prompts import EngineMismatchError, EnginePrompt
from appo.rollout.vllm.server import VideoClient
from appo.types import Group, Sample, VideoQA
from tests.rollout.vllm_stand_in import StandIn, put_in_place
from tests.support.runs import clips, logged, make_trainer, rows_of

PLACEHOLDERS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return rows_of(clips(tmp_path_factory.mktemp("clips")))


@pytest.fixture
def make(tmp_path, monkeypatch):
    put_in_place(monkeypatch)

    def build(dataset, **settings):
        fixed = {"use_vllm": True, "vllm_mode": "colocate", "max_steps": 1, "max_resampling_rounds": 0}
        return make_trainer(tmp_path / "run", dataset, **{**fixed, **settings})

    return build


@pytest.mark.parametrize(
    ("method", "line", "why"),
    [
        ("generate", 'row["multi_modal_data"] = {"image": img_list if len(img_list) > 1 else img_list[0]}', "carried"),
        ("generate", "self.llm.generate(vllm_prompts, sampling_params=sampling_params", "unpacked behind this call"),
        ("generate", "generation_kwargs.update(self.generation_kwargs)", "banned words go this way"),
        ("generate", '"n": 1,', "a row a response, so rows of a group carry one EnginePrompt"),
        ("sync_weights", "self.llm.reset_prefix_cache()", "after new weights the encoder's cache goes too"),
        ("generate", "self.vllm_client.image_features(all_images[::num_generations])", "features come from ours"),
        ("generate", "self._place_features(prompt_features, prompt_ids)", "and know their places"),
        ("sync_weights", "self.vllm_client.reset_prefix_cache()", "a server's encoder cache goes too"),
        ("sync_weights", "model_executor.driver_worker.model_runner", "where the engine's model is found"),
    ],
)
def test_lines_the_carrying_relies_on(method, line, why):
    assert line in inspect.getsource(getattr(VLLMGeneration, method)), why


def test_the_engine_gets_the_frames_of_training_one_placeholder_a_video_and_banned_words(make, dataset):
    trainer = make(dataset, max_steps=2)
    trainer.train()
    engine = trainer.vllm_generation.llm._llm
    assert len(engine.asked) == 2 * 8
    tokenizer = build_tokenizer()
    pad = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    for first in range(0, len(engine.asked), 4):
        group = engine.asked[first : first + 4]
        for request in group:
            assert request["prompt_token_ids"].count(pad) == 1
            assert request["mm_processor_kwargs"] == {"do_sample_frames": False}
            ((frames, metadata),) = request["multi_modal_data"]["video"]
            assert frames.dtype == np.uint8
            assert len(frames) == len(metadata["frames_indices"])
            assert request["multi_modal_data"]["video"] is group[0]["multi_modal_data"]["video"], "held once a group"
    assert all(call["bad_words"] == PLACEHOLDERS for call in engine.sampling)
    assert engine.settings["logprobs_mode"] == "processed_logprobs"
    assert engine.forgotten == ["encoder", "prefix"] * 2, "once a step, after its weights"
    assert trainer.encoder.videos.decoded == 2 * 2


@pytest.mark.parametrize("method", ["appo", "dapo"])
def test_the_samplers_log_probs_reach_trls_correction_and_agree_with_scoring(make, dataset, method):
    trainer = make(dataset, method=method, max_steps=3, learning_rate=1e-2)
    trainer.train()
    assert max(logged(trainer, "sampling/sampling_logp_difference/mean")) < 0.1, "the mass of banned words apart"
    assert min(logged(trainer, "sampling/importance_sampling_ratio/mean")) > 0
    assert trainer.engine.vllm.checked


def test_scoring_happens_once_for_old_log_probs_and_capture(make, dataset, monkeypatch):
    from appo.rollout import pipeline as pipeline_module

    passes = []
    score = pipeline_module.score_group

    def counting(*args, **kwargs):
        passes.append(kwargs["capture_layers"])
        return score(*args, **kwargs)

    trainer = make(dataset, max_steps=2)
    monkeypatch.setattr(pipeline_module, "score_group", counting)
    trainer.train()
    assert passes == [3] * (1 + 2 * 2), "two groups a rollout, and once ever the check of the engine"


def test_own_words_stay_banned_and_resampled_groups_come_from_the_engine_too(make, dataset):
    trainer = make(dataset, generation_kwargs={"bad_words": ["red"]}, max_resampling_rounds=2)
    trainer.train()
    assert trainer.vllm_generation.llm._llm.sampling[0]["bad_words"] == ["red", *PLACEHOLDERS]


def test_text_alone_takes_the_way_of_trl(make, monkeypatch):
    words = ["what colour is the star ?", "what shape is the red one ?", "which came first ?", "when ?"]
    trainer = make(Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in words]))
    trainer.train()
    asked = trainer.vllm_generation.llm._llm.asked
    assert asked
    assert all(set(request) == {"prompt_token_ids"} for request in asked)


def test_text_beside_videos_is_handed_over_as_text(make, dataset):
    text = {"prompt": [{"role": "user", "content": "when ?"}], "answer": "", "kind": ""}
    rows = [text if number % 2 else dict(row) for number, row in enumerate(dataset)]
    trainer = make(rows_of_mixed(rows), max_steps=3)
    trainer.train()
    kinds = {tuple(sorted(request)) for request in trainer.vllm_generation.llm._llm.asked}
    assert kinds == {("prompt_token_ids",), ("mm_processor_kwargs", "multi_modal_data", "prompt_token_ids")}


def rows_of_mixed(rows):
    parts = [
        {**row, "prompt": [{"role": "user", "content": [{"type": "text", "text": "when ?"}]}]}
        if isinstance(row["prompt"][0]["content"], str)
        else row
        for row in rows
    ]
    return Dataset.from_list(parts)


class Forgetful(StandIn):
    """Never loads the weights it is sent."""

    def _load(self, named):
        pass


class Elsewhere(StandIn):
    """Takes temporal positions from somewhere else."""

    def _answer(self, request, sampling):
        self.engine_model.get_mrope_input_positions = lambda *args: None
        return super()._answer(request, sampling)


class Hurried(StandIn):
    """Loses half of the time."""

    def _read(self, request):
        inputs = super()._read(request)
        return replace(inputs, second_per_grid_ts=inputs.second_per_grid_ts * 2)


class Short(StandIn):
    """Has a processor that keeps fewer frames."""

    def _read(self, request):
        videos = [(frames[:4], data) for frames, data in request["multi_modal_data"]["video"]]
        return super()._read({**request, "multi_modal_data": {"video": videos}})


class Blind(StandIn):
    """Sees blank frames."""

    def _read(self, request):
        videos = [(np.zeros_like(frames), data) for frames, data in request["multi_modal_data"]["video"]]
        return super()._read({**request, "multi_modal_data": {"video": videos}})


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (Forgetful, "log-probabilities of its own responses differ .* it has other weights, or sees another video"),
        (Blind, "log-probabilities of its own responses differ .* it has other weights, or sees another video"),
        (Elsewhere, "without asking for its temporal positions"),
        (Hurried, r"reads token \d+ of a prompt at \(time, height, width\) \[\d+, \d+, \d+\], the training forward"),
        (Short, r"vLLM reads a prompt as \d+ tokens, the training forward as \d+"),
    ],
)
def test_an_engine_that_differs_is_refused_before_the_first_step(make, dataset, monkeypatch, engine, message):
    put_in_place(monkeypatch, engine)
    trainer = make(dataset)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(EngineMismatchError, match=message) as error:
        trainer.train()
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


class Session:
    """Answers a server's addresses, and remembers them."""

    def __init__(self, status: int) -> None:
        self.status, self.asked = status, []

    def post(self, address, **body):
        self.asked.append((address, body.get("json")))
        return SimpleNamespace(status_code=self.status, raise_for_status=lambda: None)


def test_a_server_that_cannot_take_the_positions_of_training_is_refused():
    session = Session(500)
    client = VideoClient(SimpleNamespace(session=session, base_url="http://there"), "model")
    with pytest.raises(
        EngineMismatchError, match=r"http://there .* --worker-extension-cls appo\.rollout\.vllm\.server\.TrainingW"
    ):
        client.image_features([None, [EnginePrompt([1], [1], [("frames", {})], [])]])
    assert session.asked == [("http://there/collective_rpc", {"method": "use_training_positions"})]


def test_a_server_is_given_trls_own_images_and_told_to_forget_all_it_saw():
    session, resets = Session(200), []
    own = SimpleNamespace(
        session=session,
        base_url="there",
        image_features=lambda images: ["theirs", *images],
        reset_prefix_cache=lambda: resets.append(len(session.asked)),
    )
    client = VideoClient(own, "model")
    assert client.image_features([["picture"], None]) == ["theirs", ["picture"], None]
    client.reset_prefix_cache()
    assert session.asked == [("there/reset_encoder_cache", None)]
    assert resets == [1], "before TRL's own reset"
    assert client.base_url == "there"


def test_a_changed_distribution_is_not_compared_and_said_so(make, dataset, monkeypatch, caplog):
    put_in_place(monkeypatch, Blind)
    trainer = make(dataset, top_p=0.9)
    trainer.train()
    assert "with top_p=0.9 vLLM's log-probabilities are of a changed distribution" in caplog.text


def test_the_difference_of_log_probs_leaves_out_what_vllm_does_not_know():
    scores = SimpleNamespace(log_probs_GN=torch.tensor([[-1.0, -2.0], [-3.0, 0.0]]))
    allowed = torch.tensor([[-0.5, 0.0], [0.0, 0.0]])
    none = torch.empty(0)
    samples = [Sample([1, 2], "", none, [-0.25, None]), Sample([3], "", none, [-4.0])]
    group = Group({}, VideoQA("", None, "", ""), samples=samples)
    assert room.log_prob_difference(group, scores, allowed) == pytest.approx((0.25 + 1.0) / 2)


def test_a_request_names_only_what_there_is():
    picture = EnginePrompt([1, 2], [1, 2, 2], videos=[], images=["picture"])
    assert picture.request() == {"prompt_token_ids": [1, 2], "multi_modal_data": {"image": ["picture"]}}
