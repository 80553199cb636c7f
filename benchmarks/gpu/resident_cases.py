"""What is checked and timed of resident weights on a GPU: each kernel at the matrices of a layer.

Products stand beside cuBLAS with the same weights in 16 bits. Weights are normal and bfloat16 by
nature, with a few far ones; sixteen exponents in a row stand for nearly all of them, as in trained
matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from kernel_case import SEED, Case

from kernels.reference import linear as reference
from kernels.resident import ResidentMatrix
from kernels.triton.launch import Launch
from kernels.triton.ops import TritonOps
from kernels.triton.resident_form import plan_unpack
from kernels.triton.shapes import ModelShape

ROWS = (1, 4, 16, 64, 512)
"""One row, few and many on tensor cores, and what goes through scratch memory."""

FAR = 1 / 4096
"""Of the weights; as many as a trained matrix has escapes (``kernels.resident``)."""

ZEROS = 1 / 256
"""Of a matrix whose exponents lie apart, so that codes are looked up."""


class ResidentBench:
    """Makes cases of one model on one device; weights and activations are bfloat16."""

    def __init__(self, model: ModelShape, device: torch.device) -> None:
        self._model, self._device = model, device
        self._rng = torch.Generator(device).manual_seed(SEED)
        count = 4
        if device.type == "cuda":
            count = torch.cuda.get_device_properties(device).multi_processor_count
        self._ops = TritonOps(count)
        self._invariant = TritonOps(count, batch_invariant=True)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """[N, K] of a layer's matrices; gates and ups apart."""
        m = self._model
        heads = (m.heads + 2 * m.kv_heads) * m.head_dim
        return {
            "qkv": (heads, m.hidden),
            "output": (m.hidden, m.heads * m.head_dim),
            "gate": (m.intermediate, m.hidden),
            "down": (m.hidden, m.intermediate),
        }

    def cases(self, rows: tuple[int, ...] = ROWS) -> Iterator[Case]:
        """Of every matrix; of one whose codes are looked up too."""
        for name, shape in self.shapes().items():
            weight = self._random(*shape) / shape[1] ** 0.5
            yield from self._of(name, self._with(weight, FAR, 1e-25), rows)
        weight = self._random(*self.shapes()["output"]) / self._model.hidden**0.5
        yield from self._of("looked up", self._with(weight, ZEROS, 0.0), rows[:2])

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self._rng, device=self._device).bfloat16()

    def _with(self, weight: torch.Tensor, share: float, factor: float) -> torch.Tensor:
        drawn = torch.rand(weight.shape, generator=self._rng, device=self._device)
        return torch.where(drawn < share, weight * factor, weight)

    def _allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def _of(self, name: str, weight: torch.Tensor, rows: tuple[int, ...]) -> Iterator[Case]:
        matrix = self._ops.pack(weight, self._allocate)
        assert isinstance(matrix, ResidentMatrix), name
        yield self._unpack(name, weight, matrix)
        ids = torch.arange(0, weight.shape[0], 7, device=self._device)
        yield Case(
            f"embed {name}",
            lambda: None,
            lambda: [(_bits(self._ops.embed(matrix, ids)), _bits(weight[ids]))],
            0,
            0,
            exact=True,
        )
        for count in rows:
            x = self._random(count, weight.shape[1])
            yield from self._product(name, x, weight, matrix)
            yield self._same_bits(name, x, matrix)

    def _unpack(self, name: str, weight: torch.Tensor, matrix: ResidentMatrix) -> Case:
        out = torch.full_like(weight, float("nan"))
        launch: Launch = plan_unpack(matrix, 0, out)

        def unpacked() -> torch.Tensor:
            launch.run()
            return _bits(out)

        moved = matrix.nbytes + weight.nbytes
        return Case(
            f"unpack {name}",
            launch.run,
            lambda: [(unpacked(), _bits(weight))],
            moved,
            0,
            exact=True,
        )

    def _product(
        self, name: str, x: torch.Tensor, weight: torch.Tensor, matrix: ResidentMatrix
    ) -> Iterator[Case]:
        rows, (columns, depth) = x.shape[0], weight.shape
        around = (x.numel() + rows * columns) * 2
        ways: dict[str, tuple[Callable[[], torch.Tensor], int]] = {
            "resident": (lambda: self._ops.linear(x, matrix, None), matrix.nbytes),
            "invariant": (lambda: self._invariant.linear(x, matrix, None), matrix.nbytes),
            "cuBLAS": (lambda: torch.nn.functional.linear(x, weight), weight.nbytes),
        }
        for way, (of, nbytes) in ways.items():
            yield Case(
                f"{way} {name} {rows} x {depth} x {columns}",
                of,
                lambda of=of: [(of(), reference.linear(x, weight, None))],
                nbytes + around,
                2 * rows * weight.numel(),
            )

    def _same_bits(self, name: str, x: torch.Tensor, matrix: ResidentMatrix) -> Case:
        return Case(
            f"resident, invariant: bits of the first row {name} {x.shape[0]}",
            lambda: None,
            lambda: [
                (self._invariant.logits(x[:1], matrix), self._invariant.logits(x, matrix)[:1])
            ],
            0,
            0,
            exact=True,
        )


def _bits(values: torch.Tensor) -> torch.Tensor:
    """bfloat16 as what compares even where it is NaN."""
    return values.view(torch.int16)
