"""A tokenizer that loses nothing: one token a byte, beside the special tokens of Qwen's processors (or of others)."""

from __future__ import annotations

from collections.abc import Mapping

from recipes.tiny_policy.processor import SPECIAL
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def byte_tokenizer(named: Mapping[str, str] | None = None) -> PreTrainedTokenizerFast:
    """``named``: more special tokens, by the attributes under which a processor asks for them."""
    tokenizer = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    special = {"pad_token": SPECIAL[0], "eos_token": SPECIAL[2], "extra_special_tokens": dict(named or {})}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)
