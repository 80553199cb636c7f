"""A block of losslessly coded values, byte by byte; its header, checked.

A floating-point value is a sign, an exponent and a mantissa. Signs and mantissas of weights and of
KV are as good as random and stay as they are; exponents carry about 2.6 bits in 8 (bfloat16) and
are coded with rANS, 32 states side by side. All integers are little-endian.

    offset  bytes
    0       4       "pmxc"
    4       1       version of the format: 1
    5       1       method: 0 raw, 1 rANS
    6       1       dtype: 0 none of these, 1 bfloat16, 2 float16, 3 float8_e4m3fn, 4 float8_e5m2
    7       1       raw: why (``RAW_REASONS``); rANS: symbols in the table, + 128 where the last one
                    is the escape
    8       4       decoded bytes D
    12      4       bytes of the whole block
    16              rANS: the table: 16 exponents of a byte, then their 16 frequencies of two bytes,
                    zero past the last symbol and for the escape's exponent; frequencies sum to 4096
                    the directory, an entry per tile (below)
            4       checksum of all bytes so far
                    raw: D bytes as they came; rANS: the planes, then a section per tile

*Tiles* are decoded independently: of 65,536 bytes where raw, of 32,768 values where coded, the
last one shorter. A directory entry is the checksum of the tile's decoded bytes (4 bytes), for
coded tiles before it the number of words and the number of escapes of its section (4 bytes each).

*Planes* hold sign and mantissa: of a value whose mantissa has m bits the number ``sign << m |
mantissa`` of R = m + 1 bits. It is cut, from its low end, into pieces of 8, 4, 2 and 1 bits as R's
binary digits say (bfloat16: 8; float16: 8, 2, 1; e4m3: 4; e5m2: 2, 1), and each piece of all
values is a plane: value i at bits [w i, w i + w) of a little-endian string of bits, zeros up to
the next byte. Zeros fill the planes together up to a multiple of four bytes.

A *section* is 32 states of four bytes, the words of two bytes, the escapes of a byte, zeros up to
a multiple of four bytes. Values are coded in rows of 32, the last row filled up with the table's
first symbol. Within a row lane l has the value at position ``2 (l mod 16) + l div 16``: first the
even ones, then the odd ones, so that two vectors of results become one by a shift and an "or".
Decoding a row, for all lanes:

    slot = state mod 4096; symbol, offset = the slot's
    state = frequency[symbol] (state div 4096) + offset
    where state < 65536, in order of lanes: state = 65536 state + the next word

At the end every state is 65536 and no word is left. Escaped exponents are in order of *positions*.

*Slots*: bucket b < 16 has the slots [256 b, 256 b + 256). Its first ``bound[b]`` belong to symbol
b, the rest to ``other[b]`` (Walker's aliases), so that a symbol is found by one comparison and two
look-ups in tables of 16 and 32 entries, which fit into registers. Let ``left`` begin as the
frequencies; while a bucket not yet closed has left < 256, the first such closes with bound = left,
other = the first open bucket whose left > 256, which gives up 256 - bound. Buckets that remain
have bound 256. A symbol's offsets count its slots in their order.

*Checksum* of n bytes: 16 lanes of 32 bits; lane l begins as l * P. For each 64 bytes (zeros at the
end), lane l takes its word w: h = rotl(h + w * Q, 13) * P, which is XXH32's round. Then n takes all
lanes in the same way, and n ^= n >> 15; n *= Q; n ^= n >> 13. A change of one word always shows, of
others all but one in 2^32. (With one multiplication a round, pairs of flipped bits go unnoticed.)

Source: Duda, "Asymmetric numeral systems" (arXiv 1311.2540); Giesen, "Interleaved entropy coders"
(arXiv 1402.3392); Vose, "A linear algorithm for generating random numbers with a given
distribution" (IEEE TSE 17, 1991).
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

MAGIC = b"pmxc"
VERSION = 1
RAW, RANS = 0, 1

LANES = 32
"""Two vectors of 16 states, and a warp."""

SYMBOLS = 16
"""Of a table, one per lane of a vector; 15 exponents cover 99.95 % of weights (measured)."""

SLOT_BITS = 12
SLOTS = 1 << SLOT_BITS
BUCKET = SLOTS // SYMBOLS
LOW = 1 << 16
"""States live in [LOW, 2^32): one word of 16 bits at most brings one back."""

ESCAPE = 128
"""In byte 7: the table's last symbol is the escape."""

TILE_VALUES = 32768
"""States and directory cost 140 bytes, 0.3 % of a coded tile of bfloat16. Smaller tiles cost more,
larger ones leave a GPU, which decodes a tile per warp, with too few."""

RAW_TILE_BYTES = 65536
MAX_DECODED_BYTES = 1 << 30
"""A block is written and read in memory; a store's chunks and KV pieces have megabytes at most."""

MIN_SAVING = 64
"""A block is coded if it saves at least this part (one in ...): below, decoding costs more time
than the bytes do."""

RAW_REASONS = {
    1: "values of this dtype have no exponents to code",
    2: "coding saves less than a 64th",
    3: "no values",
}

HEADER = struct.Struct("<4sBBBBII")
TABLE = struct.Struct("<16B16H")
CHECKSUM_BYTES = 4
RAW_ENTRY_BYTES, TILE_ENTRY_BYTES = 4, 12


class CodecError(ValueError):
    """A block is damaged, cut off, of an unknown kind, or not of the length asked for."""


@dataclass(frozen=True, slots=True)
class FloatType:
    """How a dtype's bits are divided: ``bytes`` per value, and bits of exponent and mantissa."""

    code: int
    bytes: int
    exponent_bits: int
    mantissa_bits: int

    @property
    def plane_widths(self) -> tuple[int, ...]:
        """Bits per value of each plane of signs and mantissas, from the low end."""
        return tuple(width for width in (8, 4, 2, 1) if self.mantissa_bits + 1 & width)


FLOAT_TYPES = {
    "bfloat16": FloatType(1, 2, 8, 7),
    "float16": FloatType(2, 2, 5, 10),
    "float8_e4m3fn": FloatType(3, 1, 4, 3),
    "float8_e5m2": FloatType(4, 1, 5, 2),
}
"""Source: IEEE 754 binary16; Micikevicius et al., "FP8 formats for deep learning" (arXiv
2209.05433); bfloat16 is the upper half of binary32."""


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """What a block says of itself.

    Attributes:
        codec: ``raw`` or ``rans``, with the version of the format.
        dtype: of ``FLOAT_TYPES``, or "" for any other.
        raw_reason: why it is raw, or None.
        decoded_bytes, block_bytes: before and after.
        bits_per_value: of the whole block; 0 where there are no values.
        limit_bits_per_value: signs, mantissas and the entropy of the table's distribution, escapes
            at their full width: what a coder without any overhead would need with this table. Of a
            raw block, the values' own width.
        escapes: values whose exponent is not in the table.
    """

    codec: str
    dtype: str
    raw_reason: str | None
    decoded_bytes: int
    block_bytes: int
    bits_per_value: float
    limit_bits_per_value: float
    escapes: int


def header_bytes(method: int, decoded: int, width: int) -> int:
    """Bytes before the checksum of the header, for a block of ``decoded`` bytes of ``width``."""
    if method == RAW:
        return HEADER.size + RAW_ENTRY_BYTES * -(-decoded // RAW_TILE_BYTES)
    tiles = -(-decoded // (TILE_VALUES * width))
    return HEADER.size + TABLE.size + TILE_ENTRY_BYTES * tiles


def block_length(data: memoryview) -> int:
    """Bytes of the block that ``data`` begins with, as it says.

    Raises:
        CodecError: no block begins here.
    """
    if len(data) < HEADER.size:
        raise CodecError("a block is cut off")
    magic, version, *_, length = HEADER.unpack_from(data)
    if magic != MAGIC or version != VERSION:
        raise CodecError("not a block, or of an unknown version")
    return int(length)


def info(block: memoryview) -> BlockInfo:
    """Read a header; the caller has checked its checksum."""
    _, version, method, code, detail, decoded, length = HEADER.unpack_from(block)
    name = next((name for name, kind in FLOAT_TYPES.items() if kind.code == code), "")
    width = FLOAT_TYPES[name].bytes if name else 1
    values = decoded // width
    bits = 8.0 * length / values if values else 0.0
    if method == RAW:
        reason = RAW_REASONS[detail]
        return BlockInfo(f"raw/{version}", name, reason, decoded, length, bits, 8.0 * width, 0)
    kind = FLOAT_TYPES[name]
    frequencies = [f / SLOTS for f in TABLE.unpack_from(block, HEADER.size)[SYMBOLS:] if f]
    entropy = -sum(f * math.log2(f) for f in frequencies)
    first = HEADER.size + TABLE.size
    entries = block[first : header_bytes(method, decoded, width)]
    escapes = sum(entry[1] for entry in struct.iter_unpack("<III", entries))
    limit = kind.mantissa_bits + 1 + entropy + kind.exponent_bits * escapes / values
    return BlockInfo(f"rans/{version}", name, None, decoded, length, bits, limit, escapes)
