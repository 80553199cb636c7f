"""Which prefixes this node probably holds, in the mesh's own terms.

Maps prefix-chain values (``wire.prefix``) to the tokens they stand for and publishes changes as
``CacheDelta``. It is an estimate for routing: the engine's block hashes stay private and decide
alone what is reused. Entries leave in least-recently-used order once their distinct tokens exceed
what the block pool can hold, which is the order in which the pool itself evicts.
"""

from __future__ import annotations

from collections import OrderedDict

from wire.messages import CacheDelta
from wire.prefix import SPAN_BYTES

MAX_ENTRIES = 8192
"""16 bytes of digest each: 128 KiB per model. Guess."""


class PrefixDirectory:
    """Chain values of one model, newest use last."""

    def __init__(self, model: str, capacity_tokens: int) -> None:
        self._model = model
        self._capacity_tokens = capacity_tokens
        self._entries: OrderedDict[bytes, tuple[int, int]] = OrderedDict()
        self._held_tokens = 0
        self._added: dict[bytes, int] = {}
        self._removed: set[bytes] = set()

    def record(
        self,
        chain: list[bytes],
        canonical_bytes: int,
        prompt_tokens: int,
        held_tokens: int | None = None,
    ) -> None:
        """A prompt was computed here: every span of it is now (probably) cached.

        Of one that was computed in part only the spans within ``held_tokens`` are.
        The tokens of a span are taken in proportion to its bytes, rounded down.
        """
        before = 0
        for number, value in enumerate(chain, start=1):
            tokens = prompt_tokens * SPAN_BYTES * number // max(canonical_bytes, 1)
            if held_tokens is not None and tokens > held_tokens:
                break
            self._touch(value, tokens, tokens - before)
            before = tokens
        while self._entries and (
            self._held_tokens > self._capacity_tokens or len(self._entries) > MAX_ENTRIES
        ):
            value, (_, own) = self._entries.popitem(last=False)
            self._held_tokens -= own
            self._added.pop(value, None)
            self._removed.add(value)

    def clear(self) -> None:
        """The engine restarted: nothing is cached any more."""
        self._removed.update(self._entries)
        self._entries.clear()
        self._added.clear()
        self._held_tokens = 0

    def take_delta(self) -> CacheDelta | None:
        """Changes since the last call; None when there are none."""
        if not self._added and not self._removed:
            return None
        delta = CacheDelta(self._model, False, list(self._added.items()), list(self._removed))
        self._added, self._removed = {}, set()
        return delta

    def whole(self) -> CacheDelta:
        """Everything, for a router that has just connected."""
        added = [(value, tokens) for value, (tokens, _) in self._entries.items()]
        return CacheDelta(self._model, True, added, [])

    def _touch(self, value: bytes, tokens: int, own: int) -> None:
        old = self._entries.pop(value, None)
        if old is None:
            self._held_tokens += own
            self._removed.discard(value)
            self._added[value] = tokens
            self._entries[value] = (tokens, own)
        else:
            self._entries[value] = old
