"""How a bfloat16 matrix lies in memory in 12 bits a weight. Imports no torch, as what loads it.

Layout, for a matrix [N, K]: rows in tiles of 4, columns in groups of 64, both padded with zeros.
A group of a tile is 384 bytes:

======== ======= ==============================================================================
bytes    shape   what
======== ======= ==============================================================================
0-255    [4, 64] sign and mantissa of each weight: sign << 7 | mantissa
256-383  [2, 64] codes of rows 0 and 1, then of rows 2 and 3; the lower row's in the low 4 bits
======== ======= ==============================================================================

Column c of a group lies at byte ``c // 8 % 4 * 16 + c // 32 * 8 + c % 8`` of its 64. An escape is a
word: group << 16 | row << 14 | column << 8 | exponent; those of a tile ascend. The form lives in
the memory of one process and is never read from outside.
"""

from __future__ import annotations

TILE_ROWS = 4
GROUP_COLUMNS = 64
GROUP_BYTES = TILE_ROWS * GROUP_COLUMNS * 3 // 2
PALETTE = 16

MAX_GROUPS = 1 << 15
"""Of a row: an escape has 16 bits for its group, and is kept as a signed word."""

PRODUCTS = 1
"""Version of the layout and of the native products with it: with another one, what was measured
before does not hold any more."""

ESCAPE_SHARE = 32
"""One weight in so many may be an escape, of 4 bytes: more, and an eighth of a byte a weight of the
half byte that the form saves would be gone. Trained matrices have one in some thousands."""


def tile_count(rows: int) -> int:
    """Tiles of a matrix of ``rows`` rows."""
    return -(-rows // TILE_ROWS)


def group_count(columns: int) -> int:
    """Groups of a row of ``columns`` columns."""
    return -(-columns // GROUP_COLUMNS)


def resident_bytes(rows: int, columns: int) -> int:
    """Bytes of the planes of a matrix, which are all but its escapes and their index."""
    return tile_count(rows) * group_count(columns) * GROUP_BYTES


def pays(rows: int, columns: int) -> bool:
    """Can a matrix be smaller in the form? Padding may cost small ones more than is saved."""
    return resident_bytes(rows, columns) < rows * columns * 2 and group_count(columns) < MAX_GROUPS


def escape_room(rows: int, columns: int) -> int:
    """How many escapes a matrix may have at most to be kept in the form."""
    return rows * columns // ESCAPE_SHARE
