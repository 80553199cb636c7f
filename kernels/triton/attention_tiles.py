"""How attention is cut up: rows of queries and of keys per step, and splits of a sequence's keys.

Choices by dtype and shape alone, from compilation for sm_90; none is measured on a device yet.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernels.triton.launch import ceil_div, power_of_2

MIN_SPLIT_TOKENS = 256
"""Keys below which a split is not worth its merge: four tiles of the loop. Guess."""

MAX_SPLITS = 128
"""Partial results that one program merges: 128 x 128 float32 fill a quarter of its registers."""

PROGRAMS_PER_SM = 3
"""Of the decode kernel at work on one multiprocessor, by registers and shared memory at a head
width of 128. Source: ``python -m kernels.triton.compiled``."""

NEARLY_FILLED = 0.95
"""Of the best filling of the device's waves: more splits are more to merge. Guess."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows of queries and of keys per step, warps per program, depth of the pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def wide_tiles(itemsize: int, group: int, width: int) -> Tiles:
    """For prefill. float32 has no tensor cores that keep its precision: small tiles in registers.

    Two groups of four warps have 64 rows each, as many as Hopper's tensor cores take at once.
    """
    if itemsize == 4:
        return Tiles(max(16, power_of_2(group)), 16, 4, 2)
    return Tiles(max(128, power_of_2(group)), 64 if width <= 128 else 32, 8, 3)


def narrow_tiles(itemsize: int, group: int, width: int) -> Tiles:
    """For decode: the fewest rows a tensor core takes.

    Of five stages, the block table takes two and K and V of two tiles the others (compile table).
    """
    rows = max(16, power_of_2(group))
    if itemsize == 4:
        return Tiles(rows, 16, 4, 2)
    return Tiles(rows, 64 if width <= 128 else 32, 4, 5)


def split_tokens(visible: int, programs: int, multiprocessors: int, block_n: int) -> int:
    """Into parts of how many keys to split up to ``visible`` >= 1 keys of each of ``programs``
    tiles: whole tiles of ``block_n``, no more parts than ``MIN_SPLIT_TOKENS`` allow.

    Programs run in waves of as many as fit on the device, and a last wave of a few takes as long as
    a full one. So: the fewest parts whose waves are filled nearly as well as any number's.
    """
    at_once = PROGRAMS_PER_SM * multiprocessors
    most = max(1, min(ceil_div(visible, MIN_SPLIT_TOKENS), MAX_SPLITS))
    sizes = [ceil_div(visible, splits * block_n) * block_n for splits in range(1, most + 1)]
    counts = [programs * ceil_div(visible, size) for size in sizes]
    filled = [count / (at_once * ceil_div(count, at_once)) for count in counts]
    enough = NEARLY_FILLED * max(filled)
    return next(size for size, share in zip(sizes, filled, strict=True) if share >= enough)
