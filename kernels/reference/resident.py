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


def _places(device: torch.device) -> torch.Tensor:
    """[64]: the byte of a group's row that each column has."""
    c = torch.arange(GROUP_COLUMNS, device=device)
    return c // 8 % 4 * 16 + c // 32 * 8 + c % 8


def exponents_of(weight: torch.Tensor) -> torch.Tensor:
    """Of each element of ``weight``, bfloat16: int32."""
    return weight.view(torch.int16).to(torch.int32) >> 7 & 0xFF


def pack(weight: torch.Tensor) -> Weight:
    """``weight`` [N, K] in the resident form, or as it is where that would not be smaller."""
    if not may_pack(weight):
        return weight
    counts = torch.bincount(exponents_of(weight).flatten(), minlength=256)
    palette = choose_palette(counts)
    tiles, escaped, escapes = pack_rows(weight, palette)
    if len(escapes) > escape_room(*weight.shape):
        return weight
    starts = torch.zeros(len(escaped) + 1, dtype=torch.int32)
    starts[1:] = escaped.cumsum(0)
    rows, columns = weight.shape
    return ResidentMatrix((rows, columns), palette, tiles, starts, escapes)


def pack_rows(
    weight: torch.Tensor, palette: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tiles of ``weight`` [N, K] bfloat16 on any device, with ``palette`` [16] uint8.

    Returns:
        [ceil(N / 4), ceil(K / 64), 384] uint8 tiles, the number of escapes of each, and the escapes
        as int32, tile after tile, all where ``weight`` is.
    """
    rows, columns = weight.shape
    device = weight.device
    tiles, groups = tile_count(rows), group_count(columns)
    shape = (tiles * TILE_ROWS, groups * GROUP_COLUMNS)
    bits = torch.zeros(shape, dtype=torch.int32, device=device)
    bits[:rows, :columns] = weight.view(torch.int16).to(torch.int32) & 0xFFFF
    exponents = bits >> 7 & 0xFF
    code_of = torch.full((256,), PALETTE, dtype=torch.int32, device=device)
    code_of[palette.to(device).long()] = torch.arange(PALETTE, dtype=torch.int32, device=device)
    codes = code_of[exponents.long()]
    codes[rows:] = 0
    codes[:, columns:] = 0

    # [tile, row, group, column] -> [tile, group, row, column], as the groups of a tile lie
    def grouped(plane: torch.Tensor) -> torch.Tensor:
        return plane.view(tiles, TILE_ROWS, groups, GROUP_COLUMNS).transpose(1, 2)

    tile, group, row, column = (grouped(codes) == PALETTE).nonzero(as_tuple=True)
    exponent = grouped(exponents)[tile, group, row, column]
    escapes = (group << 16 | row << 14 | column << 8 | exponent).to(torch.int32)
    codes %= PALETTE
    order = torch.argsort(_places(device))
    plain = grouped(bits >> 8 & 0x80 | bits & 0x7F)[..., order]
    low, high = grouped(codes)[..., order].reshape(tiles, groups, 2, 2, GROUP_COLUMNS).unbind(3)
    planes = torch.cat((plain.flatten(2), (low | high << 4).flatten(2)), dim=2)
    return planes.to(torch.uint8).contiguous(), torch.bincount(tile, minlength=tiles), escapes


def unpack(matrix: ResidentMatrix) -> torch.Tensor:
    """The [N, K] bfloat16 matrix that ``matrix`` stands for, bit by bit."""
    rows, columns = matrix.shape
    tiles, groups = tile_count(rows), group_count(columns)
    group = matrix.tiles.view(tiles, groups, GROUP_BYTES).to(torch.int32)
    plain = group[..., :_CODES_AT].reshape(tiles, groups, TILE_ROWS, GROUP_COLUMNS)
    pairs = group[..., _CODES_AT:].reshape(tiles, groups, TILE_ROWS // 2, GROUP_COLUMNS)
    codes = torch.stack((pairs & 15, pairs >> 4), dim=3).flatten(2, 3)
    places = _places(matrix.tiles.device)
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


def embed(weight: Weight, ids: torch.Tensor) -> torch.Tensor:
    """Rows ``ids`` [T] int64 of ``weight`` [N, K]: [T, K]."""
    return dense(weight)[ids]
