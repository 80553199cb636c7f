"""Token ids back to text, a few ids at a time.

Owns the step from ids to characters; must not know stop strings. Every vocabulary we serve spells
tokens as bytes (byte-level BPE, or SentencePiece with byte fallback), so text is the UTF-8 decoding
of the tokens' bytes laid end to end. A decoder that keeps an unfinished character back therefore
gives exactly the text of decoding all ids at once, costs O(bytes) however the ids are cut, never
takes back what it gave, and is rebuilt by pushing the ids again.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from wire.errors import ConfigError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_UTF8 = codecs.getincrementaldecoder("utf-8")


@dataclass(frozen=True, slots=True)
class TokenTable:
    """The bytes of every token id, special tokens empty; shared by all streams of a model.

    ``strip_spaces`` leading spaces of the whole text are not part of it (SentencePiece's dummy
    prefix).
    """

    spellings: tuple[bytes, ...]
    strip_spaces: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenTable:
        """Spell out a tokenizer's vocabulary.

        Raises ``ConfigError`` for a decoder that is neither byte-level nor SentencePiece-like.
        """
        steps = _decoder_steps(tokenizer)
        if [step["type"] for step in steps] == ["ByteLevel"]:
            spell, strip_spaces = _spell_byte_level, 0
        else:
            spell, strip_spaces = _spell_sentencepiece, _check_sentencepiece(steps)
        vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        spellings = [b""] * (max(vocabulary.values(), default=-1) + 1)
        for token, number in vocabulary.items():
            spellings[number] = spell(token)
        for number, added in tokenizer.get_added_tokens_decoder().items():
            if added.special:
                spellings[number] = b""
        return cls(tuple(spellings), strip_spaces)


class Detokenizer:
    """Text of one output, piece by piece."""

    def __init__(self, table: TokenTable) -> None:
        self._spellings = table.spellings
        self._strip = table.strip_spaces
        self._utf8 = _UTF8("replace")

    def push(self, ids: Iterable[int]) -> str:
        """Characters completed by ``ids``; ids outside the vocabulary have no text."""
        spellings = self._spellings
        known = len(spellings)
        data = b"".join([spellings[i] for i in ids if 0 <= i < known])
        return self._clean(self._utf8.decode(data)) if data else ""

    def flush(self) -> str:
        """What an unfinished character at the end stands for: U+FFFD, or nothing."""
        return self._clean(self._utf8.decode(b"", final=True))

    def _clean(self, text: str) -> str:
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
                break
            text = text[1:]
            self._strip -= 1
        return text


def _decoder_steps(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    decoder: Any = tokenizer.decoder
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    return steps


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE: printable Latin-1 stands for itself, the remaining bytes
    take the code points from 256 on, in order. Source: GPT-2."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + rank): byte for rank, byte in enumerate(shifted)})
    return alphabet


_ALPHABET = _byte_alphabet()


def _spell_byte_level(token: str) -> bytes:
    try:
        return bytes([_ALPHABET[char] for char in token])
    except KeyError:  # an added token is written in plain text
        return token.encode()


def _spell_sentencepiece(token: str) -> bytes:
    single = _BYTE_TOKEN.fullmatch(token)
    return bytes.fromhex(single[1]) if single else token.replace("\u2581", " ").encode()


def _check_sentencepiece(steps: list[dict[str, Any]]) -> int:
    """Leading spaces to strip, once the steps are known to be the ones implemented here."""
    kinds = [step["type"] for step in steps]
    known = ["Replace", "ByteFallback", "Fuse", "Strip"]
    good = kinds in (known, known[:3])
    if good:
        good = (steps[0]["pattern"], steps[0]["content"]) == ({"String": "\u2581"}, " ")
    strip = steps[3] if good and len(steps) == 4 else {"content": " ", "start": 0, "stop": 0}
    spaces = strip["start"]
    if not good or strip["content"] != " " or strip["stop"] != 0 or not isinstance(spaces, int):
        raise ConfigError(
            f"the tokenizer's decoder ({' + '.join(kinds) or 'none'}) is not supported",
            suggestion="byte-level and SentencePiece byte-fallback decoders are",
        )
    return spaces
