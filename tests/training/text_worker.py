"""One of several processes that train on text alone, first by TRL's own trainer, then by the project's.

Called by tests/training/test_drop_in.py: ``python text_worker.py folder``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from tests.support.runs import logged
from tests.training.side_by_side import same_trainer, stock_trainer


def main(folder: Path) -> None:
    """Two rows a process: every group of four has its responses in both."""
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 4}
    results: list[dict[str, Any]] = []
    for make in (stock_trainer, same_trainer):
        trainer = make(folder, "vision-language", settings=settings)
        trainer.train()
        parameters = [value.detach() for value in trainer.accelerator.unwrap_model(trainer.model).parameters()]
        results.append({"log": {name: logged(trainer, name) for name in ("loss", "reward")}, "parameters": parameters})
    if PartialState().is_main_process:
        torch.save(results, folder / "results.pt")
    PartialState().wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
