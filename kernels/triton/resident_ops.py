"""Operations with resident weights on one device: which kernel, and the scratch memory of one.

Up to 64 rows the weights are decoded on their way to the multiplier, more are multiplied with a
matrix that was decoded to scratch memory: 5.5 bytes of traffic a weight for 1.5, which many rows
hide. Batch-invariant products are always those of one kernel, whatever the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import pad

from kernels.resident import GROUP_COLUMNS, TILE_ROWS, ResidentMatrix, Weight
from kernels.triton import linear as dense
from kernels.triton.resident_form import plan_rows, plan_unpack
from kernels.triton.resident_pack import pack
from kernels.triton.resident_products import MANY_ROWS, plan_product

SCRATCH_BYTES = 256 << 20
"""At most: room for the largest matrix of a layer of an 8B model, 235 MB; of a larger one as many
rows as fit are decoded and multiplied at a time. Guess between launches and memory."""


class ResidentOps:
    """Has one scratch memory, of a fixed address once everything is packed, as graphs ask for. What
    uses it is queued on one stream."""

    def __init__(self, *, batch_invariant: bool) -> None:
        self._batch_invariant = batch_invariant
        self._scratch = torch.empty(0, dtype=torch.bfloat16)

    def pack(self, weight: torch.Tensor, allocate: Callable[[int], torch.Tensor]) -> Weight:
        """See ``kernels.triton.resident_pack.pack``; also makes the room that products need."""
        packed = pack(weight, allocate)
        if isinstance(packed, ResidentMatrix) and not self._batch_invariant:
            self._room(packed)
        return packed

    def embed(self, matrix: ResidentMatrix, ids: torch.Tensor) -> torch.Tensor:
        """See ``kernels.reference.resident.embed``."""
        out = torch.empty(
            len(ids), matrix.shape[1], dtype=torch.bfloat16, device=matrix.tiles.device
        )
        plan_rows(matrix, ids.contiguous(), out).run()
        return out

    def linear(
        self, x: torch.Tensor, matrix: ResidentMatrix, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """See ``kernels.reference.linear.linear``."""
        if self._is_decoded(x):
            parts = [
                dense.linear(x, part, None if bias is None else bias[first : first + len(part)])
                for first, part in self._decoded(matrix)
            ]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return self._fused(x, matrix, bias, x.new_empty(x.shape[0], matrix.shape[0]))

    def logits(self, x: torch.Tensor, matrix: ResidentMatrix) -> torch.Tensor:
        """See ``kernels.reference.linear.logits``."""
        if self._is_decoded(x):
            parts = [dense.logits(x, part) for _, part in self._decoded(matrix)]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        out = x.new_empty(x.shape[0], matrix.shape[0], dtype=torch.float32)
        return self._fused(x, matrix, None, out)

    def _is_decoded(self, x: torch.Tensor) -> bool:
        return not self._batch_invariant and x.shape[0] > MANY_ROWS

    def _fused(
        self,
        x: torch.Tensor,
        matrix: ResidentMatrix,
        bias: torch.Tensor | None,
        out: torch.Tensor,
    ) -> torch.Tensor:
        beyond = -x.shape[1] % GROUP_COLUMNS
        x = pad(x, (0, beyond)) if beyond else x.contiguous()
        plan_product(x, matrix, bias, out, batch_invariant=self._batch_invariant).run()
        return out

    def _decoded(self, matrix: ResidentMatrix) -> Iterator[tuple[int, torch.Tensor]]:
        """The matrix in parts, each with its first row; each is gone when the next is asked for."""
        scratch = self._room(matrix)
        rows, columns = matrix.shape
        height = len(scratch) // columns // TILE_ROWS * TILE_ROWS
        for first in range(0, rows, height):
            count = min(height, rows - first)
            part = scratch[: count * columns].view(count, columns)
            plan_unpack(matrix, first, part).run()
            yield first, part

    def _room(self, matrix: ResidentMatrix) -> torch.Tensor:
        """The scratch memory, grown to what ``matrix`` may use of it."""
        rows, columns = matrix.shape
        wanted = min(-(-rows // TILE_ROWS) * TILE_ROWS * columns, SCRATCH_BYTES // 2)
        if len(self._scratch) < wanted:
            self._scratch = torch.empty(wanted, dtype=torch.bfloat16, device=matrix.tiles.device)
        return self._scratch
