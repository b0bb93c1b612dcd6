"""`appo plan`: exact arithmetic of what stays, effects that are plans made anew, settings from flags and files."""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from appo.cli.main import main
from appo.experiments.plan.architecture import PUBLISHED, VideoShape, read_architecture
from appo.experiments.plan.memory import (
    CACHE_ROOM,
    CAPTURE_BUDGET,
    CPU,
    LOGIT_ROWS,
    Kernels,
    Run,
    gradients_bytes,
    layer_saved_bytes,
    optimizer_bytes,
    weights_bytes,
)
from appo.experiments.plan.phases import cache_bytes, features_bytes, kept_bytes, phases
from appo.experiments.plan.planning import Plan, add_flags, effects, plan_of, remedies, render, settings_of
from appo.models import frame_attention as attention
from appo.models import log_probs as scoring
from appo.models import prompt_cache
from appo.models.names import policy_path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import plan_check  # noqa: E402

VIDEO = VideoShape(8, 224, 224, 2048, 512)
RUN = Run(PUBLISHED["qwen2.5-vl-3b"], VIDEO, gpus=1, prompts_per_gpu=16)
LANGUAGE, ALL = 3_085_938_688, 3_754_622_976
RUN_7B = replace(RUN, architecture=PUBLISHED["qwen2.5-vl-7b"], gpus=8, prompts_per_gpu=2)


def plan(*flags: str) -> Plan:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return plan_of(parser.parse_args(list(flags)))


# --- exact arithmetic ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "weights", "gradients", "optimizer"),
    [
        ({}, 4 * ALL, 4 * LANGUAGE, 8 * LANGUAGE),
        ({"dtype": "bf16"}, 2 * ALL, 2 * LANGUAGE, 4 * LANGUAGE),
        ({"gpus": 8}, 4 * ALL, 8 * LANGUAGE, 8 * LANGUAGE),  # DDP's buckets hold the gradients once more
        ({"gpus": 8, "sharding": "zero2"}, 2 * ALL, LANGUAGE // 4, 12 * LANGUAGE // 8),
        ({"gpus": 8, "sharding": "zero3"}, 2 * ALL // 8, LANGUAGE // 4, 12 * LANGUAGE // 8),
        ({"gpus": 8, "sharding": "fsdp2"}, 4 * ALL // 8, LANGUAGE // 2, LANGUAGE),
        ({"optimizer": "sgd"}, 4 * ALL, 4 * LANGUAGE, 0),
    ],
)
def test_what_stays_is_exact(change: dict, weights: int, gradients: int, optimizer: int) -> None:
    run = replace(RUN, **change)
    found = (weights_bytes(run), gradients_bytes(run), optimizer_bytes(run))
    assert found == pytest.approx((weights, gradients, optimizer), abs=1)


def test_adapters_leave_the_model_without_gradients() -> None:
    run = replace(RUN, lora_r=16, dtype="bf16")
    # q and o 4096 inputs and outputs, k and v 2304, the three of the MLP 13056 each; 36 layers.
    adapters = 36 * 16 * (2 * 4096 + 2 * 2304 + 3 * 13056)
    assert run.trained == adapters
    assert weights_bytes(run) == 2 * ALL + 4 * adapters
    assert (gradients_bytes(run), optimizer_bytes(run)) == (4 * adapters, 8 * adapters)
    matrices = 36 * (2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 11008)
    assert weights_bytes(run) - weights_bytes(replace(run, dtype="nf4")) == matrices * 23 // 16  # 2 - 0.5625 bytes


def test_the_cache_is_keys_and_values_of_every_token() -> None:
    run = replace(RUN, dtype="bf16")
    assert cache_bytes(run) == (16 * (512 + 100) + 16 * 8 * 512) * 36 * 2 * 256 * 2, "384 tokens in a buffer of 512"
    assert cache_bytes(RUN) == cache_bytes(run) * 3 // 2, "autocast leaves keys in float32"
    assert features_bytes(run) == 16 * 512 * 2048 * 2


def test_tokens_of_a_group() -> None:
    assert RUN.packed_tokens == 611 + 8 * 384
    assert RUN.rows_tokens == 8 * (612 + 384)


def test_checkpointing_stores_one_stream_a_layer() -> None:
    assert kept_bytes(RUN) == 36 * RUN.packed_tokens * 2048 * 4
    assert kept_bytes(replace(RUN, gradient_checkpointing=False)) > 20 * kept_bytes(RUN)


def test_merged_attention_saves_the_copies_of_the_prompt() -> None:
    flash = replace(RUN, kernels=Kernels(attention="flash_attention_2"))
    keys = 2 * 8 * (611 + 384) * 256 * 2
    queries_and_outputs = (8 * 384 + 611 + 8 * 384) * 2048 * 2
    assert layer_saved_bytes(flash) - layer_saved_bytes(RUN) == keys + queries_and_outputs


def test_what_is_named_twice_is_the_same() -> None:
    assert (LOGIT_ROWS, CAPTURE_BUDGET) == (scoring.LOGIT_ROWS, attention.CAPTURE_BUDGET)
    assert CACHE_ROOM == prompt_cache.ROOM
    import trl.trainer.utils
    from trl.kernels import chunked_logprob

    from appo.experiments.plan.memory import HEAD_ROWS

    assert (Kernels().head_tile, HEAD_ROWS) == (
        trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE,
        chunked_logprob.TOKEN_CHUNK_SIZE,
    )


# --- what to change --------------------------------------------------------------------------------------------------


def test_every_effect_is_a_plan_made_anew() -> None:
    tight = Plan(RUN_7B, int(80e9))
    assert not tight.fits
    found = effects(tight)
    assert len(found) > 5
    for effect in found:
        assert effect.saved == tight.peak - max(phase.total for phase in phases(effect.remedy.run)) > 0
    reached = [effect.together for effect in found if effect.together]
    assert reached == sorted(reached, reverse=True)
    assert reached[-1] <= tight.limit
    assert f"-{found[0].saved / 1e9:6.2f} GB" in render(tight)


def test_what_is_in_force_is_not_offered() -> None:
    least = replace(
        RUN, gpus=1, prompts_per_gpu=1, rows_per_chunk=1, lora_r=8, dtype="nf4", max_completion_length=64,
        optimizer="adamw_8bit",
    )  # fmt: skip
    assert list(remedies(least)) == []
    assert "all together are not enough" in render(Plan(least, int(1e9)))
    assert "fits: the peak" in render(Plan(least, int(80e9)))


# --- measured --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "checkpointing", "autocast-checkpointing", "scoring-pass"])
def test_the_plan_is_within_15_percent_of_a_real_step(name: str) -> None:
    """Bytes that torch's allocator hands out in the second step of a real trainer; deterministic."""
    cell = plan_check.check(name, plan_check.CELLS[name], seed=0)
    static = cell["static_bytes"]
    assert static["measured"] == pytest.approx(static["predicted"], abs=4096), "but for the optimiser's step counters"
    scored = ("score",) if name == "scoring-pass" else ()
    for what in ("peak", "peak beyond weights and moments", "update", *scored):
        assert 0.85 < cell["predicted:measured"][what] < 1.15, what


def test_the_committed_check_holds() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "plan_check.json").read_text(encoding="utf-8"))
    assert len(result["cells_checked"]) >= 3
    for cell in result["cells_checked"]:
        measured, predicted = cell["measured_bytes"], cell["predicted_bytes"]
        quotient = max(predicted.values()) / max(measured.values())
        assert cell["predicted:measured"]["peak"] == pytest.approx(quotient, rel=1e-3)
        assert 0.85 < quotient < 1.15, cell["cell"]


def test_kernels_of_a_cpu_hold_tiles_of_logits_in_float32() -> None:
    run = replace(RUN, gradient_checkpointing=False)
    heads = [phases(replace(run, kernels=kernels))[-1].parts["LM head"] for kernels in (Kernels(), CPU)]
    assert heads[1] > heads[0] + 3000 * 32768 * 7 * 4, "seven of them a token"


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_paper_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    run = plan().run
    assert (run.architecture, run.num_generations, run.max_completion_length, run.prompts_per_gpu) == (
        PUBLISHED["qwen2.5-vl-7b"],
        8,
        384,
        2,
    )
    assert main(["plan", "--model", "qwen2.5-vl-3b", "--gpus", "1"]) == 0
    out = capsys.readouterr().out
    assert "3.755 billion parameters" in out
    assert re.search(r"weights +15\.02 +15\.02\n", out)


def test_a_recipe_gives_the_settings_and_flags_win(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: Qwen/Qwen2.5-VL-3B-Instruct\nnum_generations: 4\nper_device_train_batch_size: 8\n"
        "gradient_accumulation_steps: 3\nmax_completion_length: 512\nvideo_max_frames: 100\n"
        "use_peft: true\nlora_r: 64\n"
        "model_init_kwargs: {dtype: bfloat16, attn_implementation: flash_attention_2}\nuse_vllm: true\n"
    )
    run = plan(
        "--config", str(recipe), "--gpus", "1", "--max-completion-length", "128", "--no-gradient-checkpointing"
    ).run
    assert (run.architecture, run.num_generations, run.max_completion_length) == (PUBLISHED["qwen2.5-vl-3b"], 4, 128)
    assert (run.prompts_per_gpu, run.prompts_per_call, run.video.frames, run.lora_r) == (6, 2, 50, 64)
    assert (run.dtype, run.kernels.attention, run.gradient_checkpointing) == ("bf16", "flash_attention_2", False)
    assert run.vllm == 24_000_000_000
    assert run.scoring_pass
    assert settings_of(str(ROOT / "recipes" / "spotlight.yaml"))["dtype"] == "fp32"


@pytest.mark.parametrize(
    ("lines", "scoring_pass"),
    [
        ("", False),
        ("steps_per_generation: 8", True),
        ("num_iterations: 2", True),
        ("normalize_weights: true", True),
        ("frame_attention: relative", True),
        ("mask_truncated_completions: true", True),
        ("use_peft: true", True),  # TRL's own adapters drop out
        ("use_peft: true\nlora_dropout: 0.0", False),
        ("use_vllm: true\nvllm_mode: server", True),
    ],
)
def test_a_scoring_pass_is_planned_where_the_trainer_makes_one(tmp_path: Path, lines: str, scoring_pass: bool) -> None:
    """The trainer's rule is held by tests/training/test_update_scoring.py."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: Qwen/Qwen2.5-VL-3B-Instruct\ngradient_accumulation_steps: 4\n{lines}\n")
    run = plan("--config", str(recipe)).run
    assert run.scoring_pass == scoring_pass
    assert ("score" in {phase.name for phase in phases(run)}) == scoring_pass


def test_the_embedded_policy_is_planned_by_its_name() -> None:
    tiny = plan("--model", "spotlight", "--gpus", "1").run.architecture
    assert tiny == read_architecture(str(policy_path()))
    assert tiny.hidden == 128


MISTAKES = [
    (["--gpus", "0"], "gpus must be positive"),
    (["--resolution", "big"], "640x360"),
    (["--vllm-share", "1"], "vllm_share"),
    (["--dtype", "nf4"], "set lora_r"),
    (["--sharding", "zero2", "--dtype", "fp32"], "zero2 is planned for"),
    (["--config", "no-such.yaml"], r"no-such\.yaml"),
    (["--model", "/no/such/model"], "model /no/such/model: no such folder"),
    (["--colour"], "unknown argument --colour"),
]


@pytest.mark.parametrize(("flags", "message"), MISTAKES, ids=lambda value: " ".join(value) if value else "")
def test_mistakes_are_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("appo: ")
    assert error.count("\n") == 1, error
    assert re.search(message, error), error


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["plan", "--help"])
    assert end.value.code == 0
    assert "example:\n  appo plan " in capsys.readouterr().out


def test_every_plan_of_the_page_has_the_numbers_of_the_page() -> None:
    """The tables' cells `--flags` of docs/scaling.md, with the totals beside them."""
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(--model \S+ --gpus 1[^`]*)` \| ([\d.]+) \| ([\d.]+) \|", page, re.MULTILINE)
    assert len(rows) >= 2
    for flags, *totals in rows:
        assert [f"{phase.total / 1e9:.2f}" for phase in plan(*flags.split()).phases] == totals, flags
