"""One forward pass over a group: log-probabilities, hidden states, frame attention.

Shape suffixes: G responses, P prompt tokens, N response tokens (padded), L = P + N, F frames, H hidden size,
V vocabulary, n tokens picked out of a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from appo.models.families import family_of, unwrap
from appo.models.frame_attention import FrameCapture, appo_attention, capture_frame_attention, full_precision
from appo.models.prefix_packing import PackedGroup, group_rows, pack_group
from appo.models.prompt import Prompt
from appo.types import GroupScores

# Rows of (rows, V) logits held at once: with a 152k vocabulary and float32, 512 rows are 311 MB.
LOGIT_ROWS = 512
# Words of the vocabulary whose log-probabilities the weights hold at once: 128 tokens x 16k words are 8 MB in float32.
VOCABULARY_TILE = 16384


def score_group(
    model: Any,
    prompt: Prompt | Mapping[str, Any],
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
        prompt: an encoded prompt, or a processor's output for one prompt as it is: ``input_ids`` (1, P) and whatever
            belongs to its videos and images (``pixel_values_videos``, ``video_grid_thw``, ``second_per_grid_ts``,
            ``mm_token_type_ids``, ...).
        responses: G int64 tensors of response token ids, EOS included, each of its own length >= 1.
        capture_layers: average attention to frames over so many last decoder layers; 0: capture nothing.
        temperature: the sampling temperature; log-probabilities are those of logits / temperature.
        shared_prefix: True: prompt and video once, the responses packed behind them (exact; not in the paper).
            False: ordinary rows, prompt + response each.
        rows_per_chunk: responses of one forward pass, where memory asks for it; 0: all G.

    Returns:
        GroupScores; ``log_probs_GN`` carries gradients unless the caller disables them.

    Raises:
        ValueError: no responses, an empty response, a prompt of several rows, temperature <= 0, a model type without
            a family, or an attention implementation that cannot share a prefix or be captured.
    """
    _check_group(responses, temperature)
    base = unwrap(model)
    device = next(base.parameters()).device
    prompt = Prompt.of(prompt).to(device)
    forward = _packed_hidden if shared_prefix else _rows_hidden
    step = rows_per_chunk or len(responses)
    chunks = [
        forward(base, prompt, responses[start : start + step], capture_layers)
        for start in range(0, len(responses), step)
    ]
    hidden_GNH, mask_GN, frame_attention_GNF = (stack_chunks(part) for part in zip(*chunks, strict=True))
    assert hidden_GNH is not None
    assert mask_GN is not None
    ids_GN = nn.utils.rnn.pad_sequence([r.to(device) for r in responses], batch_first=True)
    log_probs_GN, log_normalizer_GN = _token_log_probs(base, hidden_GNH, ids_GN, temperature)
    return GroupScores(
        log_probs_GN=log_probs_GN.masked_fill(~mask_GN, 0.0),
        mask_GN=mask_GN,
        hidden_GNH=hidden_GNH.detach(),
        log_normalizer_GN=log_normalizer_GN.detach(),
        frame_attention_GNF=None
        if frame_attention_GNF is None
        else frame_attention_GNF.masked_fill(~mask_GN[..., None], 0.0),
    )


def stack_chunks(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Chunks of responses (G, N, ..), each padded to its own longest, as one group padded to the longest of all."""
    tensors = [part for part in parts if part is not None]
    if len(tensors) < 2:
        return tensors[0] if tensors else None
    return nn.utils.rnn.pad_sequence([row for tensor in tensors for row in tensor], batch_first=True)


def _rows_hidden(
    base: Any, prompt: Prompt, responses: Sequence[Tensor], layers: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states (G, N, H) that emit each token, mask (G, N) and frame attention (G, N, F), from ordinary rows."""
    rows, mask_GN = group_rows(base, prompt, responses)
    P, (G, N) = prompt.length, mask_GN.shape
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
    base: Any, prompt: Prompt, responses: Sequence[Tensor], layers: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same from the packed group."""
    packed = pack_group(base, prompt, responses)
    with packed_capture(base, prompt, packed, layers) as capture:
        extra = {} if capture is None else {"frame_capture": capture}
        hidden_1TH = base.base_model(**packed.inputs, use_cache=False, **extra).last_hidden_state
    packed.layout.assert_kept()
    hidden_GNH = hidden_1TH[0][packed.layout.index_GN]
    return hidden_GNH, packed.layout.mask_GN, None if capture is None else capture.attention_BNF


def packed_capture(
    base: Any, prompt: Prompt, packed: PackedGroup, layers: int
) -> AbstractContextManager[FrameCapture | None]:
    """A context in which the model can run a packed group, with what captures its frame attention (G, N, F).

    Args:
        base: a Hugging Face model.
        prompt: of the group.
        packed: the group.
        layers: last decoder layers to capture; 0: none, and there is no capture.
    """
    if not layers:
        return appo_attention(base)
    # To the capture, the keys of a packed group are the shared prefix and a segment of length N.
    (G, N), S = packed.layout.mask_GN.shape, packed.layout.prefix
    frame_L, frames = _frames(base, prompt, length=S + 1 + N)
    # The prompt's last token, which starts every segment, is text: dropping its entry shifts no frame.
    frame_GL = torch.cat([frame_L[:S], frame_L[S + 1 :]]).expand(G, -1)
    query_GN = torch.arange(N, device=frame_L.device).expand(G, -1)
    return capture_frame_attention(base, frame_GL, query_GN, frames=frames, layers=layers)


@dataclass(frozen=True)
class HeadLogProbs:
    """The policy's log-probabilities at chosen tokens of a scored group, made when asked for.

    What `token_weights` takes, so that neither (G, N, V) nor (n, V) need exist: the scoring pass
    has left the normaliser of each token, so a piece of the LM head gives a piece of the log-probabilities, and the
    head runs once over them.
    """

    head: Any
    hidden_GNH: Tensor
    log_normalizer_GN: Tensor
    temperature: float
    vocabulary_tile: int = VOCABULARY_TILE
    softcap: float | None = None  # of the logits (Gemma)

    @torch.no_grad()
    def __call__(self, i_n: Tensor, j_n: Tensor) -> Tensor:
        """(n, V), float32 at least, for the given responses and tokens."""
        return torch.cat(list(self.tiles(i_n, j_n)), dim=1)

    @torch.no_grad()
    def tiles(self, i_n: Tensor, j_n: Tensor) -> Iterator[Tensor]:
        """The same in pieces of at most ``vocabulary_tile`` words."""
        hidden_nH, normalizer_n1 = self.hidden_GNH[i_n, j_n], self.log_normalizer_GN[i_n, j_n, None]
        for start in range(0, len(self.head.weight), self.vocabulary_tile):
            logits_nv = word_logits(self.head, hidden_nH, slice(start, start + self.vocabulary_tile), self.softcap)
            yield logits_nv / self.temperature - normalizer_n1


def word_logits(head: Any, hidden: Tensor, words: slice | Sequence[int], softcap: float | None = None) -> Tensor:
    """(..., v), float32 at least: the head's logits of some words, from hidden states (..., H)."""
    bias_v = None if head.bias is None else head.bias[words]
    with _in_precision_of(head, hidden):
        logits = full_precision(nn.functional.linear(hidden.to(head.weight.dtype), head.weight[words], bias_v))
    return capped(logits, softcap)


def softcap_of(base: Any) -> float | None:
    """Where a model's logits are bent to stay within ± this number."""
    cap: float | None = getattr(base.config.get_text_config(), "final_logit_softcapping", None)
    return cap


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh(logits / softcap); None: as they are."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _in_precision_of(head: Any, hidden: Tensor) -> AbstractContextManager[Any]:
    """No autocast where the head is wider than what it reads: its logits are wanted as exact as it is.

    So it is after TRL's ``cast_lm_head_to_fp32``, whose update runs the head outside of autocast too.
    """
    wider = torch.promote_types(head.weight.dtype, hidden.dtype) != hidden.dtype
    return torch.autocast(hidden.device.type, enabled=False) if wider else nullcontext()


@torch.no_grad()
def log_normalizers(model: Any, hidden_GNH: Tensor, ids_GN: Tensor, log_probs_GN: Tensor, temperature: float) -> Tensor:
    """float32 (G, N), at least: the normalisers of a pass that gave log-probabilities alone, as a word's logit less its
    log-probability. Run it in the precision (autocast) of that pass.

    Args:
        model: the policy, for its LM head.
        hidden_GNH: final hidden states that emit the tokens.
        ids_GN: int64 (G, N), the tokens.
        log_probs_GN: their log-probabilities at this temperature.
        temperature: the sampling temperature.
    """
    head = model.get_output_embeddings()
    with _in_precision_of(head, hidden_GNH):
        own_GNH = head.weight[ids_GN]
        logits_GN = full_precision((hidden_GNH.to(own_GNH.dtype)[..., None, :] @ own_GNH[..., None])[..., 0, 0])
    bias_GN = 0.0 if head.bias is None else head.bias[ids_GN]
    return capped(logits_GN + bias_GN, softcap_of(unwrap(model))) / temperature - log_probs_GN


def log_probs_at(model: Any, scores: GroupScores, *, temperature: float = 1.0) -> HeadLogProbs:
    """The log-probabilities of a group that ``model`` has just scored at this temperature."""
    head = model.get_output_embeddings()
    normalizer_GN = scores.log_normalizer_GN
    return HeadLogProbs(head, scores.hidden_GNH, normalizer_GN, temperature, softcap=softcap_of(unwrap(model)))


def _check_group(responses: Sequence[Tensor], temperature: float) -> None:
    if not responses or any(r.ndim != 1 or len(r) == 0 for r in responses):
        raise ValueError("responses must be a non-empty list of 1-D tensors of at least one token each")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def _frames(base: Any, prompt: Prompt, length: int) -> tuple[Tensor, int]:
    """int64 (length,) frame of each position, -1 beyond the prompt and where none, and the number of frames."""
    spans = family_of(base).spans(prompt)
    return nn.functional.pad(spans.frame_L, (0, length - len(spans.frame_L)), value=-1), spans.frames


def _token_log_probs(base: Any, hidden_GNH: Tensor, ids_GN: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """float32 (G, N) log-probabilities of the given tokens and normalisers; logits exist for LOGIT_ROWS at a time."""
    head: Any = base.get_output_embeddings()
    softcap = softcap_of(base)

    def tile(hidden_nH: Tensor, ids_n: Tensor) -> tuple[Tensor, Tensor]:
        with _in_precision_of(head, hidden_nH):
            logits_nV = capped(full_precision(head(hidden_nH)), softcap) / temperature
        normalizer_n = logits_nV.logsumexp(dim=-1)
        return logits_nV.gather(-1, ids_n[:, None])[:, 0] - normalizer_n, normalizer_n

    hidden_tiles = torch.split(hidden_GNH.flatten(0, 1), LOGIT_ROWS)
    pairs = zip(hidden_tiles, torch.split(ids_GN.flatten(), LOGIT_ROWS), strict=True)
    if torch.is_grad_enabled():
        # Recomputed in the backward pass, else autograd would keep every tile's logits.
        tiles = [checkpoint(tile, hidden, ids, use_reentrant=False) for hidden, ids in pairs]
    else:
        tiles = [tile(hidden, ids) for hidden, ids in pairs]
    log_probs, normalizers = zip(*tiles, strict=True)
    return torch.cat(log_probs).view(ids_GN.shape), torch.cat(normalizers).view(ids_GN.shape)
