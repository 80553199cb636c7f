"""The fake model of a simulated mesh: its tokens, its text, and what its KV cache holds.

The next token is a pure function of the past. A cache slot holds, for each layer and component, a
digest of all tokens up to it; computing reads every slot before it through the block table, and a
single wrong, stale or missing one makes the next token, and what is written, wrong.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

from pop_node.engine.scheduling.schedule import Row
from pop_node.kv_stream.spec import KvComponent, KvGroup, KvSpec
from pop_node.text.detokenizer import TokenTable
from pop_node.text.tokenizer import TextCodec

VOCABULARY = 48
EOS = 47
BLOCK_TOKENS = 4
CONTEXT_TOKENS = 64

LAYERS = 2
SPEC = KvSpec(
    (
        KvGroup(
            "tokens",
            tuple(range(LAYERS)),
            (KvComponent("k", "float32", (4096,)), KvComponent("v", "bfloat16", (8192,))),
        ),
    )
)
"""16 KiB a token, layer and component: a few tokens fill a slot, so transfers have many pieces.
Nodes pack V and cannot pack K."""

WIDTH = 8  # bytes that stand for those 16 KiB
_TAGS = [[bytes([16 * c + layer]) for layer in range(LAYERS)] for c in range(2)]
WRONG = b"\xee" * WIDTH

# Every fifth token is half a character, so text waits for its other half; 46 and 45 spell words
# that begin like each other, for stop strings that are held back.
_SPELLINGS = tuple(
    b"\xc3" if i % 10 == 4 else b"\xa9" if i % 10 == 9 else b"w%d " % i for i in range(VOCABULARY)
)
_TABLE = TokenTable(_SPELLINGS, 0)


def codec() -> TextCodec:
    """The text side of the model; only ids are tokenised."""
    nothing: Any = SimpleNamespace()
    return TextCodec(nothing, None, _TABLE, frozenset({EOS}), CONTEXT_TOKENS, VOCABULARY)


class Truth:
    """What the cache must hold for a growing list of tokens; grows with it."""

    __slots__ = ("_count", "_value", "rows")

    def __init__(self) -> None:
        self.rows = [[bytearray() for _ in range(LAYERS)] for _ in range(2)]
        self._count = 0
        self._value = 0

    def guessed(self, drafts: Sequence[int]) -> Truth:
        """What it would be if ``drafts`` came next; this one stays as it is."""
        other = Truth()
        other.rows = [[bytearray(row) for row in rows] for rows in self.rows]
        other._count, other._value = self._count, self._value
        other._append(drafts)
        return other

    def grow(self, ids: Sequence[int]) -> None:
        """``ids`` are all tokens known now, those of before first."""
        self._append(ids[self._count :])

    def _append(self, ids: Sequence[int]) -> None:
        value = self._value
        for token in ids:
            value = (value * 1_000_003 + token + 1) % (2**55 - 55)
            raw = value.to_bytes(7, "little")
            for rows, tags in zip(self.rows, _TAGS, strict=True):
                for row, tag in zip(rows, tags, strict=True):
                    row += raw + tag
        self._count += len(ids)
        self._value = value

    @property
    def next_token(self) -> int:
        return self._value % VOCABULARY


def answer(prompt: Iterable[int], max_tokens: int, *, ignore_eos: bool) -> list[int]:
    """The undisturbed model's output ids, without regard to stop strings."""
    ids = list(prompt)
    start = len(ids)
    truth = Truth()
    while len(ids) - start < max_tokens:
        truth.grow(ids)
        ids.append(truth.next_token)
        if ids[-1] == EOS and not ignore_eos:
            break
    return ids[start:]


def expected_text(
    ids: Sequence[int], stops: Sequence[str], *, ignore_eos: bool
) -> tuple[str, int, str]:
    """Text, number of tokens and finish reason of an undisturbed answer ``ids``.

    Naive on purpose: it shares no code with the nodes' text streams.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = ""
    for count, token in enumerate(ids, start=1):
        text += decoder.decode(_SPELLINGS[token])
        ends = [(text.find(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
        if ends:
            end, length = min(ends)
            return text[: end + length], count, "stop"
    stopped = bool(ids) and ids[-1] == EOS and not ignore_eos
    return text + decoder.decode(b"", True), len(ids), "stop" if stopped else "length"


class _Device:
    device = None


class CacheMemory(_Device):
    """All slots of one component: one row of bytes per layer. Looks enough like a tensor
    ``[layers, blocks, block_tokens]`` for the stager to keep it."""

    def __init__(self, num_blocks: int) -> None:
        self.shape = (LAYERS, num_blocks, BLOCK_TOKENS)
        self.rows = [bytearray(num_blocks * BLOCK_TOKENS * WIDTH) for _ in range(LAYERS)]

    def view(self, *_: object) -> CacheMemory:
        return self

    def read(self, layer: int, blocks: Sequence[int], lo: int, hi: int) -> bytes:
        """Slots of tokens ``[lo, hi)`` of a sequence, through its block table."""
        row, parts = self.rows[layer], []
        while lo < hi:
            end = min(hi, (lo // BLOCK_TOKENS + 1) * BLOCK_TOKENS)
            at = (blocks[lo // BLOCK_TOKENS] * BLOCK_TOKENS + lo % BLOCK_TOKENS) * WIDTH
            parts.append(row[at : at + (end - lo) * WIDTH])
            lo = end
        return b"".join(parts)

    def write(self, layer: int, blocks: Sequence[int], lo: int, data: bytes) -> None:
        """Put ``data`` at the slots of tokens from ``lo`` on."""
        row, hi, start = self.rows[layer], lo + len(data) // WIDTH, lo
        while lo < hi:
            end = min(hi, (lo // BLOCK_TOKENS + 1) * BLOCK_TOKENS)
            at = (blocks[lo // BLOCK_TOKENS] * BLOCK_TOKENS + lo % BLOCK_TOKENS) * WIDTH
            row[at : at + (end - lo) * WIDTH] = data[(lo - start) * WIDTH : (end - start) * WIDTH]
            lo = end


class FakeModel:
    """Computes rows on a cache; knows the truth of each sequence that it has seen."""

    def __init__(self, num_blocks: int) -> None:
        self.cache = tuple(CacheMemory(num_blocks) for _ in range(2))
        self._truths: dict[int, Truth] = {}

    def forget(self, seq: int) -> None:
        """A sequence is gone."""
        self._truths.pop(seq, None)

    def _truth(self, row: Row) -> Truth:
        seq = row.sequence.seq
        truth = self._truths.get(seq)
        if truth is None:
            truth = self._truths[seq] = Truth()
        truth.grow(row.sequence.ids)
        return truth

    def compute(self, row: Row, layer: int) -> bool:
        """Write the KV of a row's tokens in one layer; False when what is before it is wrong."""
        truth, blocks, good = self._truth(row), row.sequence.blocks, True
        truth = truth.guessed(row.drafts) if row.drafts else truth
        start, end = row.start, row.end
        for memory, rows in zip(self.cache, truth.rows, strict=True):
            good &= memory.read(layer, blocks, 0, start) == rows[layer][: start * WIDTH]
        for memory, rows in zip(self.cache, truth.rows, strict=True):
            data = rows[layer][start * WIDTH : end * WIDTH]
            memory.write(layer, blocks, start, bytes(data) if good else WRONG * row.count)
        return good

    def sample(self, row: Row, good: bool) -> list[int]:
        """The token after a row, and after each of its drafts; others when it was computed on wrong
        KV."""
        truth = self._truth(row)
        drafts = row.drafts
        truths = [truth, *(truth.guessed(drafts[: n + 1]) for n in range(len(drafts)))]
        tokens = [each.next_token for each in truths]
        return tokens if good else [(token + 1) % (VOCABULARY - 1) for token in tokens]
