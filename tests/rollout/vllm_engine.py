"""The real vLLM engine on a CPU, one for all tests of a process: what TRL would build, in float32 and able to learn."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

from tests.rollout.vllm_stand_in import forget_ranks

# Read when vllm is imported or an engine is built: in this process, 1 GiB of cache, threads left to the system.
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


@cache
def the_engine(**settings: Any) -> Any:
    """vLLM's ``LLM`` with TRL's settings, kept for the next trainer: a process holds one.

    TRL chooses no dtype (vLLM then takes bfloat16), and vLLM for CPUs packs linear weights away when it has loaded
    them, which leaves TRL's synchronisation nothing to load into. Both are changed here for the tests alone.
    """
    import torch
    from vllm import LLM
    from vllm.model_executor.layers import utils

    def unpacked(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    packing, utils.dispatch_cpu_unquantized_gemm = utils.dispatch_cpu_unquantized_gemm, unpacked
    try:
        return LLM(**settings, dtype="float32", enforce_eager=True)
    finally:
        utils.dispatch_cpu_unquantized_gemm = packing


def prepare(monkeypatch: Any) -> None:
    """Have TRL build (or find) the engine of these tests."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    from trl.generation import vllm_generation

    forget_ranks(monkeypatch)
    monkeypatch.setattr(vllm_generation, "LLM", the_engine)


def model_of(llm: Any) -> Any:
    """vLLM's own model."""
    return llm.llm_engine.model_executor.driver_worker.model_runner.get_model()


def vllm_settings(output: Path) -> dict[str, Any]:
    """Settings of a run through the engine; the same for all, as the engine is."""
    return {"output_dir": str(output), "use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 512}
