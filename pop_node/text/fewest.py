"""How many tokens a text has at least, from its bytes alone: what can never fit into a context
need not be tokenised, which takes a thread two seconds for 3 MB.

A token of byte-level BPE stands for the bytes that its spelling says, and bytes that no token
stands for are left out. Where a tokenizer may do anything else with a text (normalize it, remove
parts, put several words into one unknown token), nothing is known.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE


@dataclass(frozen=True, slots=True)
class FewestTokens:
    """``longest`` is the most bytes of one token, 0 where nothing is known; ``left_out`` are the
    bytes that no token stands for."""

    longest: int = 0
    left_out: bytes = b""

    @classmethod
    def of(cls, tokenizer: Tokenizer, spellings: Iterable[bytes]) -> FewestTokens:
        """``spellings``: the bytes of every token that is not special."""
        added = tokenizer.get_added_tokens_decoder().values()
        model = tokenizer.model
        is_plain = (
            tokenizer.normalizer is None
            and isinstance(model, BPE)
            and model.unk_token is None
            and not any(token.lstrip or token.rstrip for token in added)
            and _only_splits(tokenizer.pre_tokenizer)
        )
        if not is_plain:
            return cls()
        lengths = {spelling: len(spelling) for spelling in spellings}
        special = max((len(token.content.encode()) for token in added), default=0)
        left_out = bytes(byte for byte in range(256) if bytes([byte]) not in lengths)
        return cls(max([special, *lengths.values()]), left_out)

    def of_text(self, text: str) -> int:
        """At least so many tokens ``text`` has. Raises ``UnicodeEncodeError``."""
        if not self.longest:
            return 0
        return -(-len(text.encode().translate(None, self.left_out)) // self.longest)


def _only_splits(pre_tokenizer: Any) -> bool:
    """Whether it makes words of the bytes of a text, and keeps each of them."""
    if pre_tokenizer is None:
        return False
    state = json.loads(pre_tokenizer.__getstate__())
    steps = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    return any(step["type"] == "ByteLevel" for step in steps) and all(
        step["type"] in ("ByteLevel", "Digits")
        or (step["type"] == "Split" and step["behavior"] != "Removed")
        for step in steps
    )
