"""The same through a vLLM server: frames travel as vLLM's own features of them, positions are set in its workers.

The server is started with ``--worker-extension-cls appo.rollout.vllm.server.TrainingWorker`` beside TRL's settings
(docs/vllm.md). Only functions of this module load vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from appo.rollout.vllm.prompts import EngineMismatchError, EnginePrompt, TrainingPositions, check_tokens

EXTENSION = "appo.rollout.vllm.server.TrainingWorker"


class TrainingWorker:
    """What vLLM mixes into the workers of a server, so that the trainer can ask them for its positions."""

    model_runner: Any
    model_config: Any

    def use_training_positions(self) -> str:
        """Read videos at the positions that transformers gives them, as training does. Called through the server."""
        from transformers import AutoModelForImageTextToText

        model = self.model_runner.get_model()
        with torch.device("meta"):
            base = AutoModelForImageTextToText.from_config(self.model_config.hf_config)
        if hasattr(model, "get_mrope_input_positions"):
            model.get_mrope_input_positions = TrainingPositions(base, model.get_mrope_input_positions, remember=False)
        return "positions of training"


class VideoClient:
    """TRL's client of a vLLM server with videos; all that is not said here is the client's own.

    Args:
        client: TRL's ``VLLMClient``.
        model: the name or folder of the model, whose processor vLLM loads.
    """

    def __init__(self, client: Any, model: str) -> None:
        self._client, self._model = client, model
        self._renderer: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def image_features(self, carried: Sequence[Any]) -> Any:
        """vLLM's features of each prompt's videos, in the place of TRL's features of its images.

        Args:
            carried: for each prompt one EnginePrompt in a list, or None; or TRL's own lists of images.

        Raises:
            EngineMismatchError: the server cannot take the positions of training, or vLLM reads other tokens.
        """
        if not any(isinstance(asked[0], EnginePrompt) for asked in carried if asked):
            return self._client.image_features(carried)
        if self._renderer is None:
            self._use_training_positions()
            self._renderer = _renderer(self._model)
        return [None if asked is None else self._features(asked[0]) for asked in carried]

    def _use_training_positions(self) -> None:
        method = {"method": TrainingWorker.use_training_positions.__name__}
        answer = self._client.session.post(f"{self._client.base_url}/collective_rpc", json=method)
        if answer.status_code != 200:
            raise EngineMismatchError(
                f"the vLLM server at {self._client.base_url} cannot read videos at the positions of training: start it "
                f"with --worker-extension-cls {EXTENSION} and VLLM_SERVER_DEV_MODE=1 (docs/vllm.md)"
            )

    def _features(self, prompt: EnginePrompt) -> dict[str, Any]:
        from vllm.entrypoints.scale_out.token_in_token_out.mm_features import extract_mm_features

        (read,) = self._renderer.render_cmpl([prompt.request()], skip_mm_cache=True)
        check_tokens(prompt, read["prompt_token_ids"])
        features: dict[str, Any] = extract_mm_features(read).model_dump(exclude_none=True)
        return features

    def reset_prefix_cache(self) -> None:
        """TRL's call after new weights: what a vision tower of old weights has seen is forgotten too."""
        answer = self._client.session.post(f"{self._client.base_url}/reset_encoder_cache")
        answer.raise_for_status()
        self._client.reset_prefix_cache()


def _renderer(model: str) -> Any:
    """vLLM's own reader of prompts for a model, in this process: a server takes tokens and features, not frames."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.renderers import renderer_from_config

    return renderer_from_config(EngineArgs(model=model, mm_processor_cache_gb=0).create_engine_config())
