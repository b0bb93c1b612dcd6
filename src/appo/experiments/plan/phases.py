"""The phases of a step, generate, score (if there is a scoring pass) and update: what is in memory at their peaks.

Letters as in `appo.experiments.plan.memory`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from appo.experiments.plan.memory import (
    CACHE_ROOM,
    CAPTURE_BUDGET,
    FP32,
    HEAD_ROWS,
    LOGIT_ROWS,
    Run,
    gathered_bytes,
    gradients_bytes,
    layer_backward_bytes,
    layer_forward_bytes,
    layer_saved_bytes,
    optimizer_bytes,
    weights_bytes,
)

Parts = dict[str, int]


@dataclass(frozen=True)
class Phase:
    """One phase at its peak: its parts by name, in bytes."""

    name: str
    parts: Parts

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


def phases(run: Run) -> list[Phase]:
    """Generate, score (with a scoring pass) and update, each with what all of them hold."""
    always = {
        "weights": weights_bytes(run),
        "optimiser": optimizer_bytes(run),
        "sharding buffers": gathered_bytes(run),
        "video features": features_bytes(run),
        "vLLM": run.vllm,
    }
    scoring = {"score": score_parts(run)} if run.scoring_pass else {}
    own = {"generate": generate_parts(run), **scoring, "update": update_parts(run)}
    return [Phase(name, {part: size for part, size in (always | parts).items() if size}) for name, parts in own.items()]


def features_bytes(run: Run) -> int:
    """The frozen vision tower's features of the videos of one generation, which replace their pixels."""
    return run.prompts_per_gpu * run.video.tokens * run.architecture.hidden * run.numbers.activation


def vision_bytes(run: Run) -> int:
    """Pixels of one video and what the vision tower holds over them, one block at a time."""
    a, n = run.architecture, run.numbers
    block = max(4 * a.vision_hidden * FP32, 3 * a.vision_intermediate * n.activation)
    return run.video.patches * (a.patch_values * FP32 + 3 * a.vision_hidden * FP32 + block)


def _autocast_bytes(run: Run) -> int:
    """Copies of the layers' trained matrices that autocast keeps for the length of a forward pass."""
    return 0 if run.lora_r else run.numbers.cast * run.architecture.layers * run.architecture.layer_parameters


def _head_copy_bytes(run: Run) -> int:
    """The LM head's matrix as autocast reads it (TRL's fused head casts tile by tile instead)."""
    return run.numbers.cast * run.architecture.vocabulary * run.architecture.hidden


# --- generate --------------------------------------------------------------------------------------------------------


def generate_parts(run: Run) -> Parts:
    """The vision tower, one video after another, then the cache of all responses and a step's logits."""
    vision = vision_bytes(run)
    if run.vllm:
        return {"vision tower": vision}
    a = run.architecture
    whole = {"ZeRO-3 gathers all weights": 2 * run.parameters} if run.sharding == "zero3" and run.gpus > 1 else {}
    caches = cache_bytes(run) + cache_bytes(run) // a.layers
    logits = run.rows * a.vocabulary * (run.numbers.activation + 4 * FP32)
    copies = _autocast_bytes(run) + _head_copy_bytes(run)
    generating = {"KV cache": caches, "logits": logits, "autocast copies": copies, **whole}
    return generating if sum(generating.values()) > vision else {"vision tower": vision}


def cache_bytes(run: Run) -> int:
    """Keys and values of each prompt, and of all responses in buffers that double when they are full; flash attention 2
    copies the prompt's to each response. Autocast leaves keys in float32."""
    a, n, N = run.architecture, run.numbers, run.max_completion_length
    per_token = a.layers * a.kv_width * (n.activation + (FP32 if n.cast else n.activation))
    if run.kernels.attention != "sdpa":
        return run.rows * (run.prompt + N) * per_token
    buffer = CACHE_ROOM << max(0, math.ceil(math.log2(N / CACHE_ROOM)))
    return (run.prompts_per_gpu * run.prompt + run.rows * buffer) * per_token


# --- score -----------------------------------------------------------------------------------------------------------


def score_parts(run: Run) -> Parts:
    """A forward pass over a packed group, in a layer or in the head, whichever holds more."""
    a, n = run.architecture, run.numbers
    kept = run.prompts_per_gpu * _scores_bytes(run)
    rows = min(LOGIT_ROWS, run.num_generations * run.max_completion_length)
    head = {"LM head": rows * a.vocabulary * (n.activation + 3 * FP32) + _head_copy_bytes(run)}
    layer = {"a layer's forward": layer_forward_bytes(run), "attention capture": capture_bytes(run)}
    return {
        "autocast copies": _autocast_bytes(run),
        "hidden states and attention": kept,
        "packed inputs": _inputs_bytes(run),
        **max(head, layer, key=lambda parts: sum(parts.values())),
    }


def _scores_bytes(run: Run) -> int:
    """Hidden states that emit a group's tokens, and their attention to frames."""
    a = run.architecture
    tokens = run.num_generations * run.max_completion_length
    return tokens * (a.hidden * run.numbers.residual + run.video.frames * FP32)


def capture_bytes(run: Run) -> int:
    """Outputs of one-hot values in both calls and merged (float32 in places: six of them, measured by
    `benchmarks/capture_cost.py`); of flash attention 2, probabilities of a chunk of queries, before and after the
    softmax, and keys in float32."""
    if not run.capture_layers:
        return 0
    if run.kernels.attention == "sdpa":
        return 6 * run.response_tokens_at_once * run.architecture.hidden * FP32
    a, G, L = run.architecture, run.responses_at_once, run.keys
    chunk = max(1, CAPTURE_BUDGET // (G * a.heads * L))
    probabilities = min(chunk, run.max_completion_length) * G * a.heads * L * FP32
    keys = 0 if run.numbers.activation == FP32 or run.numbers.cast else G * L * a.kv_width * FP32
    return 2 * probabilities + keys


def _inputs_bytes(run: Run) -> int:
    """Rotary angles, ids, positions and the joined features of a packed group."""
    a, T, e = run.architecture, run.tokens_at_once, run.numbers.residual
    angles = 2 * T * (a.hidden // a.heads) * e
    return angles + T * 8 * 6 + run.video.tokens * a.hidden * run.numbers.activation


# --- update ----------------------------------------------------------------------------------------------------------


def update_parts(run: Run) -> Parts:
    """Forward and backward of a micro-batch at the worst of its moments."""
    moments = (_in_forward(run), _in_head(run), _in_last_layer(run), _in_first_layer(run), _in_embedding(run))
    return {"packed inputs": run.calls * _inputs_bytes(run)} | max(moments, key=lambda parts: sum(parts.values()))


def kept_bytes(run: Run) -> int:
    """What the layers keep until their backward pass: each its input with checkpointing, all of it without."""
    return run.calls * run.architecture.layers * (_stream(run) if run.gradient_checkpointing else _layer(run))


def _stream(run: Run) -> int:
    return run.tokens_at_once * run.architecture.hidden * run.numbers.residual


def _layer(run: Run) -> int:
    """Of one layer with autocast's copies of its matrices, which autograd keeps."""
    return layer_saved_bytes(run) + run.numbers.cast * run.architecture.layer_parameters


def _recomputed(run: Run) -> int:
    """A checkpointed layer's own, made once more; its input is already kept where the stream is float32."""
    if not run.gradient_checkpointing:
        return 0
    return _layer(run) - (_stream(run) if run.numbers.residual == FP32 else 0)


def _head_gradient(run: Run) -> int:
    return 0 if run.lora_r else run.architecture.vocabulary * run.architecture.hidden * run.numbers.gradient


def _before(run: Run) -> Parts:
    """Gradients of earlier micro-batches and of this one's other passes, and what the token weights are made of."""
    return {
        "gradients": gradients_bytes(run) if run.accumulates else 0,
        "gradients of other passes": _waiting(run),
        "hidden states and attention": run.calls * _scores_bytes(run) if _captures(run) else 0,
    }


def _captures(run: Run) -> bool:
    return run.capture_layers > 0 and not run.scoring_pass


def _waiting(run: Run) -> int:
    size = FP32 if run.lora_r or run.numbers.cast else run.numbers.gradient
    return run.trained * size if run.passes > 1 else 0


def _in_forward(run: Run) -> Parts:
    """The end of a checkpointed forward pass; without checkpointing, the head's backward pass holds more."""
    kept = _before(run) | {"kept for backward": kept_bytes(run)}
    kept |= {"attention capture": capture_bytes(run) if _captures(run) else 0}
    if run.gradient_checkpointing:
        kept |= {"autocast copies": _autocast_bytes(run), "a layer's forward": layer_forward_bytes(run)}
    return kept


def _in_head(run: Run) -> Parts:
    """The fused head's backward pass: a tile of logits, and gradients of its matrix and of hidden states in float32."""
    a, n, k = run.architecture, run.numbers, run.kernels
    emitting = run.response_tokens_at_once
    words = min(k.head_tile, a.vocabulary)
    tile = min(emitting, HEAD_ROWS) * (k.head_tile * n.activation + k.head_floats * words * FP32)
    matrix = 0 if run.lora_r else a.vocabulary * a.hidden * FP32
    matrix += matrix // 2 if n.gradient == 2 else 0  # the same in bfloat16
    words_cast = words * a.hidden * (n.activation if n.residual != n.activation or n.cast else 0)
    norm = 3 * _stream(run) + emitting * a.hidden * n.residual
    head = {"LM head": tile + matrix + words_cast + norm + emitting * a.hidden * FP32}
    return _before(run) | {"kept for backward": kept_bytes(run)} | head


def _in_last_layer(run: Run) -> Parts:
    return _before(run) | {
        "kept for backward": kept_bytes(run),
        "a layer's backward": _recomputed(run) + layer_backward_bytes(run),
        "gradient of the LM head": _head_gradient(run),
    }


def _in_first_layer(run: Run) -> Parts:
    a = run.architecture
    missing = 0 if run.accumulates else gradients_bytes(run) // a.layers
    if run.lora_r == 0:  # the layer's own, and those of an embedding that is not the head
        own = a.layer_parameters + (0 if a.tied else a.embedding_parameters // 2)
        missing = missing and gradients_bytes(run) * own // run.trained
    return {
        "gradients": gradients_bytes(run) - missing,
        "gradients of other passes": _waiting(run) if run.accumulates else 0,
        "kept for backward": run.calls * (_stream(run) if run.gradient_checkpointing else _layer(run)),
        "a layer's backward": _recomputed(run) + layer_backward_bytes(run),
        "gradient of the LM head": _head_gradient(run) if run.accumulates and a.tied else 0,
    }


def _in_embedding(run: Run) -> Parts:
    """The embedding's gradient is as large as its matrix; where the head is the same one, its gradient waits for it."""
    waiting = 2 if run.architecture.tied else 1
    return {
        "gradients": gradients_bytes(run),
        "gradients of other passes": _waiting(run) if run.accumulates else 0,
        "gradient of the embedding": waiting * _head_gradient(run),
        "kept for backward": _stream(run),
    }
