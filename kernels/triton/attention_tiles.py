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


def count_splits(visible: int, programs: int, multiprocessors: int) -> int:
    """Among how many programs to split up to ``visible`` keys of each of ``programs`` tiles.

    As many as fill the device, as long as each has ``MIN_SPLIT_TOKENS``.
    """
    wanted = ceil_div(PROGRAMS_PER_SM * multiprocessors, max(1, programs))
    return max(1, min(wanted, ceil_div(visible, MIN_SPLIT_TOKENS), MAX_SPLITS))
