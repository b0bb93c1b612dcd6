"""Bytes of a training step on one GPU, part by part: weights, gradients, optimiser, activations, caches.

The activations of a decoder layer are the tensors that transformers' Qwen2.5-VL keeps for its backward pass, listed one
by one; `benchmarks/plan_check.py` holds the sums against what torch's allocator reports. What depends on the kernels is
in `Kernels`: a CPU, where it is checked, and CUDA differ there.

Shape suffixes of the letters: G responses in a pass, N response tokens, P prompt tokens, S = P - 1 shared positions,
T = S + G N packed tokens, H hidden, K key/value width, I intermediate, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from appo.experiments.plan.architecture import Architecture, VideoShape

FP32 = 4
# Of appo.models.log_probs, frame_attention and prompt_cache; a test compares them (this module loads no torch).
LOGIT_ROWS = 512
CAPTURE_BUDGET = 16 * 2**20
CACHE_ROOM = 32
# Rows of TRL's fused head at once.
HEAD_ROWS = 4096


@dataclass(frozen=True)
class Precision:
    """Bytes of one number."""

    weight: int  # of a trained parameter
    gradient: int
    optimizer: int  # all states of AdamW together
    activation: int  # what matrices multiply
    residual: int  # the stream between layers
    cast: int  # copies of the weights that autocast makes and keeps through a forward pass


PRECISIONS = {
    # float32 weights under bfloat16 autocast: what `appo train` does with `bf16: true`.
    "mixed": Precision(4, 4, 8, 2, 4, 2),
    # model_init_kwargs: {dtype: bfloat16}: gradients and AdamW's states are bfloat16, too.
    "bf16": Precision(2, 2, 4, 2, 2, 0),
    "fp32": Precision(4, 4, 8, 4, 4, 0),
    # load_in_4bit, the rest of the model in bfloat16: for adapters only.
    "nf4": Precision(2, 2, 4, 2, 2, 0),
}


@dataclass(frozen=True)
class Kernels:
    """What differs between machines."""

    head_tile: int = 32768  # words of the vocabulary it projects at once
    head_floats: int = 0  # float32 copies of a tile of logits it holds (Triton: none)
    # sdpa or flash_attention_2, which copies the prompt's keys and values for each response
    attention: str = "sdpa"


CPU = Kernels(head_floats=7)


@dataclass(frozen=True)
class Run:
    """What a step is made of, on one GPU."""

    architecture: Architecture
    video: VideoShape  # of a prompt
    prompt_text_tokens: int = 100  # tokens of a prompt beside the video's
    num_generations: int = 8  # G, responses to a prompt
    max_completion_length: int = 384  # N, tokens of a response
    prompts_per_gpu: int = 2  # of one generation, on this GPU
    prompts_per_call: int = 1  # whose graphs are alive together (per_device_train_batch_size / num_generations)
    rows_per_chunk: int = 0  # responses packed together; 0: all
    dtype: str = "mixed"  # a name of `PRECISIONS`
    gradient_checkpointing: bool = True  # each layer keeps its input only
    optimizer: str = "adamw"  # adamw, adamw_8bit or sgd
    sharding: str = "ddp"  # ddp, zero2, zero3 or fsdp2
    gpus: int = 8  # that share the work
    lora_r: int = 0  # of adapters on the language model's matrices; 0: all of the language model is trained
    vllm: int = 0  # bytes of the GPU that a colocated vLLM holds; 0: transformers generates
    capture_layers: int = 3  # whose attention is read; 0: none
    scoring_pass: bool = False  # groups are scored before the update, not by its own forward pass
    kernels: Kernels = Kernels()  # of this machine

    @cached_property
    def numbers(self) -> Precision:
        """Bytes of one number; sharded runs gather bfloat16 weights, so nothing is cast in them."""
        precision = PRECISIONS[self.dtype]
        if self.sharding == "ddp" or self.dtype == "fp32":
            return precision
        return Precision(precision.weight, precision.gradient, precision.optimizer, 2, 2, 0)

    # -- tokens -------------------------------------------------------------------------------------------------------

    @property
    def prompt(self) -> int:
        """P: tokens of a prompt."""
        return self.video.tokens + self.prompt_text_tokens

    @property
    def rows_tokens(self) -> int:
        """Tokens of a group as ordinary rows."""
        return self.num_generations * (self.prompt + self.max_completion_length)

    @property
    def packed_tokens(self) -> int:
        """Tokens of a group packed behind one prompt."""
        return self.prompt - 1 + self.num_generations * self.max_completion_length

    @property
    def responses_at_once(self) -> int:
        """Responses in one forward pass."""
        return min(self.rows_per_chunk or self.num_generations, self.num_generations)

    @property
    def response_tokens_at_once(self) -> int:
        """Tokens of the responses in one forward pass."""
        return self.responses_at_once * self.max_completion_length

    @property
    def tokens_at_once(self) -> int:
        """T: tokens of one packed forward pass."""
        return self.prompt - 1 + self.response_tokens_at_once

    @property
    def keys(self) -> int:
        """L: positions that the last token of a response attends to."""
        return self.prompt - 1 + self.max_completion_length

    @property
    def rows(self) -> int:
        """Responses of one generation on this GPU."""
        return self.prompts_per_gpu * self.num_generations

    @property
    def calls(self) -> int:
        """Groups whose graphs are alive together: chunks are recomputed one by one, whole groups are not."""
        return 1 if self.responses_at_once < self.num_generations else self.prompts_per_call

    @property
    def accumulates(self) -> bool:
        """Whether gradients of an earlier micro-batch are there while a later one is made."""
        return self.prompts_per_gpu > self.prompts_per_call

    @property
    def passes(self) -> int:
        """Forward passes in one backward pass: autograd holds each weight's gradient until the last is through."""
        return self.prompts_per_call * -(-self.num_generations // self.responses_at_once)

    # -- parameters ---------------------------------------------------------------------------------------------------

    @property
    def trained(self) -> int:
        """Parameters that are trained."""
        a = self.architecture
        return a.lora_parameters(self.lora_r) if self.lora_r else a.language_parameters

    @property
    def parameters(self) -> int:
        """All parameters, adapters included."""
        adapters = self.trained if self.lora_r else 0
        return self.architecture.language_parameters + self.architecture.vision_parameters + adapters


# --- in every phase --------------------------------------------------------------------------------------------------


def weights_bytes(run: Run) -> int:
    """Of the weights on one GPU. DeepSpeed holds bfloat16 ones beside its float32 originals (see optimizer_bytes)."""
    zero = run.sharding.startswith("zero")
    size = 2 if zero else run.numbers.weight
    whole = (run.parameters - (run.trained if run.lora_r else 0)) * size
    if run.lora_r:
        whole += run.trained * (2 if zero else FP32)
    if run.dtype == "nf4":
        # Half a byte a number, and a float32 for 64 of them (QLoRA sec. 3, without nested constants).
        matrices = run.architecture.layers * sum(inputs * outputs for inputs, outputs in run.architecture.linears)
        whole -= matrices * size - matrices * (64 // 2 + FP32) // 64
    return -(-whole // run.gpus) if run.sharding in ("zero3", "fsdp2") else whole


def gradients_bytes(run: Run) -> int:
    """Of the gradients of one optimiser step, and DDP's buckets, which are a second copy of them."""
    size = FP32 if run.lora_r else run.numbers.gradient
    if run.sharding.startswith("zero"):
        return -(-run.trained * 2 // run.gpus)
    if run.sharding == "fsdp2":
        return -(-run.trained * size // run.gpus)
    return run.trained * size * (2 if run.gpus > 1 else 1)


def optimizer_bytes(run: Run) -> int:
    """Of AdamW's two moments (8 bit: a byte each and a float32 for 256 of them, embeddings in float32), or nothing."""
    per_number: float = 8 if run.lora_r else run.numbers.optimizer
    states = run.trained * per_number
    if run.optimizer == "sgd":
        states = 0
    if run.optimizer == "adamw_8bit":
        embedding = 0 if run.lora_r else run.architecture.vocabulary * run.architecture.hidden
        states = (run.trained - embedding) * 2 * (1 + FP32 / 256) + embedding * 8
    if run.sharding.startswith("zero"):
        states += run.trained * FP32  # the originals of the bfloat16 weights
    return int(states) if run.sharding == "ddp" else -(-int(states) // run.gpus)


def gathered_bytes(run: Run) -> int:
    """What sharding gathers: weights of two layers and of the embeddings, gradients of one layer."""
    a = run.architecture
    if run.sharding == "ddp" or run.gpus == 1:
        return 0
    bucket = 2 * min(run.trained, 500_000_000)  # DeepSpeed's reduce_bucket_size
    if run.sharding == "zero2":
        return bucket
    layers = 2 * (2 * a.layer_parameters + a.embedding_parameters)
    return layers + (bucket if run.sharding == "zero3" else FP32 * a.layer_parameters)


# --- a decoder layer -------------------------------------------------------------------------------------------------


def layer_saved_bytes(run: Run) -> int:
    """What one decoder layer keeps for its backward pass, over T packed tokens."""
    a, n = run.architecture, run.numbers
    H, I, T, e = a.hidden, a.intermediate, run.tokens_at_once, n.activation  # noqa: E741
    # A norm keeps its input and its normalised input in float32 (bfloat16: the second in bfloat16); what it emits is
    # kept once by the matrices that read it, or once by each where autocast makes them copies.
    norms = 2 * (FP32 + FP32) * H + (3 + 2) * e * H if n.cast else 2 * (FP32 + e + e) * H
    statistics = T * (2 * FP32 + a.heads * FP32)
    mlp = 4 * T * I * e
    return T * norms + _attention_saved(run) + statistics + mlp + _lora_saved(run)


def _attention_saved(run: Run) -> int:
    """Queries, keys, values and what they attended to; flash attention 2 keeps the segments' apart from the prefix's,
    and their keys and values behind the prompt's. torch's own is merged from two calls, which share the prompt's."""
    a, T, e = run.architecture, run.tokens_at_once, run.numbers.activation
    once = T * (2 * a.hidden + 2 * a.kv_width) * e
    if run.kernels.attention == "sdpa":
        return once
    segments = run.response_tokens_at_once * a.hidden + 2 * run.responses_at_once * run.keys * a.kv_width
    return once + (T * a.hidden + segments) * e


def _lora_saved(run: Run) -> int:
    """Inputs of the adapters' two matrices, float32 as PEFT keeps adapters, less those that frozen matrices let go."""
    if not run.lora_r:
        return 0
    a, T, e = run.architecture, run.tokens_at_once, run.numbers.activation
    adapters = sum(T * FP32 * (inputs + run.lora_r) for inputs, _ in a.linears)
    return adapters - T * e * (3 * a.hidden + a.intermediate)


def layer_backward_bytes(run: Run) -> int:
    """What a layer's backward pass needs beside what was kept: gradients of the stream, the MLP and one matrix."""
    a, n, T = run.architecture, run.numbers, run.tokens_at_once
    stream, middle = T * a.hidden * n.residual, T * a.intermediate * n.activation
    matrix = 0 if run.lora_r else a.hidden * a.intermediate * (FP32 if n.cast else n.gradient)
    half = a.hidden * a.intermediate * n.cast  # autocast's gradient, before it is the weight's
    return stream + max(2 * middle, middle + matrix + half)


def layer_forward_bytes(run: Run) -> int:
    """What a layer holds at once where nothing is kept: in its attention, or in its MLP."""
    a, n, T = run.architecture, run.numbers, run.tokens_at_once
    H, K, e = a.hidden, a.kv_width, n.activation
    G, GN, L = run.responses_at_once, run.response_tokens_at_once, run.keys
    rotated = FP32 if n.cast else e  # autocast: keys leave the rotation in float32, values do not
    stream = 3 * T * H * n.residual  # the embeddings, the residual, what the norm emits
    own = T * H * rotated + T * K * (rotated + e) + GN * H * rotated + GN * K * (rotated + e) + T * H * e
    joined = 0 if run.kernels.attention == "sdpa" else G * L * K * (rotated + e)
    casts = (T * H + T * K) * e if n.cast else 0
    attention = own + joined + casts + GN * H * e
    return stream + max(attention, 3 * T * a.intermediate * e)
