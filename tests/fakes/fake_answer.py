"""The only right answer of a fake node, and what a prompt is to it.

The next token is a pure function of the prompt and the ids before it, so a token that is lost,
repeated or out of order shows in the text.
"""

from __future__ import annotations

import hashlib

import msgspec

from wire.messages import Input
from wire.prefix import canonical_bytes

VOCABULARY = 1000


def next_token(prompt: bytes, ids: list[int]) -> int:
    """The one token that follows ``ids`` after ``prompt``."""
    state = hashlib.blake2b(prompt + repr(ids).encode(), digest_size=8).digest()
    return int.from_bytes(state, "little") % VOCABULARY


def token_text(token: int) -> str:
    """Printable form; holds characters that JSON must escape."""
    return f'fake"{token}é\n'


def answer_ids(prompt: Input, count: int) -> list[int]:
    """The first ``count`` tokens of the only right answer."""
    data, ids = canonical_bytes(prompt), list[int]()
    for _ in range(count):
        ids.append(next_token(data, ids))
    return ids


def answer_text(prompt: Input, count: int) -> str:
    """Their text."""
    return "".join(map(token_text, answer_ids(prompt, count)))


def prompt_tokens(prompt: Input) -> int:
    """How many tokens the fake says a prompt has."""
    return max(1, len(canonical_bytes(prompt)) // 4)


def escape(text: str) -> bytes:
    """JSON-escape without the quotes, as nodes do."""
    return msgspec.json.encode(text)[1:-1]
