"""The benchmarks at tiny size: what they compare is the same work, and their JSON says what was measured. No times."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration, TrainerCallback

from appo.models.prefix_packing import pack_group
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
from shapes import SHAPES, build_model, config_of, prompt_of, responses_of, work_of  # noqa: E402
from trl.trainer.utils import add_fused_lm_head  # noqa: E402
from updates import PHASES, Cell, GroupUpdate  # noqa: E402

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


# --- update_cost -----------------------------------------------------------------------------------------------------


def run_update(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    output = tmp_path / "update.json"
    result = update_cost.main([*TINY, *arguments, "--output", str(output)])
    assert_says_where(result, output, "update_cost")
    return result


def test_update_cost_reports_quotients_of_medians(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_update(tmp_path, "--cells", "24/6/4", "16/5/2")
    first, second = result["cells"]
    assert (first["tokens"], second["tokens"]) == (
        {"rows": 4 * (24 + 6), "packed": 23 + 4 * 6},
        {"rows": 2 * (16 + 5), "packed": 15 + 2 * 5},
    )
    for cell in (first, second):
        median = {name: times["median"] for name, times in cell["times"].items()}
        rounds = {name: len(times["seconds"]) for name, times in cell["times"].items()}
        assert {name for name, count in rounds.items() if count == 1} == {f"published/{phase}" for phase in PHASES}
        assert set(rounds.values()) == {1, 2}
        P, N, G = cell["prompt"], cell["response"], cell["group"]
        assert cell["limits"]["tokens"] == pytest.approx(G * (P + N) / (P + G * N))
        update = median["stock/update"] / median["ours/update"]
        assert cell["ratios"]["stock:ours update"] == pytest.approx(update)
        assert cell["ratios"]["update of token limit"] == pytest.approx(update / cell["limits"]["tokens"])
        extra = median["scored/score+capture"] + median["scored/weights"]
        share = extra / (extra + median["ours/update"])
        assert cell["shares"]["score+capture+weights"] == pytest.approx(share)
        assert cell["ratios"]["scored:ours update"] == pytest.approx(1 / (1 - share))
        assert cell["ratios"]["capture:ours update"] == pytest.approx(median["capture/update"] / median["ours/update"])
        assert cell["skipped"] == {}
    table = capsys.readouterr().out
    assert "24/6 G=4" in table
    assert f"{first['ratios']['stock:ours update']:#.3g}x" in table


def test_what_is_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cell,) = run_update(tmp_path, "--cells", "24/6/4", "--budget", "0")["cells"]
    assert set(cell["skipped"]) == {f"{v}/{phase}" for v in ("stock", "published") for phase in PHASES}
    assert all("--budget is 0 s" in why for why in cell["skipped"].values())
    assert "ours/update" in cell["times"]
    assert "stock:ours update" not in cell["ratios"]
    assert "24/6 G=4: stock/update skipped: about" in capsys.readouterr().err
    (cell,) = run_update(tmp_path, "--cells", "24/6/4", "--memory-gb", "1e-6")["cells"]
    assert all("one row would need more than" in why for why in cell["skipped"].values())


def test_cells_can_be_added_to_an_earlier_run(tmp_path: Path) -> None:
    run_update(tmp_path, "--cells", "24/6/4", "--variants", "ours")
    run_update(tmp_path, "--cells", "16/5/2", "--variants", "ours", "--append")
    result = run_update(tmp_path, "--cells", "16/5/2", "--variants", "ours", "--append")
    assert [(cell["prompt"], cell["group"]) for cell in result["cells"]] == [(24, 4), (16, 2)]
    assert result["cells"][0]["command"] != result["cells"][1]["command"]
    with pytest.raises(SystemExit, match="another model or device"):
        update_cost.main(["--model", "cpu", "--append", "--output", str(tmp_path / "update.json")])


def gradients(update: GroupUpdate, call: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    update.model.zero_grad(set_to_none=True)
    with monkeypatch.context() as patch:
        patch.setattr(update.model, "zero_grad", lambda **_: None)
        call()
    return {name: p.grad.clone() for name, p in update.model.named_parameters() if p.grad is not None}


def test_all_columns_do_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same gradients of the same parameters: nothing is left out of ours, nothing is added to stock's."""
    model = build_model("tiny", "cpu", torch.float32)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    update = GroupUpdate(model, Cell(24, 6, 4), "cpu", seed=0)
    ways = {
        "stock": lambda: update.rows("sdpa", grad=True, rows_per_call=4),
        "in two calls": lambda: update.rows("sdpa", grad=True, rows_per_call=3),
        "published": lambda: update.rows("eager", grad=True, rows_per_call=4),
        "ours": lambda: update.packed(grad=True),
    }
    found = {way: gradients(update, call, monkeypatch) for way, call in ways.items()}
    assert not any("visual" in name for name in found["ours"]), "the vision tower is frozen in every column"
    for way, grads in found.items():
        assert grads.keys() == found["stock"].keys()
        for name, grad in grads.items():
            scale = float(found["stock"][name].abs().max())
            torch.testing.assert_close(grad, found["stock"][name], rtol=1e-3, atol=1e-4 * scale, msg=f"{way}: {name}")


def test_the_update_with_capture_is_the_update_with_the_weights_of_a_scoring_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build_model("tiny", "cpu", torch.float32)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    update = GroupUpdate(model, Cell(24, 6, 4), "cpu", seed=0)
    expected, weigh = update.score(3), update.weights
    seen: list[Any] = []

    def ones(scores: Any) -> Any:
        seen.append(scores)
        weights = weigh(scores)
        assert float(weights.weights_GN.max()) > 1
        return replace(weights, weights_GN=torch.ones_like(weights.weights_GN))

    monkeypatch.setattr(update, "weights", ones)
    ours = gradients(update, lambda: update.packed(grad=True), monkeypatch)
    own = gradients(update, update.weighted, monkeypatch)
    assert own.keys() == ours.keys()
    assert all(torch.equal(own[name], ours[name]) for name in own), "capturing changes nothing"
    for name in ("log_probs_GN", "hidden_GNH", "log_normalizer_GN", "frame_attention_GNF"):
        torch.testing.assert_close(getattr(seen[0], name), getattr(expected, name).detach(), rtol=1e-4, atol=1e-5)


def test_the_published_way_really_returns_attention() -> None:
    update = GroupUpdate(build_model("tiny", "cpu", torch.float32), Cell(24, 6, 4), "cpu", seed=0)
    seen: list[Any] = []
    update.model.model.register_forward_hook(lambda module, args, output: seen.append(output.attentions))
    add_fused_lm_head(update.model)
    update.rows("eager", grad=False, rows_per_call=4, attentions=True)
    assert [tuple(layer.shape) for layer in seen[0]] == [(4, 4, 30, 30)] * SHAPES["tiny"].layers


@pytest.mark.parametrize("prompt", [16, 24, 576])
def test_paper_and_tensors_count_the_same_tokens(prompt: int) -> None:
    model = build_model("tiny", "cpu", torch.float32)
    inputs = prompt_of(model, prompt, "cpu")
    assert inputs.ids_1P.shape == (1, prompt)
    video = int((inputs.ids_1P == model.config.video_token_id).sum())
    assert 4 * video == len(inputs.pixel_values_videos)
    packed = pack_group(model, inputs, responses_of(model, 3, 5, "cpu"))
    assert packed.inputs["input_ids"].numel() == work_of(SHAPES["tiny"], prompt, 5, 3).packed_tokens


@pytest.mark.parametrize(("name", "parameters"), [("qwen2.5-vl-3b", 3_754_622_976), ("qwen2.5-vl-7b", 8_292_166_656)])
def test_real_shapes_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config_of(SHAPES[name]))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_peak_memory_is_what_a_call_adds() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the high-water mark can be reset on Linux only")
    kept = torch.ones(25_000_000)  # 100 MB that were there before
    peak = harness.peak_memory(lambda: torch.ones(75_000_000).sum(), "cpu")
    assert 290e6 < peak < 400e6
    assert kept.sum() > 0


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
    assert half["parts"]["rows"]["times"]["update"]["calls"] == 2
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
