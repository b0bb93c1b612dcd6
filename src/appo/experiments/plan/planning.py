"""`appo plan`: whether a run fits its GPUs, and what to change if not. Each change is planned anew."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from appo.experiments.plan.architecture import read_architecture, video_shape
from appo.experiments.plan.memory import FP32, PRECISIONS, Kernels, Run
from appo.experiments.plan.phases import Phase, features_bytes, phases

GB = 1e9
# Share of a GPU left to the CUDA context, libraries and fragmentation: an assumption, not measured.
RESERVED = 0.08
SHARDINGS = ("ddp", "zero2", "zero3", "fsdp2")
OPTIMIZERS = ("adamw", "adamw_8bit", "sgd")
ATTENTIONS = ("sdpa", "flash_attention_2")
# Settings beside those of `Run`, whose attributes have the names of the flags: the paper's shapes.
PAPER: dict[str, Any] = {
    "model": "qwen2.5-vl-7b", "gpu_memory": 80, "video_max_frames": 16, "video_max_pixels": 64 * 28 * 28,
    "video_min_pixels": 4 * 28 * 28, "resolution": "640x360", "attention": "sdpa", "vllm_share": 0.0,
}  # fmt: skip
RUN_DEFAULTS = {one.name: one.default for one in fields(Run) if one.default is not MISSING}
# Settings of a training YAML that are taken as they are.
TRAINING = (
    "num_generations", "max_completion_length", "video_max_frames", "video_max_pixels", "video_min_pixels",
    "rows_per_chunk",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """A run and the GPU it should fit."""

    run: Run
    gpu_bytes: int

    @property
    def phases(self) -> list[Phase]:
        """Generate, score (with a scoring pass), update."""
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
    """A change that lowers the peak: what to set, its cost, and the run with it."""

    setting: str
    cost: str
    run: Run


# --- from flags and files --------------------------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `appo plan`, named as settings of training are; defaults are the paper's shapes (APPO sec. 4)."""
    add = parser.add_argument
    add("--config", help="take settings from a training YAML; flags win over it")
    add("--model", help="qwen2.5-vl-3b, qwen2.5-vl-7b, spotlight, or a folder or hub id, of which config.json is read")
    add("--gpus", type=int, help="default: 8")
    add("--gpu-memory", type=float, metavar="GB", help="of one GPU (default: 80)")
    add("--video-max-frames", type=int, help="sampled from a video (default: 16)")
    add("--video-max-pixels", type=int, help="of a frame at most, after resizing (default: 50176 = 64*28*28)")
    add("--resolution", metavar="WxH", help="of the files (default: 640x360)")
    add("--prompt-text-tokens", type=int, help="question and template (default: 100)")
    add("--num-generations", type=int, help="responses to a prompt (default: 8)")
    add("--max-completion-length", type=int, help="tokens of a response (default: 384)")
    add("--prompts-per-gpu", type=int, help="of one generation (default: 16 / gpus)")
    add("--prompts-per-call", type=int, help="in one micro-batch (default: 1)")
    add("--rows-per-chunk", type=int, help="responses packed together; 0: all (default: 0)")
    add("--dtype", choices=tuple(PRECISIONS), help="mixed (default): float32 weights, autocast; nf4: LoRA's")
    add("--optimizer", choices=OPTIMIZERS, help="default: adamw")
    add("--sharding", choices=SHARDINGS, help="default: ddp")
    add("--lora-r", type=int, help="rank of adapters on the language model; 0: train all of it (default: 0)")
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction, help="default: on")
    add("--attention", choices=ATTENTIONS, help="default: sdpa")
    add("--vllm-share", type=float, help="of the GPU for a colocated vLLM; 0: transformers generates (default: 0)")


def plan_of(flags: argparse.Namespace) -> Plan:
    """The plan of flags over a training YAML over the paper's values.

    Raises:
        ValueError, OSError: an impossible setting, or a file that cannot be read; it is named.
    """
    given = {name: value for name, value in vars(flags).items() if value is not None}
    given = (settings_of(flags.config) if flags.config else {}) | given
    prompts = max(1, 16 // max(1, given.get("gpus", Run.gpus)))
    settings = RUN_DEFAULTS | PAPER | {"prompts_per_gpu": prompts} | given
    _check(settings)
    architecture = read_architecture(settings["model"])
    width, height = _sides(settings["resolution"])
    most = settings["video_max_pixels"]
    least = min(most, settings["video_min_pixels"])
    gpu_bytes = int(settings["gpu_memory"] * GB)
    derived = {
        "architecture": architecture,
        "video": video_shape(architecture, settings["video_max_frames"], height, width, least, most),
        "prompts_per_call": min(settings["prompts_per_call"], settings["prompts_per_gpu"]),
        "vllm": int(settings["vllm_share"] * gpu_bytes),
        "scoring_pass": settings["scoring_pass"] or settings["vllm_share"] > 0,
        "kernels": Kernels(attention=settings["attention"]),
    }
    return Plan(Run(**{name: settings[name] for name in RUN_DEFAULTS} | derived), gpu_bytes)


def settings_of(path: str) -> dict[str, Any]:
    """The settings of a training YAML that concern memory, by the names of the flags."""
    import yaml

    with open(path, encoding="utf-8") as file:
        config = yaml.safe_load(file)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds no settings; see recipes/spotlight.yaml")
    if config.get("load_in_8bit"):
        raise ValueError(f"{path}: load_in_8bit is not planned; load_in_4bit is")
    init = config.get("model_init_kwargs") or {}
    G = config.get("num_generations", Run.num_generations)
    calls = max(1, config.get("per_device_train_batch_size", G) // G)
    colocated = config.get("use_vllm") and config.get("vllm_mode", "colocate") == "colocate"
    half = init.get("dtype", init.get("torch_dtype")) == "bfloat16"
    whole = "mixed" if config.get("bf16", True) else "fp32"
    optimizers = {"sgd": "sgd", "adamw_bnb_8bit": "adamw_8bit", "adamw_8bit": "adamw_8bit"}
    found = {name: config.get(name) for name in TRAINING} | {
        "model": _known_model(config.get("model")),
        "prompts_per_gpu": calls * config.get("gradient_accumulation_steps", 1),
        "prompts_per_call": calls,
        "dtype": "nf4" if config.get("load_in_4bit") else "bf16" if half else whole,
        "optimizer": optimizers.get(config.get("optim", ""), "adamw"),
        "lora_r": config.get("lora_r", 16) if config.get("use_peft") else None,
        "scoring_pass": _scores_first(config),
        "gradient_checkpointing": config.get("activation_checkpointing", config.get("gradient_checkpointing")),
        "attention": init.get("attn_implementation"),
        "vllm_share": config.get("vllm_gpu_memory_utilization", 0.3) if colocated else None,
    }
    return {name: value for name, value in found.items() if value is not None}


def _scores_first(config: dict[str, Any]) -> bool:
    """Whether groups are scored before the update: the rules of `appo.training.update`, by the file alone."""
    accumulation, iterations = config.get("gradient_accumulation_steps", 1), config.get("num_iterations", 1)
    updates = config.get("steps_per_generation", accumulation) * iterations
    switches = ("use_vllm", "normalize_weights", "mask_truncated_completions")
    return (
        accumulation % updates != 0
        or any(config.get(name) for name in switches)
        or config.get("frame_attention") == "relative"
        or bool(config.get("use_peft") and config.get("lora_dropout", 0.05))
    )


def _known_model(name: str | None) -> str | None:
    """The table's name of a published model; anything else as it is."""
    short = (name or "").removeprefix("Qwen/").removesuffix("-Instruct").lower()
    return short if short in ("qwen2.5-vl-3b", "qwen2.5-vl-7b") else name


def _check(settings: dict[str, Any]) -> None:
    for name in ("gpus", "gpu_memory", "num_generations", "max_completion_length", "video_max_frames",
                 "video_max_pixels", "prompts_per_gpu", "prompts_per_call"):  # fmt: skip
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
    if settings["attention"] not in ATTENTIONS:
        raise ValueError(f"attention is planned for {' and '.join(ATTENTIONS)}, not {settings['attention']}")


def _sides(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit()):
        raise ValueError(f"resolution is width x height, such as 640x360, not {text!r}")
    return int(width), int(height)


# --- what to change --------------------------------------------------------------------------------------------------


def remedies(run: Run) -> Iterator[Remedy]:
    """Changes that might lower the peak, the cheapest first, without those that are already made."""

    def changed(setting: str, cost: str, **settings: Any) -> Remedy:
        return Remedy(setting, cost, replace(run, **settings))

    G = run.num_generations
    if run.kernels.attention != "sdpa":
        kernels = replace(run.kernels, attention="sdpa")
        yield changed("attn_implementation: sdpa", "none: torch's flash attention, without copies", kernels=kernels)
    if run.prompts_per_call > 1:
        yield changed(f"per_device_train_batch_size: {G}, accumulate", "smaller micro-batches", prompts_per_call=1)
    if not run.gradient_checkpointing:
        yield changed("gradient_checkpointing: true", "a forward pass more", gradient_checkpointing=True)
    if run.gpus > 1 and run.sharding in ("ddp", "zero2") and run.dtype != "fp32":
        for sharding in [kind for kind in ("zero2", "fsdp2", "zero3") if kind != run.sharding]:
            yield changed(f"sharding {sharding} (accelerate)", "communication", sharding=sharding)
    for rows in (G // 2, G // 4, 1):
        if 0 < rows < run.responses_at_once:
            cost = f"the prompt {-(-G // rows)} times, a forward pass more"
            yield changed(f"rows_per_chunk: {rows}", cost, rows_per_chunk=rows)
    if run.optimizer == "adamw":
        yield changed("optim: adamw_bnb_8bit", "rounded moments; needs bitsandbytes", optimizer="adamw_8bit")
    if run.dtype in ("mixed", "fp32"):
        lost = "frozen weights rounded" if run.lora_r else "rounded updates, lost at lr 1e-6"
        yield changed("model_init_kwargs: {dtype: bfloat16}", lost, dtype="bf16")
    if run.vllm:
        yield changed("half of vllm_gpu_memory_utilization", "slower generation", vllm=run.vllm // 2)
    if run.prompts_per_gpu > 1:
        fewer = run.prompts_per_gpu // 2
        yield changed("half of the prompts of a generation", "a smaller batch", prompts_per_gpu=fewer)
    if not run.lora_r:
        yield changed("LoRA, rank 64", "adapters instead of all weights", lora_r=64)
    if run.lora_r and run.dtype != "nf4" and run.sharding == "ddp":
        yield changed("load_in_4bit: true", "rounded frozen weights; needs bitsandbytes", dtype="nf4")
    if run.max_completion_length > 128:
        shorter = run.max_completion_length // 2
        yield changed("half of max_completion_length", "shorter reasoning", max_completion_length=shorter)


@dataclass(frozen=True)
class Effect:
    """What one remedy saves alone, and the peak together with those before it that helped (0: not needed)."""

    remedy: Remedy
    saved: int
    together: int


def effects(plan: Plan) -> list[Effect]:
    """Each remedy that helps, planned alone and together with those before it, until the run fits."""
    found: list[Effect] = []
    current = plan
    for remedy in remedies(plan.run):
        saved = plan.peak - replace(plan, run=remedy.run).peak
        if saved <= 0:
            continue
        together = 0
        if not current.fits:
            again = next((r for r in remedies(current.run) if r.setting == remedy.setting), None)
            if again is not None and replace(plan, run=again.run).peak < current.peak:
                current = replace(plan, run=again.run)
                together = current.peak
        found.append(Effect(remedy, saved, together))
    return found


# --- as text ---------------------------------------------------------------------------------------------------------


def render(plan: Plan) -> str:
    """The text that `appo plan` prints."""
    return "\n".join([*_token_lines(plan.run), "", *_byte_lines(plan), "", *_verdict_lines(plan)])


def _token_lines(run: Run) -> list[str]:
    a, v, kind = run.architecture, run.video, "LoRA" if run.lora_r else "full"
    fewer = run.rows_tokens / run.packed_tokens
    pixels = run.video.patches * a.patch_values * FP32
    return [
        f"model    {run.parameters / GB:.3f} billion parameters, {run.trained / GB:.3f} trained ({kind})",
        f"video    {v.frames} frames of {v.width}x{v.height} for the model, {v.patches} patches",
        f"tokens   {v.tokens_per_frame} a frame, {v.tokens} a video, {run.prompt} a prompt,"
        f" {run.max_completion_length} an answer",
        f"group    {run.packed_tokens} tokens packed, {run.rows_tokens} as {run.num_generations} rows: {fewer:.2f}x",
        f"pixels   {_gb(pixels, 3)} once a video, then {_gb(features_bytes(run) / run.prompts_per_gpu, 3)} of features",
        f"batch    {run.prompts_per_gpu} prompts a generation on a GPU, {run.prompts_per_call} a micro-batch",
        f"GPUs     {run.gpus}, {run.sharding}",
    ]


def _byte_lines(plan: Plan) -> list[str]:
    all_phases = plan.phases
    names = list(dict.fromkeys(name for phase in all_phases for name in phase.parts))
    width = max(map(len, names)) + 2
    lines = [f"{'GB on one GPU':<{width}}" + "".join(f"{phase.name:>10}" for phase in all_phases)]
    for name in names:
        cells = [f"{phase.parts[name] / GB:10.2f}" if name in phase.parts else f"{'-':>10}" for phase in all_phases]
        lines.append(f"{name:<{width}}" + "".join(cells))
    return [*lines, f"{'total':<{width}}" + "".join(f"{phase.total / GB:10.2f}" for phase in all_phases)]


def _verdict_lines(plan: Plan) -> list[str]:
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
