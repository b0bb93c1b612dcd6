"""`update_cost.py` at tiny size: its columns do the same work, and its JSON says what was measured. No times."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration
from trl.trainer.utils import add_fused_lm_head

from appo.models.prefix_packing import pack_group
from tests.test_benchmarks import TINY, assert_says_where  # puts benchmarks/ on the path

# isort: split
import harness
import update_cost
from shapes import SHAPES, build_model, config_of, prompt_of, responses_of, work_of
from updates import PHASES, Cell, GroupUpdate


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
