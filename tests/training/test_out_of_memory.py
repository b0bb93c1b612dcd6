"""Where memory ends, one line names the settings that lower what a run needs, with their values."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from appo import APPOConfig
from appo.cli.main import main
from appo.training import trl_engine
from appo.training.out_of_memory import TooLittleMemoryError, named_memory_errors, remedies
from tests.support.runs import FAST

CUDA = (
    "CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has a total capacity of 79.15 GiB of which 1.02 GiB is "
    "free. Including non-PyTorch memory, this process has 78.1 GiB memory in use."
)


def config_of(**settings: Any) -> APPOConfig:
    return APPOConfig("unused", **{**FAST, "per_device_train_batch_size": 8, **settings})


def test_settings_come_in_order_with_their_values() -> None:
    with pytest.raises(TooLittleMemoryError) as error, named_memory_errors(config_of()):
        raise torch.OutOfMemoryError(CUDA)
    assert str(error.value) == (
        "out of memory (2.25 GiB more were asked for): change, in this order, rows_per_chunk (0: all 4 at once), "
        "per_device_train_batch_size (8, with more gradient_accumulation_steps), video_max_frames (16), "
        "max_completion_length (8), gradient_checkpointing (false: set it to true); what fits: appo plan"
    )


@pytest.mark.parametrize(
    ("settings", "first", "last"),
    [
        ({"rows_per_chunk": 2}, "rows_per_chunk (2)", "gradient_checkpointing"),
        ({"rows_per_chunk": 1}, "per_device_train_batch_size (8", "gradient_checkpointing"),
        ({"shared_prefix": False, "per_device_train_batch_size": 4}, "video_max_frames (16)", "gradient_checkpointing"),
        ({"gradient_checkpointing": True}, "rows_per_chunk (0: all 4", "max_completion_length (8)"),
        ({"method": "sft", "video_max_frames": 4}, "per_device_train_batch_size (8", "gradient_checkpointing"),
    ],
)
def test_what_cannot_be_lowered_is_left_out(settings, first, last) -> None:
    found = remedies(config_of(**settings))
    assert found[0].startswith(first)
    assert found[-1].startswith(last)
    if settings.get("method") == "sft":
        assert not [line for line in found if line.startswith(("rows_per_chunk", "max_completion", "video_max"))]


def test_the_cpu_allocator_and_python_are_understood() -> None:
    """The real error of torch on a CPU: more than any machine has."""
    message = r"^out of memory \(\d+\.\d\d GB more were asked for\): change"
    with pytest.raises(TooLittleMemoryError, match=message), named_memory_errors(config_of()):
        torch.empty(1 << 55, dtype=torch.uint8)
    with pytest.raises(TooLittleMemoryError, match=r"^out of memory: change"), named_memory_errors(config_of()):
        raise MemoryError


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match=r"^shapes$"), named_memory_errors(config_of()):
        raise RuntimeError("shapes")


def test_the_command_exits_with_2_and_one_line(tmp_path, capsys, monkeypatch) -> None:
    def hungry(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError(CUDA)

    monkeypatch.setattr(trl_engine, "respond", hungry)
    assert main(["train", "--tiny", "--output_dir", str(tmp_path / "run")]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(
        "appo: out of memory (2.25 GiB more were asked for): change, in this order, rows_per_chunk (0"
    )
    assert "Traceback" not in line
