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

from appo.attention import capture_frame_attention, full_precision
from appo.spans import frame_spans
from appo.types import GroupScores

# Rows of (rows, V) logits held at once: with a 152k vocabulary and float32, 512 rows are 311 MB.
LOGIT_ROWS = 512
# What a processor says per video or image, one entry (or block of patches) after another.
VISION_KEYS = (
    "pixel_values",
    "image_grid_thw",
    "pixel_values_videos",
    "video_grid_thw",
    "second_per_grid_ts",
)


def score_group(
    model: Any,
    prompt: Mapping[str, Any],
    responses: Sequence[Tensor],
    *,
    capture_layers: int = 3,
    temperature: float = 1.0,
    shared_prefix: bool = False,
) -> GroupScores:
    """Score G responses to one prompt in one forward pass. Source: paper step 1, without eager attention.

    Args:
        model: a Hugging Face video language model (PEFT-wrapped or not).
        prompt: the processor's output for one prompt: ``input_ids`` (1, P) and whatever belongs to its videos and
            images (``pixel_values_videos``, ``video_grid_thw``, ``second_per_grid_ts``, ``mm_token_type_ids``, ...).
        responses: G int64 tensors of response token ids, EOS included, each of its own length >= 1.
        capture_layers: average attention to frames over so many last decoder layers; 0: capture nothing.
        temperature: the sampling temperature; log-probabilities are those of logits / temperature.
        shared_prefix: False: ordinary rows, prompt + response each.

    Returns:
        GroupScores; ``log_probs_GN`` carries gradients unless the caller disables them.

    Raises:
        ValueError: no responses, an empty response, a prompt of several rows, temperature <= 0.
        NotImplementedError: ``shared_prefix=True``.
    """
    if shared_prefix:
        raise NotImplementedError("packing a group behind one prompt is not built yet: pass shared_prefix=False")
    _check_group(prompt, responses, temperature)
    base = unwrap(model)
    device = next(base.parameters()).device
    prompt = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in prompt.items()}
    rows, mask_GN = group_rows(prompt, responses)
    P = prompt["input_ids"].shape[1]
    N = mask_GN.shape[1]
    query_GN = (P - 1 + torch.arange(N, device=device)).expand(len(responses), -1)
    capture_context = (
        _capture(base, prompt, rows["input_ids"], query_GN, capture_layers) if capture_layers else nullcontext()
    )
    with capture_context as capture:
        extra = {} if capture is None else {"frame_capture": capture}
        hidden_GLH = base.base_model(**rows, use_cache=False, **extra).last_hidden_state
    hidden_GNH = hidden_GLH[:, P - 1 : P - 1 + N]
    log_probs_GN = _token_log_probs(base, hidden_GNH, rows["input_ids"][:, P:], temperature)
    return GroupScores(
        log_probs_GN=log_probs_GN.masked_fill(~mask_GN, 0.0),
        mask_GN=mask_GN,
        hidden_GNH=hidden_GNH.detach(),
        frame_attention_GNF=None if capture is None else capture.attention_BNF * mask_GN[..., None],
    )


def log_probs_at(model: Any, hidden_GNH: Tensor, *, temperature: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    """A callable ``(i_n, j_n) -> (n, V)`` float32: the policy's log-probabilities at chosen tokens. Source: ours.

    What :func:`appo.perception.token_weights` takes, so that no (G, N, V) tensor need exist.
    """
    head: Any = unwrap(model).get_output_embeddings()

    def at(i_n: Tensor, j_n: Tensor) -> Tensor:
        with torch.no_grad():
            return (full_precision(head(hidden_GNH[i_n, j_n])) / temperature).log_softmax(dim=-1)

    return at


def unwrap(model: Any) -> Any:
    """The Hugging Face model below PEFT's wrapper, if there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def group_rows(prompt: Mapping[str, Any], responses: Sequence[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Write a group as ordinary rows: the prompt G times, each followed by its response, right-padded.

    Args:
        prompt: processor output of one prompt, ``input_ids`` (1, P).
        responses: G int64 tensors.

    Returns:
        Model inputs with leading dimension G (vision tensors repeated G times), and the bool (G, N) response mask.
    """
    ids_1P: Tensor = prompt["input_ids"]
    G, P = len(responses), ids_1P.shape[1]
    # Padding repeats the prompt's last token: masked out, and never a vision placeholder, which the model counts.
    pad = int(ids_1P[0, -1])
    ids_GN = nn.utils.rnn.pad_sequence([r.to(ids_1P) for r in responses], batch_first=True, padding_value=pad)
    lengths_G = torch.tensor([len(r) for r in responses], device=ids_1P.device)
    mask_GN = torch.arange(ids_GN.shape[1], device=ids_1P.device) < lengths_G[:, None]
    prompt_mask_1P = prompt.get("attention_mask", torch.ones_like(ids_1P))
    rows = {
        "input_ids": torch.cat([ids_1P.expand(G, P), ids_GN], dim=1),
        "attention_mask": torch.cat([prompt_mask_1P.expand(G, P), mask_GN.to(prompt_mask_1P)], dim=1),
        **repeat_vision(prompt, G),
    }
    if "mm_token_type_ids" in prompt:
        types_1P = prompt["mm_token_type_ids"]
        rows["mm_token_type_ids"] = torch.cat([types_1P.expand(G, P), types_1P.new_zeros(G, ids_GN.shape[1])], dim=1)
    return rows, mask_GN


def repeat_vision(prompt: Mapping[str, Any], copies: int) -> dict[str, Tensor]:
    """The vision tensors of one prompt, repeated for ``copies`` rows that share it (in memory, for stock kernels)."""
    return {
        key: (value := torch.as_tensor(prompt[key])).repeat(copies, *[1] * (value.ndim - 1))
        for key in VISION_KEYS
        if prompt.get(key) is not None
    }


def _check_group(prompt: Mapping[str, Any], responses: Sequence[Tensor], temperature: float) -> None:
    if prompt["input_ids"].ndim != 2 or prompt["input_ids"].shape[0] != 1:
        raise ValueError(f"a group has one prompt: input_ids must be (1, P), got {tuple(prompt['input_ids'].shape)}")
    if not responses or any(r.ndim != 1 or len(r) == 0 for r in responses):
        raise ValueError("responses must be a non-empty list of 1-D tensors of at least one token each")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def _capture(base: Any, prompt: Mapping[str, Any], ids_GL: Tensor, query_GN: Tensor, layers: int) -> Any:
    """The capture context for rows that all start with the same prompt."""
    spans = frame_spans(
        prompt["input_ids"][0],
        prompt.get("video_grid_thw"),
        video_token_id=base.config.video_token_id,
        merge_size=base.config.vision_config.spatial_merge_size,
    )
    frame_GL = torch.full_like(ids_GL, -1)
    frame_GL[:, : len(spans.frame_L)] = spans.frame_L
    return capture_frame_attention(base, frame_GL, query_GN, frames=spans.frames, layers=layers)


def _token_log_probs(base: Any, hidden_GNH: Tensor, ids_GN: Tensor, temperature: float) -> Tensor:
    """float32 (G, N) log-probabilities of the given tokens; logits exist for LOGIT_ROWS tokens at a time."""
    head: Any = base.get_output_embeddings()

    def tile(hidden_nH: Tensor, ids_n: Tensor) -> Tensor:
        logits_nV = full_precision(head(hidden_nH)) / temperature
        return -nn.functional.cross_entropy(logits_nV, ids_n, reduction="none")

    pairs = zip(
        torch.split(hidden_GNH.flatten(0, 1), LOGIT_ROWS), torch.split(ids_GN.flatten(), LOGIT_ROWS), strict=True
    )
    if torch.is_grad_enabled():
        # Recomputed in the backward pass, else autograd would keep every tile's logits.
        tiles = [checkpoint(tile, hidden, ids, use_reentrant=False) for hidden, ids in pairs]
    else:
        tiles = [tile(hidden, ids) for hidden, ids in pairs]
    return torch.cat(tiles).view(ids_GN.shape)
