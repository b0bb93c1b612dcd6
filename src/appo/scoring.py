"""One forward pass over a group: log-probabilities, hidden states, frame attention.

Shape suffixes: G responses, P prompt tokens, N response tokens (padded), L = P + N, F frames, H hidden size,
V vocabulary, n tokens picked out of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from appo.attention import appo_attention, capture_frame_attention, full_precision
from appo.packing import group_rows, pack_group, unwrap
from appo.spans import frame_spans
from appo.types import GroupScores

# Rows of (rows, V) logits held at once: with a 152k vocabulary and float32, 512 rows are 311 MB.
LOGIT_ROWS = 512


def score_group(
    model: Any,
    prompt: Mapping[str, Any],
    responses: Sequence[Tensor],
    *,
    capture_layers: int = 3,
    temperature: float = 1.0,
    shared_prefix: bool = True,
    rows_per_chunk: int = 0,
) -> GroupScores:
    """Score G responses to one prompt in one forward pass. Source: paper step 1, without eager attention.

    Args:
        model: a Hugging Face video language model (PEFT-wrapped or not).
        prompt: the processor's output for one prompt: ``input_ids`` (1, P) and whatever belongs to its videos and
            images (``pixel_values_videos``, ``video_grid_thw``, ``second_per_grid_ts``, ``mm_token_type_ids``, ...).
        responses: G int64 tensors of response token ids, EOS included, each of its own length >= 1.
        capture_layers: average attention to frames over so many last decoder layers; 0: capture nothing.
        temperature: the sampling temperature; log-probabilities are those of logits / temperature.
        shared_prefix: True: prompt and video once, the responses packed behind them (ours, exact). False: ordinary
            rows, prompt + response each.
        rows_per_chunk: responses of one forward pass, where memory asks for it; 0: all G.

    Returns:
        GroupScores; ``log_probs_GN`` carries gradients unless the caller disables them.

    Raises:
        ValueError: no responses, an empty response, a prompt of several rows, temperature <= 0, an architecture or
            attention implementation that cannot share a prefix or be captured.
    """
    _check_group(prompt, responses, temperature)
    base = unwrap(model)
    device = next(base.parameters()).device
    prompt = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in prompt.items()}
    forward = _packed_hidden if shared_prefix else _rows_hidden
    step = rows_per_chunk or len(responses)
    chunks = [
        forward(base, prompt, responses[start : start + step], capture_layers)
        for start in range(0, len(responses), step)
    ]
    hidden_GNH, mask_GN, frame_attention_GNF = (_stack_chunks(part) for part in zip(*chunks, strict=True))
    assert hidden_GNH is not None
    assert mask_GN is not None
    ids_GN = nn.utils.rnn.pad_sequence([r.to(device) for r in responses], batch_first=True)
    log_probs_GN = _token_log_probs(base, hidden_GNH, ids_GN, temperature)
    return GroupScores(
        log_probs_GN=log_probs_GN.masked_fill(~mask_GN, 0.0),
        mask_GN=mask_GN,
        hidden_GNH=hidden_GNH.detach(),
        frame_attention_GNF=None if frame_attention_GNF is None else frame_attention_GNF * mask_GN[..., None],
    )


def _stack_chunks(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Chunks of responses, each padded to its own longest, as one group padded to the longest of all."""
    tensors = [part for part in parts if part is not None]
    if len(tensors) < 2:
        return tensors[0] if tensors else None
    return nn.utils.rnn.pad_sequence([row for tensor in tensors for row in tensor], batch_first=True)


def _rows_hidden(
    base: Any, prompt: Mapping[str, Any], responses: Sequence[Tensor], layers: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states (G, N, H) that emit each token, mask (G, N) and frame attention (G, N, F), from ordinary rows."""
    rows, mask_GN = group_rows(prompt, responses)
    P, (G, N) = prompt["input_ids"].shape[1], mask_GN.shape
    query_GN = (P - 1 + torch.arange(N, device=mask_GN.device)).expand(G, -1)
    frame_L, frames = _frames(base, prompt, length=P + N)
    context: Any = nullcontext()
    if layers:
        context = capture_frame_attention(base, frame_L.expand(G, -1), query_GN, frames=frames, layers=layers)
    with context as capture:
        extra = {} if capture is None else {"frame_capture": capture}
        hidden_GLH = base.base_model(**rows, use_cache=False, **extra).last_hidden_state
    return hidden_GLH[:, P - 1 : P - 1 + N], mask_GN, None if capture is None else capture.attention_BNF


def _packed_hidden(
    base: Any, prompt: Mapping[str, Any], responses: Sequence[Tensor], layers: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same from the packed group. To the capture, its keys are the shared prefix and a segment of length N."""
    packed = pack_group(base, prompt, responses)
    G, N = packed.layout.mask_GN.shape
    frame_L, frames = _frames(base, prompt, length=packed.layout.prefix + 1 + N)
    # The prompt's last token, which starts every segment, is text: dropping its entry shifts no frame.
    frame_GL = torch.cat([frame_L[: packed.layout.prefix], frame_L[packed.layout.prefix + 1 :]]).expand(G, -1)
    query_GN = torch.arange(N, device=frame_L.device).expand(G, -1)
    context: Any = appo_attention(base)
    if layers:
        context = capture_frame_attention(base, frame_GL, query_GN, frames=frames, layers=layers)
    with context as capture:
        extra = {} if capture is None else {"frame_capture": capture}
        hidden_1TH = base.base_model(**packed.inputs, use_cache=False, **extra).last_hidden_state
    packed.layout.assert_kept()
    hidden_GNH = hidden_1TH[0][packed.layout.index_GN]
    return hidden_GNH, packed.layout.mask_GN, None if capture is None else capture.attention_BNF


def log_probs_at(model: Any, hidden_GNH: Tensor, *, temperature: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    """A callable ``(i_n, j_n) -> (n, V)`` float32: the policy's log-probabilities at chosen tokens. Source: ours.

    What :func:`appo.perception.token_weights` takes, so that no (G, N, V) tensor need exist.
    """
    head: Any = unwrap(model).get_output_embeddings()

    def at(i_n: Tensor, j_n: Tensor) -> Tensor:
        with torch.no_grad():
            return (full_precision(head(hidden_GNH[i_n, j_n])) / temperature).log_softmax(dim=-1)

    return at


def _check_group(prompt: Mapping[str, Any], responses: Sequence[Tensor], temperature: float) -> None:
    if prompt["input_ids"].ndim != 2 or prompt["input_ids"].shape[0] != 1:
        raise ValueError(f"a group has one prompt: input_ids must be (1, P), got {tuple(prompt['input_ids'].shape)}")
    if not responses or any(r.ndim != 1 or len(r) == 0 for r in responses):
        raise ValueError("responses must be a non-empty list of 1-D tensors of at least one token each")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def _frames(base: Any, prompt: Mapping[str, Any], length: int) -> tuple[Tensor, int]:
    """int64 (length,) frame of each position, -1 beyond the prompt and where none, and the number of frames."""
    spans = frame_spans(
        prompt["input_ids"][0],
        prompt.get("video_grid_thw"),
        video_token_id=base.config.video_token_id,
        merge_size=base.config.vision_config.spatial_merge_size,
    )
    return nn.functional.pad(spans.frame_L, (0, length - len(spans.frame_L)), value=-1), spans.frames


def _token_log_probs(base: Any, hidden_GNH: Tensor, ids_GN: Tensor, temperature: float) -> Tensor:
    """float32 (G, N) log-probabilities of the given tokens; logits exist for LOGIT_ROWS tokens at a time."""
    head: Any = base.get_output_embeddings()

    def tile(hidden_nH: Tensor, ids_n: Tensor) -> Tensor:
        logits_nV = full_precision(head(hidden_nH)) / temperature
        return -nn.functional.cross_entropy(logits_nV, ids_n, reduction="none")

    hidden_tiles = torch.split(hidden_GNH.flatten(0, 1), LOGIT_ROWS)
    pairs = zip(hidden_tiles, torch.split(ids_GN.flatten(), LOGIT_ROWS), strict=True)
    if torch.is_grad_enabled():
        # Recomputed in the backward pass, else autograd would keep every tile's logits.
        tiles = [checkpoint(tile, hidden, ids, use_reentrant=False) for hidden, ids in pairs]
    else:
        tiles = [tile(hidden, ids) for hidden, ids in pairs]
    return torch.cat(tiles).view(ids_GN.shape)
