"""A resumed run equals the undisturbed one, bit for bit: parameters, optimiser, metrics, records."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling

from appo.reports.jsonl import RecordError
from appo.rollout.dynamic_sampling import FreshRows
from appo.training.atomic_checkpoint import CheckpointError
from appo.training.trainer_state import as_saved, plain
from tests.support.runs import rows_of
from tests.training.resume_cases import (
    begin,
    differences,
    flat_often,
    go_on,
    killed_after,
    metrics_of,
    questions,
    recorded,
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return rows_of(questions(tmp_path_factory.mktemp("clips")))


# --- identities -------------------------------------------------------------------------------------------------------

# Settings, and the steps after which the run is killed. An epoch has 3 steps (or 6 of two iterations).
RUNS: dict[str, tuple[dict[str, Any], list[int]]] = {
    "dynamic sampling, within and between epochs": ({"rewards": flat_often}, [1, 3, 5]),
    "two iterations on a rollout": ({"num_iterations": 2}, [3]),
    "two steps to a rollout": ({"steps_per_generation": 4, "max_steps": 4, "gradient_accumulation_steps": 2}, [1]),
    "pixels, for a tower that trains": ({"num_iterations": 2, "freeze_vision_tower": False, "max_steps": 4}, [1]),
    "logged every fourth step": ({"logging_steps": 4, "num_iterations": 2}, [1, 5]),
    "method dapo": ({"method": "dapo", "max_steps": 4}, [2]),
}


@pytest.mark.parametrize(("settings", "steps"), RUNS.values(), ids=RUNS.keys())
def test_a_resumed_run_equals_the_undisturbed_one(
    tmp_path: Path, rows: Dataset, settings: dict[str, Any], steps: list[int]
) -> None:
    whole = begin(tmp_path / "whole", rows, **settings)
    lines = metrics_of(tmp_path / "whole")
    assert any(line.get("grad_norm", 0) > 0 for line in lines), "something was learned"
    if settings.get("rewards") is flat_often:
        assert sum(line["resampling/replaced_groups"] > 0 for line in lines[:-1]) >= 3, "fresh rows were drawn"
    for step in steps:
        resumed = go_on(killed_after(tmp_path / "whole", tmp_path / f"from-{step}", step), rows, **settings)
        assert differences(resumed, whole) == [], f"resumed after step {step}"


@pytest.mark.parametrize(
    ("part", "settings", "step"),
    [
        ("fresh rows", {"rewards": flat_often}, 3),
        ("rollout", {"num_iterations": 2}, 3),
        ("loop", {"logging_steps": 4}, 3),
    ],
)
def test_each_part_of_the_state_is_needed(
    tmp_path: Path, rows: Dataset, part: str, settings: dict[str, Any], step: int
) -> None:
    """The control of the test above: without this part the run differs."""
    settings = {**settings, "max_steps": step + 3}
    whole = begin(tmp_path / "whole", rows, **settings)
    folder = killed_after(tmp_path / "whole", tmp_path / "resumed", step)
    file = folder / f"checkpoint-{step}" / "state-0.pt"
    state = torch.load(file, weights_only=True)
    size = file.stat().st_size
    torch.save({name: value for name, value in state.items() if name != part}, file)
    manifest = file.with_name("manifest.json")
    manifest.write_text(manifest.read_text().replace(f'"state-0.pt": {size}', f'"state-0.pt": {file.stat().st_size}'))
    assert differences(go_on(folder, rows, **settings), whole)


def test_adapters_resume_exactly(tmp_path: Path, rows: Dataset) -> None:
    settings = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1), "max_steps": 4}
    whole = begin(tmp_path / "whole", rows, **settings)
    assert differences(go_on(killed_after(tmp_path / "whole", tmp_path / "on", 2), rows, **settings), whole) == []


def test_a_finished_run_trains_no_further(tmp_path: Path, rows: Dataset) -> None:
    """As after a kill between the last checkpoint and the summary."""
    whole = begin(tmp_path / "whole", rows, max_steps=2)
    folder = killed_after(tmp_path / "whole", tmp_path / "again", 2)
    (folder / "metrics.jsonl").write_bytes(b"".join((folder / "metrics.jsonl").read_bytes().splitlines(True)[:2]))
    assert differences(go_on(folder, rows, max_steps=2), whole) == []
    assert [line["step"] for line in metrics_of(folder)] == [1, 2, 2]


def test_checkpoints_of_the_resumed_run_rotate_and_can_be_resumed_again(tmp_path: Path, rows: Dataset) -> None:
    whole = begin(tmp_path / "whole", rows, save_total_limit=2)
    assert sorted(path.name for path in (tmp_path / "whole").glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]
    assert (
        differences(go_on(killed_after(tmp_path / "whole", tmp_path / "on", 5), rows, save_total_limit=2), whole) == []
    )
    assert sorted(path.name for path in (tmp_path / "on").glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]


# --- what cannot be resumed -------------------------------------------------------------------------------------------


def test_other_data_is_refused(tmp_path: Path, rows: Dataset) -> None:
    begin(tmp_path / "run", rows, max_steps=2)
    with pytest.raises(
        CheckpointError, match=r"checkpoint-2: cannot be resumed from: it was written with 7 rows, now "
    ):
        recorded(tmp_path / "run", rows.select(range(6)), max_steps=3).train(resume_from_checkpoint=True)


def test_records_that_lost_lines_are_refused(tmp_path: Path, rows: Dataset) -> None:
    begin(tmp_path / "run", rows, max_steps=2)
    (tmp_path / "run" / "rollouts.jsonl").write_text("")
    with pytest.raises(RecordError, match=r"rollouts.jsonl: has 0 bytes, but had \d+ when the checkpoint was taken"):
        recorded(tmp_path / "run", rows, max_steps=3).train(resume_from_checkpoint=True)


def test_without_a_checkpoint_training_does_not_begin(tmp_path: Path, rows: Dataset) -> None:
    begin(tmp_path / "run", rows, max_steps=1, save_strategy="no")
    with pytest.raises(CheckpointError, match="run: no complete checkpoint to resume from"):
        recorded(tmp_path / "run", rows).train(resume_from_checkpoint=True)


# --- streams and values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("iterable", [False, True])
def test_the_stream_of_fresh_rows_goes_on_from_any_state(iterable: bool) -> None:
    table = Dataset.from_dict({"n": list(range(5))})
    data = table.to_iterable_dataset() if iterable else table
    stream = FreshRows(data, seed=3)
    expected = [row["n"] for row in FreshRows(data, seed=3).draw(23)]
    assert sorted(expected[:5]) == sorted(expected[5:10]) == list(range(5))
    assert expected[:5] != expected[5:10], "each pass has an order of its own"
    for drawn in range(12):
        again = FreshRows(data, seed=99)
        again.restore(as_saved(torch_round_trip(plain(stream.state()))))
        assert [row["n"] for row in again.draw(10)] == expected[drawn : drawn + 10]
        stream.draw(1)


def torch_round_trip(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_state_comes_back_as_it_was() -> None:
    features = BaseModelOutputWithPooling(
        pooler_output=(torch.arange(6).view(2, 3), torch.zeros(0, dtype=torch.bfloat16))
    )
    state = {
        "a": [1, 2.5, None, True, "x"],
        "vision": [{"mm": {"video": features}}],
        "grid": (torch.tensor(3),),
        "s": {},
    }
    back = as_saved(torch_round_trip(plain(state)))
    assert back["a"] == state["a"]
    assert type(back["grid"]) is tuple
    output = back["vision"][0]["mm"]["video"]
    assert type(output) is BaseModelOutputWithPooling
    assert all(torch.equal(x, y) for x, y in zip(output.pooler_output, features.pooler_output, strict=True))


def test_what_could_run_code_is_neither_saved_nor_built() -> None:
    with pytest.raises(TypeError, match="a checkpoint cannot hold a set"):
        plain({"a": [{1}]})
    with pytest.raises(CheckpointError, match=r"holds a os\.system, which this model does not have"):
        as_saved({"__model_output__": "os.system", "fields": {"command": "true"}})


def test_checkpoints_hold_no_pickled_code(tmp_path: Path, rows: Dataset) -> None:
    """Whatever a resume reads of them loads with torch's restricted loader, or is safetensors or JSON."""
    from transformers.trainer_pt_utils import safe_globals

    begin(tmp_path / "run", rows, max_steps=1, num_iterations=2)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert (checkpoint / "model.safetensors").exists()
    unread = checkpoint / "training_args.bin"  # a pickle of transformers' that nothing of ours or theirs reads
    assert list(checkpoint.glob("*.bin")) == [unread]
    unread.write_bytes(b"?" * unread.stat().st_size)
    go_on(tmp_path / "run", rows, max_steps=1, num_iterations=2)
    read = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "state-0.pt"]
    for name in read:
        with safe_globals():  # numpy's arrays, for the state of its generator
            torch.load(checkpoint / name, weights_only=True)
    pickles = {path.name for path in checkpoint.iterdir() if path.suffix in (".pt", ".pth")}
    assert pickles == set(read), "these have been checked above"
    assert set(json.loads((checkpoint / "manifest.json").read_text())["files"]) >= pickles
