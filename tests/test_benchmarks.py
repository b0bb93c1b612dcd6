"""The benchmarks at tiny size: what they compare is the same work, and their JSON says what was measured. No times."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from appo.rollout.generation import VideoCache, encode_messages
from appo.video.reader import FrameSampling

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import capture_cost  # noqa: E402
import decoder_cost  # noqa: E402
import frame_cache  # noqa: E402
import harness  # noqa: E402
import shared_prefix  # noqa: E402
import step_cost  # noqa: E402
import true_size  # noqa: E402
import update_cost  # noqa: E402
import weights_cost  # noqa: E402

import combinations  # noqa: E402

TINY = ["--model", "tiny", "--repeats", "2", "--no-memory"]


def assert_says_where(result: dict[str, Any], path: Path, name: str) -> None:
    """Versions, command and machine are there, no folder of the machine is, and the file holds what was returned."""
    assert result["benchmark"] == name
    assert result["command"].startswith(f"python benchmarks/{name}.py")
    assert {"python", "appo", "torch", "transformers", "trl"} <= result["versions"].keys()
    assert result["machine"]["threads"] >= 1
    assert result["machine"]["processor"]
    text = path.read_text(encoding="utf-8")
    assert json.loads(text).keys() == result.keys()
    assert str(path.parent) not in text
    assert str(Path.home()) not in text


# --- the others ------------------------------------------------------------------------------------------------------


def test_weights_cost_compares_equal_weights(tmp_path: Path) -> None:
    output = tmp_path / "weights.json"
    small = ["--responses", "12", "20", "--vocabulary", "300", "--hidden", "16", "--group", "4"]
    result = weights_cost.main([*small, "--repeats", "2", "--in-process", "--output", str(output)])
    assert_says_where(result, output, "weights_cost")
    assert [cell["response"] for cell in result["cells"]] == [12, 20]
    for cell in result["cells"]:
        median = {way: times["median"] for way, times in cell["times"].items()}
        assert cell["ratios"]["full:tiled time"] == pytest.approx(median["full"] / median["tiled"])
        assert cell["bytes_of_GNV"] == 4 * 4 * cell["response"] * 300
        assert 1 <= cell["crucial_frames"] <= cell["frames"]
        assert cell["peak_bytes"].keys() == {"full", "tiled"}


def run_step(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    output = tmp_path / "step.json"
    small = ["--prompts", "2", "--prompts-per-call", "1", "--tokens", "6", "--steps", "1", "--group", "4"]
    result = step_cost.main([*small, *arguments, "--repeats", "1", "--output", str(output)])
    assert_says_where(result, output, "step_cost")
    return result


def test_capture_cost_compares_equal_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "capture.json"
    small = ["--cells", "200/3", "--group", "2", "--heads", "4", "--head-size", "16", "--repeats", "2", "--no-memory"]
    result = capture_cost.main([*small, "--output", str(output)])
    assert_says_where(result, output, "capture_cost")
    assert [(cell["dtype"], cell["frames"]) for cell in result["cells"]] == [("float32", 3), ("bfloat16", 3)]
    exact, rounded = (cell["relative_difference"]["one_hot"] for cell in result["cells"])
    assert 0 < exact < 1e-5 < rounded < 0.02
    monkeypatch.setattr(capture_cost, "capture_by_one_hot", lambda *given: torch.ones(2, 3, 3))
    with pytest.raises(SystemExit, match="the ways differ"):
        capture_cost.main([*small, "--output", str(output)])


def test_step_cost_gives_every_way_the_same_tokens(tmp_path: Path) -> None:
    result = run_step(tmp_path, "--model", "untrained")
    ways = result["ways"]
    assert list(ways) == ["appo", "grpo", "rows", "carried", "stock"]
    for name, way in ways.items():
        assert way["tokens"] == 6, f"{name} generates as many tokens as the others"
        assert {"decode", "generate", "update"} <= way["parts"].keys()
        assert 0 < sum(way["parts"].values()) <= way["processor_median"]
    # Of each video, the vision tower reads this many copies a step.
    patches = ways["appo"]["vision_patches"]
    assert {name: way["vision_patches"] / patches for name, way in ways.items()} == {
        "appo": 1,
        "grpo": 1,
        "rows": 1,
        "carried": 2 * 4,  # in generation, and in the update
        "stock": 4,  # in generation
    }
    assert ways["appo"]["parts"]["weights"] > 0
    others = ("grpo", "rows", "carried", "stock")
    assert not any(ways[name]["parts"].get("weights") for name in others)
    quotients = {f"{way}:appo": ways[way]["median"] / ways["appo"]["median"] for way in others}
    assert result["ratios"]["wall"] == pytest.approx(quotients)
    generating = {name: way["processor_median"] - way["parts"]["decode"] for name, way in ways.items()}
    quotients = {f"{way}:appo": generating[way] / generating["appo"] for way in others}
    assert result["ratios"]["without decode"] == pytest.approx(quotients)
    again = run_step(tmp_path, "--model", "untrained", "--ways", "stock", "--append")["ways"]
    assert list(again) == list(ways)
    assert again["appo"]["seconds"] == pytest.approx(ways["appo"]["seconds"], rel=1e-4)
    with pytest.raises(SystemExit, match="has other settings"):
        run_step(tmp_path, "--model", "untrained", "--ways", "stock", "--append", "--seed", "0", "--group", "2")


class KeepGradients(TrainerCallback):
    """Copies the gradients of a trainer's first step."""

    def __init__(self, model: Any, kept: dict[str, torch.Tensor]) -> None:
        self._model, self._kept = model, kept

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        parameters = [
            (name, parameter) for name, parameter in self._model.named_parameters() if parameter.requires_grad
        ]
        self._kept.update({name: parameter.grad.clone() for name, parameter in parameters})


def test_rows_that_carry_the_video_learn_what_packed_groups_learn(tmp_path: Path) -> None:
    """The repaired stock trainer is no straw man: its gradient is that of the packed trainer, on the same responses."""
    args = step_cost.parse(["--model", "untrained", "--prompts", "1", "--group", "4", "--tokens", "6", "--steps", "0"])
    rows = step_cost.make_rows(args, tmp_path)
    found: dict[str, dict[str, torch.Tensor]] = {}
    answers = [[index + 10] * 5 + [index + 20] for index in range(4)]
    for way in ("grpo", "carried", "stock"):
        trainer = step_cost.make_trainer(way, args, rows, tmp_path)
        if way == "grpo":
            trainer.engine._by_transformers = lambda groups, responses: (answers, None)
        else:
            trainer._generate_single_turn = lambda *args, **kwargs: (answers, None)
        trainer.add_callback(KeepGradients(trainer.model, found.setdefault(way, {})))
        trainer.train()
    assert found["grpo"].keys() == found["carried"].keys()
    scale = max(float(grad.abs().max()) for grad in found["grpo"].values())
    for name, grad in found["grpo"].items():
        torch.testing.assert_close(grad, found["carried"][name], rtol=1e-3, atol=1e-4 * scale, msg=name)
    blind = max(float((grad - found["stock"][name]).abs().max()) for name, grad in found["grpo"].items())
    assert blind > 1e-2 * scale


@pytest.mark.parametrize("prompt", [48, 576])
def test_prompts_have_as_many_tokens_as_asked_for(prompt: int, tmp_path: Path) -> None:
    frame = 4 if prompt < 100 else 64
    args = step_cost.parse(
        ["--prompt-tokens", str(prompt), "--frame-tokens", str(frame), "--prompts", "1", "--steps", "0"]
    )
    rows, (_, processor) = step_cost.make_rows(args, tmp_path), step_cost.policy(args)
    videos = VideoCache(processor.video_processor, FrameSampling(2.0, step_cost.most_frames(args), 4))
    assert encode_messages(processor, rows[0]["prompt"], videos).length == prompt


def test_shared_prefix_compares_equal_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "prefix.json"
    small = ["--model", "tiny", "--cells", "24/6/4", "--repeats", "1", "--no-memory", "--output", str(output)]
    result = shared_prefix.main(small)
    assert_says_where(result, output, "shared_prefix")
    (cell,) = result["cells"]
    published = {"prefix-grouper"} if result["versions"]["prefix-grouper"] else set()
    assert cell["times"].keys() == {"rows", "packed"} | published
    assert cell["largest_difference_of_gradients"].keys() == {"packed"} | published
    assert 0 < max(cell["largest_difference_of_gradients"].values()) < 1e-4
    monkeypatch.setattr(shared_prefix, "TOLERANCE", 0.0)
    with pytest.raises(SystemExit, match="the ways give other gradients"):
        shared_prefix.main(small)


# --- true size -------------------------------------------------------------------------------------------------------

TINY_GROUP = ["--model", "tiny", "--prompt", "24", "--tokens", "6", "--group", "4", "--new-tokens", "3", "--in-process"]


def test_true_size_goes_on_where_it_stopped_and_compares_equal_updates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "true.json"
    command = [*TINY_GROUP, "--output", str(output)]
    monkeypatch.setattr(true_size, "SPARE", 0.0)
    first = true_size.main([*command, "--parts", "packed"])
    assert list(first["parts"]) == ["packed"]
    result = true_size.main(command)
    assert_says_where(result, output, "true_size")
    assert list(result["parts"]) == list(true_size.PARTS)
    kept = (one["parts"]["packed"]["times"]["update"]["seconds"] for one in (first, result))
    assert next(kept) == pytest.approx(next(kept), rel=1e-4)  # the JSON rounds
    against_rows = result["summary"]["packed against rows"]
    assert against_rows["gradient, relative distance"] < 1e-5
    assert against_rows["mean log-probability"] < 1e-6
    times = {part: one["times"] for part, one in result["parts"].items()}
    packed = times["packed"]["vision"]["seconds"] + times["packed"]["update"]["seconds"]
    ratio = times["rows"]["update"]["seconds"] / packed
    assert result["summary"]["seconds"]["rows:packed update"] == pytest.approx(ratio, rel=1e-4)
    half = true_size.main([*TINY_GROUP, "--parts", "rows", "--rows", "2", "--output", str(tmp_path / "half.json")])
    assert half["parts"]["rows"]["times"]["update"]["measured"] == 0.5
    assert "gradient" not in half["parts"]["rows"]
    with pytest.raises(SystemExit, match="has other settings"):
        true_size.main([*command, "--seed", "1"])
    monkeypatch.setattr(harness, "available_memory", lambda: 0)
    with pytest.raises(SystemExit, match="of memory are needed"):
        true_size.main([*TINY_GROUP, "--output", str(tmp_path / "other.json")])


def test_another_gradient_is_as_far_as_its_fingerprint_says() -> None:
    layer, other = torch.nn.Linear(400, 50), torch.nn.Linear(400, 50)
    for one in (layer, other):
        for parameter in one.parameters():
            parameter.grad = torch.randn(parameter.shape)
    prints = true_size.fingerprint(layer), true_size.fingerprint(other)
    true = torch.cat(
        [(a.grad - b.grad).flatten() for a, b in zip(layer.parameters(), other.parameters(), strict=True)]
    ).norm()
    norm = torch.cat([a.grad.flatten() for a in layer.parameters()]).norm()
    assert float(prints[0]["norm"]) == pytest.approx(float(norm), rel=1e-5)
    assert 0.2 < true_size.gradient_distance(*prints) / float(true / norm) < 3


def test_frame_cache_compares_storages_that_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "frames.json"
    small = ["--seconds", "1", "--height", "48", "--width", "64", "--frames", "4", "--repeats", "1"]
    result = frame_cache.main([*small, "--output", str(output)])
    assert_says_where(result, output, "frame_cache")
    (cell,) = result["cells"]
    assert cell["shape"] == [4, 48, 64, 3]
    assert cell["bytes"]["raw"] == 4 * 48 * 64 * 3
    read = cell["times"]["decode"]["median"] / cell["times"]["webp/read"]["median"]
    assert cell["ratios"]["wall"]["decode:webp read"] == pytest.approx(read)
    blank = frame_cache.Storage(bytes, lambda data, shape: np.zeros(shape, np.uint8))
    monkeypatch.setitem(frame_cache.STORAGES, "blank", blank)
    with pytest.raises(SystemExit, match="blank lost something"):
        frame_cache.main([*small, "--output", str(output)])


def test_decoder_cost_compares_equal_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "decoder.json"
    small = ["--seconds", "1", "--sizes", "64x48", "--repeats", "1", "--output", str(output)]
    result = decoder_cost.main(small)
    assert_says_where(result, output, "decoder_cost")
    (cell,) = result["cells"]
    assert cell["shape"][1:] == [48, 64, 3]
    times = cell["times"]
    assert times["process"]["processor_median"] > 0
    quotient = times["process"]["median"] / times["here"]["median"]
    assert cell["ratios"]["wall"]["process:here"] == pytest.approx(quotient)
    monkeypatch.setattr(decoder_cost.np, "array_equal", lambda a, b: False)
    with pytest.raises(SystemExit, match="the two ways give other frames"):
        decoder_cost.main(small)


# --- combinations ----------------------------------------------------------------------------------------------------


def test_combinations_are_as_many_as_asked_for_and_their_outcomes_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """The cases themselves are those of tests/combinations/test_combinations.py."""
    matrix = combinations.chosen(2, 0, None)
    assert combinations.chosen(2, 0, 5) == matrix[:5]
    more = combinations.chosen(2, 0, len(matrix) + 7)
    assert more[: len(matrix)] == matrix
    assert len(set(more)) == len(matrix) + 7
    times = {"processor_seconds": 1.5, "wall_seconds": 2.0}
    held = {"outcome": "held", "asserted": {"rows with their own features": 4, "max_weight 1 is dapo, within": 1e-9}}
    failed = {"outcome": "failed", "reason": "it broke", "asserted": {}}
    results = [{"case": asdict(case), **held, **times} for case in matrix]
    numbers = combinations.summary(results, 2)
    assert numbers["tuples"] == numbers["tuples_covered"]
    assert numbers["vision_rows_compared"] == 4 * len(matrix)
    assert numbers["largest_difference_of_max_weight_1_and_dapo"] == 1e-9
    results[-1] = {"case": asdict(matrix[-1]), **failed, **times}
    numbers = combinations.summary(results, 2)
    assert numbers["outcomes"] == {"held": len(matrix) - 1, "failed": 1}
    combinations.print_tables(results, numbers)
    assert f"{len(matrix) - 1} held, 1 failed" in capsys.readouterr().out


# --- what is committed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "results").glob("*.json")), ids=lambda path: path.stem)
def test_committed_numbers_hold_together(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    assert_says_where(result, path, result["benchmark"])
    for cell in result.get("cells", []):
        median = {name: times["median"] for name, times in cell["times"].items()}
        for pair in ("stock:ours forward", "stock:ours update"):
            if pair in cell["ratios"]:
                phase = pair.split()[1]
                expected = median[f"stock/{phase}"] / median[f"ours/{phase}"]
                assert cell["ratios"][pair] == pytest.approx(expected, rel=1e-3)


def test_a_device_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="sees no CUDA device"):
        update_cost.main([*TINY, "--device", "cuda"])
