"""Rebuilds the tokenizer that a GGUF file describes: byte-level BPE as SmolLM has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from wire.errors import ConfigError


def read_tokenizer(meta: Callable[..., Any]) -> tuple[bytes, list[str]]:
    """(tokenizer.json, tokens by id). Raises ``ConfigError`` for any other kind of tokenizer."""
    from gguf import TokenType

    kind = (meta("tokenizer.ggml.model"), meta("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ConfigError(
            f"tokenizer {kind[0]}/{kind[1]} is not supported in GGUF, only gpt2/smollm is",
            suggestion="add the model from its Hugging Face directory",
        )
    if meta("tokenizer.ggml.add_bos_token", False) or meta("tokenizer.ggml.add_eos_token", False):
        raise ConfigError("a tokenizer that adds BOS or EOS is not supported in GGUF")
    tokens = meta("tokenizer.ggml.tokens", [])
    types = meta("tokenizer.ggml.token_type", [])
    merges = meta("tokenizer.ggml.merges", [])
    if not tokens or len(tokens) != len(types) or len(set(tokens)) != len(tokens):
        raise ConfigError("the vocabulary is empty, ambiguous or lacks its token types")
    odd = sorted({int(t) for t in types} - {int(TokenType.NORMAL), int(TokenType.CONTROL)})
    if odd:
        raise ConfigError(f"tokens of type {TokenType(odd[0]).name} are not supported in GGUF")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise ConfigError("the tokenizer's merges are malformed")

    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    # Every digit is a token of its own; the rest is split by GPT-2's expression.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    return tokenizer.to_str().encode(), tokens
