"""A stand-in for vLLM's ``LLM`` below TRL's own code: it reads requests as vLLM does and answers with transformers."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from recipes.tiny_policy.build import build_policy
from trl.generation import vllm_generation

from appo.models.log_probs import log_probs_at, score_group
from appo.models.prompt import Prompt
from appo.rollout.generation import respond


class StandIn:
    """Copies the weights it is sent, expands one placeholder a video itself, and reports log-probabilities.

    Attributes:
        asked: all requests, in order.
        sampling: the sampling parameters of each call.
        forgotten: names of the caches it was told to forget.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.model, self.processor = build_policy(1)
        self.asked: list[dict[str, Any]] = []
        self.sampling: list[dict[str, Any]] = []
        self.forgotten: list[str] = []
        self.model_config = SimpleNamespace(dtype=torch.float32)
        self.engine_model = SimpleNamespace(load_weights=self._load, get_mrope_input_positions=self._no_positions)
        runner = SimpleNamespace(model=self.engine_model, get_model=lambda: self.engine_model)
        worker = SimpleNamespace(model_runner=runner)
        self.llm_engine = SimpleNamespace(
            model_executor=SimpleNamespace(driver_worker=worker),
            reset_encoder_cache=lambda: self.forgotten.append("encoder"),
        )

    def reset_prefix_cache(self) -> None:
        self.forgotten.append("prefix")

    def _load(self, named: list[tuple[str, torch.Tensor]]) -> None:
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in named:
                parameters[name].copy_(value)

    def _no_positions(self, *args: Any) -> Any:
        raise AssertionError("videos are read at the positions of training, text alone asks for none here")

    def generate(self, requests: list[dict[str, Any]], sampling_params: Any, use_tqdm: bool) -> list[Any]:
        """One output a request, as vLLM gives them: prompt ids expanded, token ids and log-probabilities."""
        self.asked += requests
        self.sampling.append(vars(sampling_params))
        return [self._answer(request, sampling_params) for request in requests]

    def _answer(self, request: dict[str, Any], sampling: Any) -> Any:
        inputs = self._read(request)
        if inputs.has_video:
            self.engine_model.get_mrope_input_positions(inputs.ids_1P[0].tolist(), [_feature(inputs)])
        banned = self.processor.tokenizer.convert_tokens_to_ids(sampling.bad_words)
        ((ids,),) = respond(
            self.model.eval(), 0, [inputs], 1, do_sample=True, top_k=0, max_new_tokens=sampling.max_tokens,
            suppress_tokens=banned,
        )  # fmt: skip
        log_probs = self._log_probs(inputs, ids, banned)
        reported = [{int(t): SimpleNamespace(logprob=p, rank=1)} for t, p in zip(ids, log_probs, strict=True)]
        output = SimpleNamespace(token_ids=ids.tolist(), logprobs=reported)
        return SimpleNamespace(prompt_token_ids=inputs.ids_1P[0].tolist(), outputs=[output])

    def _read(self, request: dict[str, Any]) -> Prompt:
        ids = request["prompt_token_ids"]
        if "multi_modal_data" not in request:
            ids_1P = torch.tensor([ids])
            return Prompt(ids_1P, torch.zeros_like(ids_1P))
        videos = request["multi_modal_data"]["video"]
        text = self.processor.tokenizer.decode(ids)
        assert text.count("<|video_pad|>") == len(videos), "vLLM expands placeholders itself"
        return Prompt.of(self.processor(
            text=[text], videos=[frames for frames, _ in videos], video_metadata=[data for _, data in videos],
            return_tensors="pt", **request["mm_processor_kwargs"],
        ))  # fmt: skip

    @torch.no_grad()
    def _log_probs(self, inputs: Prompt, ids: torch.Tensor, banned: list[int]) -> list[float]:
        scores = score_group(self.model, inputs, [ids], capture_layers=0, shared_prefix=False)
        words_nV = log_probs_at(self.model, scores)(torch.zeros(len(ids)).long(), torch.arange(len(ids)))
        words_nV[:, banned] = -torch.inf
        return words_nV.log_softmax(-1).gather(1, ids[:, None])[:, 0].tolist()


def _feature(inputs: Prompt) -> Any:
    names = ("video_grid_thw", "second_per_grid_ts")
    return SimpleNamespace(data={name: SimpleNamespace(data=inputs.mapping()[name][0]) for name in names})


def put_in_place(monkeypatch: Any, engine: Callable[..., Any] = StandIn) -> None:
    """Have TRL's own vLLM code find a stand-in where vLLM would be."""
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda *args, **kwargs: True)
    monkeypatch.setattr(vllm_generation, "LLM", engine, raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", SimpleNamespace, raising=False)
    forget_ranks(monkeypatch)


def forget_ranks(monkeypatch: Any) -> None:
    """TRL leaves the variables of a distributed run behind, which the next trainer of this process would obey."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
