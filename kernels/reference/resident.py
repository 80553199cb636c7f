"""The resident form, made and undone with readable torch: the oracle of the fused products."""

from __future__ import annotations

import torch

from kernels.resident import (
    GROUP_BYTES,
    GROUP_COLUMNS,
    PALETTE,
    TILE_ROWS,
    ResidentMatrix,
    Weight,
    choose_palette,
    escape_room,
    group_count,
    may_pack,
    tile_count,
)

_CODES_AT = TILE_ROWS * GROUP_COLUMNS


def _places() -> torch.Tensor:
    """[64]: the byte of a group's row that each column has."""
    c = torch.arange(GROUP_COLUMNS)
    return c // 8 % 4 * 16 + c // 32 * 8 + c % 8


def pack(weight: torch.Tensor) -> Weight:
    """``weight`` [N, K] in the resident form, or as it is where that would not be smaller."""
    if not may_pack(weight):
        return weight
    rows, columns = weight.shape
    tiles, groups = tile_count(rows), group_count(columns)
    bits = torch.zeros(tiles * TILE_ROWS, groups * GROUP_COLUMNS, dtype=torch.int32)
    bits[:rows, :columns] = weight.view(torch.int16).to(torch.int32) & 0xFFFF
    exponents = bits >> 7 & 0xFF
    palette = choose_palette(torch.bincount(exponents[:rows, :columns].flatten(), minlength=256))
    code_of = torch.full((256,), PALETTE, dtype=torch.int32)
    code_of[palette.long()] = torch.arange(PALETTE, dtype=torch.int32)
    codes = code_of[exponents.long()]
    codes[rows:] = 0
    codes[:, columns:] = 0

    # [tile, row, group, column] -> [tile, group, row, column], as the groups of a tile lie
    def grouped(plane: torch.Tensor) -> torch.Tensor:
        return plane.view(tiles, TILE_ROWS, groups, GROUP_COLUMNS).transpose(1, 2)

    escaped = grouped(codes) == PALETTE
    tile, group, row, column = escaped.nonzero(as_tuple=True)
    if len(tile) > escape_room(rows, columns):
        return weight
    exponent = grouped(exponents)[tile, group, row, column]
    escapes = (group << 16 | row << 14 | column << 8 | exponent).to(torch.int32)
    starts = torch.zeros(tiles + 1, dtype=torch.int32)
    starts[1:] = torch.bincount(tile, minlength=tiles).cumsum(0)
    codes %= PALETTE
    order = torch.argsort(_places())
    plain = grouped(bits >> 8 & 0x80 | bits & 0x7F)[..., order]
    low, high = grouped(codes)[..., order].reshape(tiles, groups, 2, 2, GROUP_COLUMNS).unbind(3)
    planes = (plain.flatten(2), (low | high << 4).flatten(2))
    return ResidentMatrix(
        shape=(rows, columns),
        palette=palette,
        tiles=torch.cat(planes, dim=2).to(torch.uint8).contiguous(),
        starts=starts,
        escapes=escapes,
    )


def unpack(matrix: ResidentMatrix) -> torch.Tensor:
    """The [N, K] bfloat16 matrix that ``matrix`` stands for, bit by bit."""
    rows, columns = matrix.shape
    tiles, groups = tile_count(rows), group_count(columns)
    group = matrix.tiles.view(tiles, groups, GROUP_BYTES).to(torch.int32)
    plain = group[..., :_CODES_AT].reshape(tiles, groups, TILE_ROWS, GROUP_COLUMNS)
    pairs = group[..., _CODES_AT:].reshape(tiles, groups, TILE_ROWS // 2, GROUP_COLUMNS)
    codes = torch.stack((pairs & 15, pairs >> 4), dim=3).flatten(2, 3)
    places = _places()
    plain, codes = plain[..., places], codes[..., places]
    exponents = matrix.palette.to(torch.int32)[codes.long()]
    tile = torch.repeat_interleave(torch.arange(tiles), matrix.starts.diff().long())
    word = matrix.escapes.long()
    exponents[tile, word >> 16, word >> 14 & 3, word >> 8 & 63] = matrix.escapes & 0xFF
    bits = (plain & 0x80) << 8 | exponents << 7 | plain & 0x7F
    dense = bits.transpose(1, 2).reshape(tiles * TILE_ROWS, groups * GROUP_COLUMNS)
    return dense[:rows, :columns].to(torch.int16).contiguous().view(torch.bfloat16)


def dense(weight: Weight) -> torch.Tensor:
    """``weight`` as a tensor, whichever form it has."""
    return weight if isinstance(weight, torch.Tensor) else unpack(weight)
