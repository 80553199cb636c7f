"""The codec of ``kernels.codec.layout`` in numpy: the oracle of the native and Triton ones.

Tiles go side by side, rows one after the other. It also stands in where no C compiler is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kernels.codec.layout import (
    BUCKET,
    CHECKSUM_BYTES,
    ESCAPE,
    FLOAT_TYPES,
    HEADER,
    LANES,
    LOW,
    MAGIC,
    MAX_DECODED_BYTES,
    MIN_SAVING,
    RANS,
    RAW,
    RAW_REASONS,
    RAW_TILE_BYTES,
    SLOT_BITS,
    SLOTS,
    SYMBOLS,
    TABLE,
    TILE_VALUES,
    VERSION,
    Bytes,
    CodecError,
    FloatType,
    block_length,
    header_bytes,
)

Words = npt.NDArray[np.uint32]
Integers = npt.NDArray[np.int64]

P, Q = np.uint32(2654435761), np.uint32(2246822519)

POSITIONS = np.arange(LANES).reshape(LANES // 2, 2).T.ravel()
"""Of the lanes' values in a row."""


def _round(state: Words, word: Words) -> Words:
    mixed = (state + word * Q).astype(np.uint32)
    rotated: Words = ((mixed << np.uint32(13)) | (mixed >> np.uint32(19))) * P
    return rotated


def checksum(data: Bytes) -> int:
    """Of the bytes ``data`` [n]."""
    rows = np.concatenate([data, np.zeros(-len(data) % 64, np.uint8)]).view("<u4").reshape(-1, 16)
    lanes = np.arange(16, dtype=np.uint32) * P
    for row in rows:
        lanes = _round(lanes, row)
    total = np.array([len(data)], np.uint32)
    for lane in range(16):
        total = _round(total, lanes[lane : lane + 1])
    total ^= total >> np.uint32(15)
    total *= Q
    return int((total ^ (total >> np.uint32(13)))[0])


@dataclass(frozen=True, slots=True)
class Table:
    """Symbols of a block: exponents [k] and their frequencies [k]; the last may be the escape."""

    exponents: Bytes
    frequencies: Integers
    has_escape: bool

    def aliases(self) -> tuple[Integers, Integers]:
        """Of each bucket, how many slots are its own, and whose the others are: [16] each."""
        left = np.zeros(SYMBOLS, np.int64)
        left[: len(self.frequencies)] = self.frequencies
        bound, other = np.full(SYMBOLS, BUCKET), np.arange(SYMBOLS)
        is_open = np.ones(SYMBOLS, bool)
        while (is_open & (left < BUCKET)).any():
            small = int(np.argmax(is_open & (left < BUCKET)))
            large = int(np.argmax(is_open & (left > BUCKET)))
            bound[small], other[small], is_open[small] = left[small], large, False
            left[large] -= BUCKET - left[small]
        return bound, other

    def slots(self) -> tuple[Integers, Integers]:
        """Symbol and offset of each slot: [4096] each."""
        bound, other = self.aliases()
        within = np.arange(BUCKET)
        symbol = np.concatenate([np.where(within < bound[b], b, other[b]) for b in range(SYMBOLS)])
        offset = np.zeros(SLOTS, np.int64)
        for s in range(SYMBOLS):
            offset[symbol == s] = np.arange(np.count_nonzero(symbol == s))
        return symbol, offset


def choose_table(exponents: Bytes) -> Table:
    """The most frequent exponents first (the lower first among equals), at least 1 / 4096 each."""
    counts = np.bincount(exponents, minlength=256)
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    has_escape = len(order) > SYMBOLS
    shown = counts[order]
    if has_escape:
        order, rest = order[: SYMBOLS - 1], shown[SYMBOLS - 1 :].sum()
        order, shown = np.append(order, 0), np.append(shown[: SYMBOLS - 1], rest)
    frequencies = np.maximum(1, shown * SLOTS // len(exponents))
    frequencies[0] += SLOTS - frequencies.sum()
    return Table(order.astype(np.uint8), frequencies, has_escape)


def split(data: Bytes, kind: FloatType) -> tuple[Bytes, Bytes]:
    """Exponents [n] and the planes, padded, of the values in ``data``."""
    values = data.view("<u2" if kind.bytes == 2 else np.uint8).astype(np.int64)
    mantissa = values & (1 << kind.mantissa_bits) - 1
    exponent = values >> kind.mantissa_bits & (1 << kind.exponent_bits) - 1
    rest = values >> kind.exponent_bits + kind.mantissa_bits << kind.mantissa_bits | mantissa
    planes, shift = [], 0
    for width in kind.plane_widths:
        bits = rest[:, None] >> np.arange(shift, shift + width) & 1
        planes.append(np.packbits(bits.astype(np.uint8), bitorder="little"))
        shift += width
    plane = np.concatenate(planes)
    return exponent.astype(np.uint8), np.append(plane, np.zeros(-len(plane) % 4, np.uint8))


def planes_bytes(values: int, kind: FloatType) -> int:
    """Of all planes of ``values`` values, padding included."""
    return -(-sum(-(-values * width // 8) for width in kind.plane_widths) // 4) * 4


def merge(exponents: Bytes, planes: Bytes, kind: FloatType) -> Bytes:
    """The bytes that ``split`` took apart.

    Raises:
        CodecError: padding that is not zero.
    """
    values, at, shift = len(exponents), 0, 0
    rest = np.zeros(values, np.int64)
    for width in kind.plane_widths:
        size = -(-values * width // 8)
        bits = np.unpackbits(planes[at : at + size], bitorder="little").astype(np.int64)
        if bits[values * width :].any():
            raise CodecError("padding is not zero")
        pieces = bits[: values * width].reshape(values, width)
        rest |= (pieces << np.arange(shift, shift + width)).sum(axis=1)
        at, shift = at + size, shift + width
    if planes[at:].any():
        raise CodecError("padding is not zero")
    sign, mantissa = rest >> kind.mantissa_bits, rest & (1 << kind.mantissa_bits) - 1
    exponent = exponents.astype(np.int64) << kind.mantissa_bits
    whole = sign << kind.exponent_bits + kind.mantissa_bits | exponent | mantissa
    return whole.astype("<u2" if kind.bytes == 2 else np.uint8).view(np.uint8)


def _encode_rows(symbols: Integers, table: Table) -> tuple[Words, Bytes]:
    """States [32] and words of one tile's ``symbols`` [rows, 32], in order of lanes."""
    symbol, offset = table.slots()
    slot_of = np.zeros((SYMBOLS, SLOTS), np.int64)
    slot_of[symbol, offset] = np.arange(SLOTS)
    frequencies = np.append(table.frequencies, np.zeros(SYMBOLS, np.int64))
    state = np.full(LANES, LOW, np.int64)
    words = []
    for row in symbols[::-1]:
        frequency = frequencies[row]
        full = state >> (32 - SLOT_BITS) >= frequency
        words.append((state[full] & LOW - 1).astype("<u2"))
        state = np.where(full, state >> 16, state)
        state = (state // frequency << SLOT_BITS) + slot_of[row, state % frequency]
    stream = np.concatenate(words[::-1]).view(np.uint8)
    return state.astype(np.uint32), stream


def encode_rans(data: Bytes, kind: FloatType) -> bytes:
    """A coded block of ``data``, however large it comes out."""
    exponents, planes = split(data, kind)
    table = choose_table(exponents)
    symbol_of = np.full(256, len(table.exponents) - 1)
    shown = len(table.exponents) - table.has_escape
    symbol_of[table.exponents[:shown]] = np.arange(shown)
    escaped = ~np.isin(np.arange(256), table.exponents[:shown])
    entries, sections = [], []
    for first in range(0, len(exponents), TILE_VALUES):
        tile = exponents[first : first + TILE_VALUES]
        symbols = np.append(symbol_of[tile], np.zeros(-len(tile) % LANES, np.int64))
        state, words = _encode_rows(symbols.reshape(-1, LANES)[:, POSITIONS], table)
        escapes = tile[escaped[tile]]
        section = state.astype("<u4").tobytes() + words.tobytes() + escapes.tobytes()
        sections.append(section + bytes(-len(section) % 4))
        own = data[first * kind.bytes : (first + len(tile)) * kind.bytes]
        entries += [len(words) // 2, len(escapes), checksum(own)]
    fill = SYMBOLS - len(table.exponents)
    frequencies = [*table.frequencies.tolist(), *[0] * fill]
    content = TABLE.pack(*table.exponents.tolist(), *[0] * fill, *frequencies)
    content += np.array(entries, "<u4").tobytes()
    detail = len(table.exponents) + (ESCAPE if table.has_escape else 0)
    return _block(
        RANS, kind.code, detail, len(data), content, planes.tobytes() + b"".join(sections)
    )


def _block(method: int, code: int, detail: int, decoded: int, content: bytes, body: bytes) -> bytes:
    """A header of ``content`` with its checksum, and the body."""
    length = HEADER.size + len(content) + CHECKSUM_BYTES + len(body)
    head = HEADER.pack(MAGIC, VERSION, method, code, detail, decoded, length) + content
    return head + checksum(np.frombuffer(head, np.uint8)).to_bytes(CHECKSUM_BYTES, "little") + body


def encode(data: Bytes, dtype: str, threads: int = 1) -> bytes:
    """See ``kernels.codec.encode``; the caller has checked that ``data`` holds whole values.

    There is always one thread.
    """
    kind = FLOAT_TYPES.get(dtype)
    reason = 3 if len(data) == 0 else 1
    if kind is not None and len(data) > 0:
        coded = encode_rans(data, kind)
        if len(coded) <= len(data) - len(data) // MIN_SAVING:
            return coded
        reason = 2
    tiles = [data[at : at + RAW_TILE_BYTES] for at in range(0, len(data), RAW_TILE_BYTES)]
    entries = np.array([checksum(tile) for tile in tiles], "<u4").tobytes()
    code = kind.code if kind is not None else 0
    return _block(RAW, code, reason, len(data), entries, data.tobytes())


def check(block: Bytes) -> int:
    """Decoded bytes, after all checks of the header.

    Raises:
        CodecError: the header is not that of a whole block of this length.
    """
    if len(block) < HEADER.size + CHECKSUM_BYTES:
        raise CodecError("a block is cut off")
    magic, version, method, code, detail, decoded, length = HEADER.unpack_from(block.data)
    if magic != MAGIC or version != VERSION or method not in (RAW, RANS):
        raise CodecError("not a block, or of an unknown version")
    kind = next((kind for kind in FLOAT_TYPES.values() if kind.code == code), None)
    width = kind.bytes if kind is not None else 1
    head = header_bytes(method, decoded, width)
    if length != len(block) or len(block) < head + CHECKSUM_BYTES:
        raise CodecError("a block has another length than it says")
    stated = int.from_bytes(block[head : head + CHECKSUM_BYTES].tobytes(), "little")
    if stated != checksum(block[:head]):
        raise CodecError("a block's header is damaged")
    if decoded > MAX_DECODED_BYTES or decoded % width or code > len(FLOAT_TYPES):
        raise CodecError("a block's header makes no sense")
    if method == RAW:
        if detail not in RAW_REASONS or length != head + CHECKSUM_BYTES + decoded:
            raise CodecError("a block's header makes no sense")
        return int(decoded)
    if kind is None or decoded == 0:
        raise CodecError("a block's header makes no sense")
    _check_table(TABLE.unpack_from(block.data, HEADER.size), detail, kind)
    values = decoded // width
    body = planes_bytes(values, kind)
    for tile, (words, escapes, _) in enumerate(directory(block, head)):
        rows = -(-min(TILE_VALUES, values - tile * TILE_VALUES) // LANES)
        if words > rows * LANES or escapes > min(TILE_VALUES, values - tile * TILE_VALUES):
            raise CodecError("a block's directory makes no sense")
        body += -(-(4 * LANES + 2 * words + escapes) // 4) * 4
    if length != head + CHECKSUM_BYTES + body:
        raise CodecError("a block's directory makes no sense")
    return int(decoded)


def _check_table(table: tuple[int, ...], detail: int, kind: FloatType) -> None:
    exponents, frequencies = table[:SYMBOLS], table[SYMBOLS:]
    count = detail % ESCAPE
    sound = (
        1 <= count <= SYMBOLS
        and min(frequencies[:count]) > 0
        and sum(frequencies[:count]) == SLOTS
        and max(exponents[:count]) < 1 << kind.exponent_bits
        and not any((*exponents[count:], *frequencies[count:]))
        and not (detail >= ESCAPE and exponents[count - 1])
    )
    if not sound:
        raise CodecError("a block's table makes no sense")


def read_table(block: Bytes, detail: int) -> Table:
    """Of a coded block that was checked; ``detail`` is its byte 7."""
    table = TABLE.unpack_from(block.data, HEADER.size)
    count = detail % ESCAPE
    frequencies = np.array(table[SYMBOLS:][:count])
    return Table(np.array(table[:count], np.uint8), frequencies, detail >= ESCAPE)


def directory(block: Bytes, head: int) -> list[list[int]]:
    """Words, escapes and checksum of each tile of a coded block; ``head``: of ``header_bytes``."""
    entries: list[list[int]] = (
        block[HEADER.size + TABLE.size : head].view("<u4").reshape(-1, 3).tolist()
    )
    return entries


def decode_into(block: Bytes, out: Bytes, threads: int = 1) -> None:
    """See ``kernels.codec.decode_into``; there is always one thread."""
    decoded = check(block)
    if len(out) != decoded:
        raise CodecError(f"a block of {decoded} bytes does not fit into {len(out)}")
    method, code, detail = HEADER.unpack_from(block.data)[2:5]
    kind = next((kind for kind in FLOAT_TYPES.values() if kind.code == code), None)
    if method == RANS:
        assert kind is not None
        head = header_bytes(method, decoded, kind.bytes)
        body = block[head + CHECKSUM_BYTES :]
        entries = directory(block, head)
        exponents, sums = _decode_rans(block, body, entries, detail, decoded // kind.bytes, kind)
        plane_bytes = planes_bytes(len(exponents), kind)
        out[:] = merge(exponents, body[:plane_bytes], kind)
        step = TILE_VALUES * kind.bytes
    else:
        head = header_bytes(method, decoded, 1)
        out[:] = block[head + CHECKSUM_BYTES :]
        sums, step = block[HEADER.size : head].view("<u4").tolist(), RAW_TILE_BYTES
    for tile, stated in enumerate(sums):
        if checksum(out[tile * step : (tile + 1) * step]) != stated:
            raise CodecError("a block's content is damaged")


def decode_run(blocks: Bytes, out: Bytes) -> None:
    """See ``kernels.codec.decode_run``."""
    while len(out):
        block = blocks[: block_length(blocks.data)]
        nbytes = check(block)
        if not 0 < nbytes <= len(out):
            raise CodecError("a block is longer than what it is part of, or has no values")
        decode_into(block, out[:nbytes])
        blocks, out = blocks[len(block) :], out[nbytes:]


def _decode_rans(
    block: Bytes, body: Bytes, entries: list[list[int]], detail: int, values: int, kind: FloatType
) -> tuple[Bytes, list[int]]:
    """Exponents [values] and the tiles' checksums."""
    known = read_table(block, detail)
    at = planes_bytes(values, kind)
    found = np.empty(values, np.uint8)
    for tile, (num_words, num_escapes, _) in enumerate(entries):
        first = tile * TILE_VALUES
        part = found[first : first + TILE_VALUES]
        state = body[at : at + 4 * LANES].view("<u4").astype(np.int64)
        after_words = at + 4 * LANES + 2 * num_words
        words = body[at + 4 * LANES : after_words].view("<u2").astype(np.int64)
        symbols = _decode_rows(state, words, -(-len(part) // LANES), known)[: len(part)]
        part[:] = known.exponents[symbols]
        escaped = symbols == (len(known.exponents) - 1 if known.has_escape else SYMBOLS)
        end = after_words + num_escapes
        if np.count_nonzero(escaped) != num_escapes:
            raise CodecError("a block's content is damaged")
        part[escaped] = body[after_words:end]
        at = -(-(end - planes_bytes(values, kind)) // 4) * 4 + planes_bytes(values, kind)
        if body[end:at].any():
            raise CodecError("padding is not zero")
    if found.max() >> kind.exponent_bits:
        raise CodecError("a block's content is damaged")
    return found, [entry[2] for entry in entries]


def _decode_rows(state: Integers, words: Integers, rows: int, table: Table) -> Integers:
    """Symbols of a tile [32 rows] in order of positions."""
    symbol, offset = table.slots()
    frequencies = np.append(table.frequencies, np.zeros(SYMBOLS, np.int64))
    out = np.empty((rows, LANES), np.int64)
    used = 0
    for row in range(rows):
        slot = state % SLOTS
        out[row, POSITIONS] = symbol[slot]
        state = frequencies[symbol[slot]] * (state >> SLOT_BITS) + offset[slot]
        low = state < LOW
        taken = words[used : used + np.count_nonzero(low)]
        used += int(np.count_nonzero(low))
        if used > len(words):
            raise CodecError("a block's content is damaged")
        state[low] = state[low] << 16 | taken
    if used != len(words) or (state != LOW).any():
        raise CodecError("a block's content is damaged")
    return out.ravel()
