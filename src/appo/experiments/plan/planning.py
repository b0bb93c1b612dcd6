"""`appo plan`: whether a run fits its GPUs, and what to change where it does not. Every effect is a plan made anew."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from appo.experiments.plan.architecture import read_architecture, video_shape
from appo.experiments.plan.memory import FP32, PRECISIONS, Kernels, Run
from appo.experiments.plan.phases import Phase, features_bytes, phases

GB = 1e9
# Share of a GPU left to the CUDA context, libraries and fragmentation: an assumption, not measured.
RESERVED = 0.08
SHARDINGS = ("ddp", "zero2", "zero3", "fsdp2")
OPTIMIZERS = ("adamw", "adamw_8bit", "sgd")


@dataclass(frozen=True)
class Plan:
    """A run and the GPU it should fit."""

    run: Run
    gpu_bytes: int

    @property
    def phases(self) -> list[Phase]:
        """Generate, score, update."""
        return phases(self.run)

    @property
    def peak(self) -> int:
        """Bytes of the largest phase."""
        return max(phase.total for phase in self.phases)

    @property
    def limit(self) -> int:
        """Bytes that torch may use."""
        return int((1 - RESERVED) * self.gpu_bytes)

    @property
    def fits(self) -> bool:
        """Whether the largest phase stays below the limit."""
        return self.peak <= self.limit


@dataclass(frozen=True)
class Remedy:
    """A change that lowers the peak: what to set, what it costs, and the run with it."""

    setting: str
    cost: str
    run: Run


# --- from flags and files --------------------------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `appo plan`; defaults are the paper's shapes (APPO sec. 4)."""
    add = parser.add_argument
    add("--config", help="take settings from a training YAML; flags win over it")
    add("--model", help="qwen2.5-vl-3b, qwen2.5-vl-7b, spotlight, or a folder or hub id, of which config.json is read")
    add("--gpus", type=int, default=8, help="default: 8")
    add("--gpu-memory", type=float, default=80, metavar="GB", help="of one GPU (default: 80)")
    add("--frames", type=int, help="sampled from a video (default: 16)")
    add("--resolution", default="640x360", metavar="WxH", help="of the files (default: 640x360)")
    add("--pixels-per-frame", type=int, help="most, after resizing (default: 50176 = 64*28*28)")
    add("--prompt-text-tokens", type=int, default=100, help="question and template (default: 100)")
    add("--generations", type=int, help="responses to a prompt (default: 8)")
    add("--completion", type=int, help="tokens of a response (default: 384)")
    add("--prompts-per-gpu", type=int, help="of one generation (default: 16 / gpus)")
    add("--prompts-per-call", type=int, help="in one micro-batch (default: 1)")
    add("--rows-per-chunk", type=int, help="responses packed together; 0: all (default: 0)")
    add("--dtype", choices=tuple(PRECISIONS), help="mixed (default): float32 weights, autocast; nf4: LoRA's")
    add("--optimizer", choices=OPTIMIZERS, help="default: adamw")
    add("--sharding", choices=SHARDINGS, default="ddp", help="default: ddp")
    add("--lora-r", type=int, help="rank of adapters on the language model; 0: train all of it (default: 0)")
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction, help="default: on")
    add("--attention", choices=("sdpa", "flash_attention_2"), help="default: sdpa")
    add("--vllm-share", type=float, help="of the GPU for a colocated vLLM; 0: transformers generates (default: 0)")


PAPER: dict[str, Any] = {
    "model": "qwen2.5-vl-7b",
    "frames": 16,
    "generations": 8,
    "completion": 384,
    "pixels_per_frame": 64 * 28 * 28,
    "least_pixels": 4 * 28 * 28,
    "prompts_per_call": 1,
    "rows_per_chunk": 0,
    "dtype": "mixed",
    "optimizer": "adamw",
    "lora_r": 0,
    "gradient_checkpointing": True,
    "attention": "sdpa",
    "vllm_share": 0.0,
}


def plan_of(flags: argparse.Namespace) -> Plan:
    """The plan that flags, a configuration and the paper's values, in this order, ask for.

    Raises:
        ValueError: an impossible setting, named.
        OSError: a file that cannot be read.
    """
    given = {name: value for name, value in vars(flags).items() if value is not None}
    settings = {**PAPER, **(settings_of(flags.config) if flags.config else {}), **given}
    settings.setdefault("prompts_per_gpu", max(1, 16 // max(1, settings["gpus"])))
    _check(settings)
    architecture = read_architecture(settings["model"])
    width, height = _sides(settings["resolution"])
    most = settings["pixels_per_frame"]
    gpu_bytes = int(settings["gpu_memory"] * GB)
    run = Run(
        architecture=architecture,
        video=video_shape(architecture, settings["frames"], height, width, min(most, settings["least_pixels"]), most),
        prompt_text=settings["prompt_text_tokens"],
        generations=settings["generations"],
        completion=settings["completion"],
        prompts=settings["prompts_per_gpu"],
        prompts_per_call=min(settings["prompts_per_call"], settings["prompts_per_gpu"]),
        rows_per_chunk=settings["rows_per_chunk"],
        precision=settings["dtype"],
        checkpointing=settings["gradient_checkpointing"],
        optimizer=settings["optimizer"],
        sharding=settings["sharding"],
        gpus=settings["gpus"],
        lora_rank=settings["lora_r"],
        vllm=int(settings["vllm_share"] * gpu_bytes),
        kernels=Kernels(attention=settings["attention"]),
    )
    return Plan(run, gpu_bytes)


def settings_of(path: str) -> dict[str, Any]:
    """What a training YAML says about memory, by the names of the flags."""
    import yaml

    with open(path, encoding="utf-8") as file:
        config = yaml.safe_load(file)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds no settings; see recipes/spotlight.yaml")
    init = config.get("model_init_kwargs") or {}
    generations = config.get("num_generations", PAPER["generations"])
    rows, accumulated = config.get("per_device_train_batch_size", generations), "gradient_accumulation_steps"
    calls = max(1, rows // generations)
    colocated = config.get("use_vllm") and config.get("vllm_mode", "colocate") == "colocate"
    half = init.get("dtype", init.get("torch_dtype")) == "bfloat16"
    four = config.get("load_in_4bit", False)
    if config.get("load_in_8bit"):
        raise ValueError(f"{path}: load_in_8bit is not planned; load_in_4bit is")
    optimizers = {"sgd": "sgd", "adamw_bnb_8bit": "adamw_8bit", "adamw_8bit": "adamw_8bit"}
    found = {
        "model": _known_model(config.get("model")),
        "frames": config.get("video_max_frames"),
        "pixels_per_frame": config.get("video_max_pixels"),
        "least_pixels": config.get("video_min_pixels"),
        "generations": generations,
        "completion": config.get("max_completion_length"),
        "prompts_per_gpu": calls * config.get(accumulated, 1),
        "prompts_per_call": calls,
        "rows_per_chunk": config.get("rows_per_chunk"),
        "dtype": "nf4" if four else "bf16" if half else "mixed" if config.get("bf16", True) else "fp32",
        "optimizer": optimizers.get(config.get("optim", ""), "adamw"),
        "lora_r": config.get("lora_r", 16) if config.get("use_peft") else None,
        "gradient_checkpointing": config.get("activation_checkpointing", config.get("gradient_checkpointing")),
        "attention": init.get("attn_implementation"),
        "vllm_share": config.get("vllm_gpu_memory_utilization", 0.3) if colocated else None,
    }
    return {name: value for name, value in found.items() if value is not None}


def _known_model(name: str | None) -> str | None:
    """The table's name of a published model; anything else as it is."""
    short = (name or "").removeprefix("Qwen/").removesuffix("-Instruct").lower()
    return short if short in ("qwen2.5-vl-3b", "qwen2.5-vl-7b") else name


def _check(settings: dict[str, Any]) -> None:
    counts = ("gpus", "frames", "generations", "completion", "prompts_per_gpu", "prompts_per_call", "gpu_memory")
    for name in (*counts, "pixels_per_frame"):
        if settings[name] <= 0:
            raise ValueError(f"{name} must be positive, got {settings[name]}")
    for name in ("lora_r", "rows_per_chunk", "prompt_text_tokens"):
        if settings[name] < 0:
            raise ValueError(f"{name} must not be negative, got {settings[name]}")
    if not 0 <= settings["vllm_share"] < 1:
        raise ValueError(f"vllm_share must be at least 0 and below 1, got {settings['vllm_share']}")
    if settings["sharding"] != "ddp" and settings["dtype"] in ("fp32", "nf4"):
        raise ValueError(f"sharding {settings['sharding']} is planned for dtype mixed or bf16, not {settings['dtype']}")
    if settings["dtype"] == "nf4" and not settings["lora_r"]:
        raise ValueError("dtype nf4 is not trained itself: set lora_r, or another dtype")
    if settings["attention"] not in ("sdpa", "flash_attention_2"):
        raise ValueError(f"attention is planned for sdpa and flash_attention_2, not {settings['attention']}")


def _sides(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise ValueError(f"resolution is width x height, such as 640x360, not {text!r}")
    return int(width), int(height)


# --- what to change --------------------------------------------------------------------------------------------------


def remedies(run: Run) -> Iterator[Remedy]:
    """Changes that might lower the peak, the cheapest first; what is in force already is left out."""
    G, several = run.generations, run.gpus > 1
    if run.kernels.attention == "sdpa":
        faster = replace(run.kernels, attention="flash_attention_2")
        yield Remedy("attn_implementation: flash_attention_2", "none; needs flash-attn", replace(run, kernels=faster))
    if run.prompts_per_call > 1:
        one = replace(run, prompts_per_call=1)
        yield Remedy(f"per_device_train_batch_size: {G}, accumulate", "smaller micro-batches", one)
    if not run.checkpointing:
        yield Remedy("gradient_checkpointing: true", "a forward pass more", replace(run, checkpointing=True))
    if several and run.sharding in ("ddp", "zero2"):
        for sharding in ("zero2", "fsdp2", "zero3"):
            if sharding != run.sharding and run.precision != "fp32":
                yield Remedy(f"sharding {sharding} (accelerate)", "communication", replace(run, sharding=sharding))
    for rows in (G // 2, G // 4, 1):
        if 0 < rows < run.responses_at_once:
            chunks = -(-G // rows)
            changed = replace(run, rows_per_chunk=rows)
            yield Remedy(f"rows_per_chunk: {rows}", f"the prompt {chunks} times, a forward pass more", changed)
    if run.optimizer == "adamw":
        changed = replace(run, optimizer="adamw_8bit")
        yield Remedy("optim: adamw_bnb_8bit", "rounded moments; needs bitsandbytes", changed)
    if run.precision in ("mixed", "fp32"):
        lost = "frozen weights rounded" if run.lora_rank else "rounded updates, lost at lr 1e-6"
        changed = replace(run, precision="bf16")
        yield Remedy("model_init_kwargs: {dtype: bfloat16}", lost, changed)
    if run.vllm:
        changed = replace(run, vllm=run.vllm // 2)
        yield Remedy("half of vllm_gpu_memory_utilization", "slower generation", changed)
    if run.prompts > 1:
        yield Remedy("half of the prompts of a generation", "a smaller batch", replace(run, prompts=run.prompts // 2))
    if not run.lora_rank:
        yield Remedy("LoRA, rank 64", "adapters instead of all weights", replace(run, lora_rank=64))
    if run.lora_rank and run.precision != "nf4" and run.sharding == "ddp":
        changed = replace(run, precision="nf4")
        yield Remedy("load_in_4bit: true", "rounded frozen weights; needs bitsandbytes", changed)
    if run.completion > 128:
        yield Remedy("half of max_completion_length", "shorter reasoning", replace(run, completion=run.completion // 2))


@dataclass(frozen=True)
class Effect:
    """What one remedy saves alone, and the peak once it joins those before it that helped."""

    remedy: Remedy
    saved: int
    together: int


def effects(plan: Plan) -> list[Effect]:
    """Each remedy that helps, by a plan made anew, alone and on top of those before, until the run fits."""
    found: list[Effect] = []
    taken: list[str] = []
    current = plan
    for remedy in remedies(plan.run):
        saved = plan.peak - replace(plan, run=remedy.run).peak
        if saved <= 0:
            continue
        if not current.fits:
            again = next((r for r in remedies(current.run) if r.setting == remedy.setting), None)
            if again is not None and replace(plan, run=again.run).peak < current.peak:
                current = replace(plan, run=again.run)
                taken.append(remedy.setting)
        found.append(Effect(remedy, saved, current.peak if remedy.setting in taken else 0))
    return found


# --- as text ---------------------------------------------------------------------------------------------------------


def shown(plan: Plan) -> str:
    """The plan as `appo plan` prints it."""
    return "\n".join([*_tokens_shown(plan.run), "", *_bytes_shown(plan), "", *_verdict(plan)])


def _tokens_shown(run: Run) -> list[str]:
    a, v, kind = run.architecture, run.video, "LoRA" if run.lora_rank else "full"
    fewer = run.rows_tokens / run.packed_tokens
    pixels = run.video.patches * a.patch_values * FP32
    return [
        f"model    {run.parameters / GB:.3f} billion parameters, {run.trained / GB:.3f} trained ({kind})",
        f"video    {v.frames} frames of {v.width}x{v.height} for the model, {v.patches} patches",
        f"tokens   {v.tokens_per_frame} a frame, {v.tokens} a video, {run.prompt} a prompt, {run.completion} an answer",
        f"group    {run.packed_tokens} tokens packed, {run.rows_tokens} as {run.generations} rows: {fewer:.2f}x",
        f"pixels   {_gb(pixels, 3)} once a video, then {_gb(features_bytes(run) / run.prompts, 3)} of features",
        f"batch    {run.prompts} prompts a generation on a GPU, {run.prompts_per_call} a micro-batch",
        f"GPUs     {run.gpus}, {run.sharding}",
    ]


def _bytes_shown(plan: Plan) -> list[str]:
    all_phases = plan.phases
    names = list(dict.fromkeys(name for phase in all_phases for name in phase.parts))
    width = max(map(len, names)) + 2
    lines = [f"{'GB on one GPU':<{width}}" + "".join(f"{phase.name:>10}" for phase in all_phases)]
    for name in names:
        cells = [f"{phase.parts[name] / GB:10.2f}" if name in phase.parts else f"{'-':>10}" for phase in all_phases]
        lines.append(f"{name:<{width}}" + "".join(cells))
    return [*lines, f"{'total':<{width}}" + "".join(f"{phase.total / GB:10.2f}" for phase in all_phases)]


def _verdict(plan: Plan) -> list[str]:
    allowed = f"{plan.limit / GB:.1f} of {plan.gpu_bytes / GB:.0f} GB ({RESERVED:.0%} left to CUDA and fragmentation)"
    if plan.fits:
        return [f"fits: the peak is {_gb(plan.peak)}, allowed {allowed}"]
    lines = [f"does not fit: the peak is {_gb(plan.peak)}, allowed {allowed}", "what to change, the cheapest first:"]
    found = effects(plan)
    for effect in found:
        line = f"  {effect.remedy.setting:<40} -{effect.saved / GB:6.2f} GB  {effect.remedy.cost}"
        lines.append(line + (f"; with those above {_gb(effect.together)}" if effect.together else ""))
    last = [effect.together for effect in found if effect.together]
    if not last or last[-1] > plan.limit:
        lines.append("  all together are not enough: fewer frames, fewer pixels a frame, or more or larger GPUs")
    return lines


def _gb(size: float, digits: int = 2) -> str:
    return f"{size / GB:.{digits}f} GB"
