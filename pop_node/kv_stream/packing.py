"""Whether a piece of KV is packed before it goes over a link.

Pure. A link takes L wire bytes a second, the codec packs E bytes of KV a second into r wire bytes
for each, on a thread beside the link. A piece of n bytes then costs n/L raw and max(n/E, n r/L)
packed, so packing pays when E > L and r < 1. Unpacking is several times faster than packing and
plays no part. L is known from acknowledgements, E and r from what was packed before.
"""

from __future__ import annotations

HEADROOM = 2.0
"""How much faster than the link the codec has to be: it then takes half a core at most, on nodes
where it may be a core of the engine's. Measured on two cores with both nodes and an engine with
four streams on them, 1 Gbit/s: a packed hand-over takes 49 to 57 ms less of 236 and sets the
streams back no more than a raw one, within 10 ms (``benchmarks/kv_codec.py``). Twice is a guess:
what is gained shrinks with the link, what it costs does not."""

MAX_SHARE = 0.95
"""Wire bytes per byte of KV from which on packing is not worth its thread. KV in bfloat16 packs to
0.67 in pieces of 512 tokens and 0.70 in those of 16 (``benchmarks/kv_codec.py``)."""

FIRST_PACKED_BYTES_PER_S = 1e9
"""What the codec is taken for until it has packed something: 60 % of what one core with AVX-512
does (``benchmarks/codec.py``), so that links up to 4 Gbit/s try it."""

GAIN = 0.25
"""Weight of a new piece in both averages: they follow a change within ten pieces. Guess."""

RETRY_PIECES = 64
"""While packing does not pay for the sake of its own speed or shares, one piece of so many tries
again: other prompts pack otherwise, and an engine's busy moment ends. Guess: it costs 2 % of what
packing all of them would."""


class PackingRule:
    """What was seen on one link of late, and what follows from it for the next piece."""

    def __init__(self) -> None:
        self._packed_bytes_per_s = FIRST_PACKED_BYTES_PER_S
        self._fastest = FIRST_PACKED_BYTES_PER_S
        self._share = 0.0  # of packed pieces; 0 until there was one
        self._wire_share = 1.0  # of all pieces
        self._left_raw = 0

    def wants(self, kv_bytes_per_s: float) -> bool:
        """Pack the next piece?

        Args:
            kv_bytes_per_s: what the link carries, pieces counted as what they are unpacked; 0 when
                that is unknown, or the link has not been what held things up.
        """
        needed = kv_bytes_per_s * self._wire_share * HEADROOM
        if not needed or needed > self._fastest:
            return False
        if needed <= self._packed_bytes_per_s and self._share <= MAX_SHARE:
            self._left_raw = 0
            return True
        self._left_raw = (self._left_raw + 1) % RETRY_PIECES
        return self._left_raw == 0

    def packed(self, nbytes: int, packed_bytes: int, seconds: float) -> None:
        """``nbytes`` bytes of KV became ``packed_bytes``, perhaps more, in ``seconds``."""
        rate, share = nbytes / max(seconds, 1e-9), packed_bytes / nbytes
        self._packed_bytes_per_s += GAIN * (rate - self._packed_bytes_per_s)
        self._fastest = max(self._fastest, self._packed_bytes_per_s)
        self._share += GAIN * (share - self._share) if self._share else share

    def sent(self, nbytes: int, payload_bytes: int) -> None:
        """A piece of ``nbytes`` bytes of KV left in a payload of so many."""
        self._wire_share += GAIN * (payload_bytes / nbytes - self._wire_share)
