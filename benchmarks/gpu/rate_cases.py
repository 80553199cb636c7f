"""What is checked and timed of the Triton kernels: each at one shape, beside its reference.

Shapes come from models: rows of their matrices, batches of sequences at a context.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import torch  # noqa: E402
from kernel_case import BLOCK_TOKENS, SEED, Batch, Case, layout  # noqa: E402

from kernels.reference import activation, attention, kv_pack, linear, norm, rope  # noqa: E402
from kernels.reference import sampling as reference_sampling  # noqa: E402
from kernels.reference.penalties import penalize  # noqa: E402
from kernels.triton import few_rows  # noqa: E402
from kernels.triton import kv_pack as triton_kv_pack  # noqa: E402
from kernels.triton import linear as triton_linear  # noqa: E402
from kernels.triton.ops import TritonOps  # noqa: E402
from kernels.triton.sampling import pack_parameters, sample_on_device  # noqa: E402
from kernels.triton.shapes import ModelShape  # noqa: E402

MOST_LOGITS = 64
"""Rows of them: more are drawn in no step."""

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]

OTHER_LINES = (few_rows.MAX_LINES // 2, few_rows.MAX_LINES * 2)
"""Of the matrix in a program of few rows, beside those that it has."""


def few_rows_of(
    lines: int, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``linear`` of few rows in programs of at most ``lines`` rows of the matrix."""
    assert bias is None
    out = x.new_empty(x.shape[0], weight.shape[0])
    few_rows.plan_few_rows(x, weight, out, gate=False, most_lines=lines).run()
    return out


class Bench:
    """Makes cases of one model on one device in one dtype."""

    def __init__(self, model: ModelShape, device: torch.device, dtype: torch.dtype) -> None:
        self._model, self._device, self._dtype = model, device, dtype
        self._rng = torch.Generator(device).manual_seed(SEED)
        self._places = torch.Generator().manual_seed(SEED)
        count = 4
        if device.type == "cuda":
            count = torch.cuda.get_device_properties(device).multi_processor_count
        self._ops = TritonOps(count)
        self._invariant = TritonOps(count, batch_invariant=True)

    def _random(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        drawn = torch.randn(*shape, generator=self._rng, device=self._device) * scale
        return drawn.to(self._dtype)

    def cases(self, batches: list[Batch], rows: list[int]) -> Iterator[Case]:
        """Row-wise kernels at every count of ``rows``, attention and rotation at every batch."""
        for _, cases in self.parts(batches, rows):
            yield from cases

    def parts(self, batches: list[Batch], rows: list[int]) -> Iterator[tuple[str, Iterator[Case]]]:
        """``cases`` in parts with names; one that cannot be made leaves the others whole."""
        for count in rows:
            yield f"row-wise {count}", self._row_wise(count)
            yield f"products {count}", self._products(count)
            if count <= MOST_LOGITS:
                yield f"head {count}", self._head(count)
        for batch in batches:
            yield f"attention {batch}", self._attention(batch)
        yield "kv", self._kv()
        for count in rows:
            if count <= MOST_LOGITS:
                yield f"sampling {count}", self._sampling(count)
        yield "penalties", self._penalties()

    def _row_wise(self, rows: int) -> Iterator[Case]:
        m, ops, size = self._model, self._ops, self._dtype.itemsize
        x, residual = self._random(rows, m.hidden), self._random(rows, m.hidden)
        weight = self._random(m.hidden)
        yield Case(
            f"add_rms_norm {rows}",
            lambda: ops.add_rms_norm(x, residual, weight, 1e-5),
            lambda: list(
                zip(
                    ops.add_rms_norm(x, residual, weight, 1e-5),
                    norm.add_rms_norm(x, residual, weight, 1e-5),
                    strict=True,
                )
            ),
            4 * rows * m.hidden * size,
            5 * rows * m.hidden,
        )
        gate_up = self._random(rows, 2 * m.intermediate)
        yield Case(
            f"silu_mul {rows}",
            lambda: ops.silu_mul(gate_up),
            lambda: [(ops.silu_mul(gate_up), activation.silu_mul(gate_up))],
            3 * rows * m.intermediate * size,
            6 * rows * m.intermediate,
        )

    def _products(self, rows: int) -> Iterator[Case]:
        """All matrices of a layer and the head, at few rows beside cuBLAS; else the largest."""
        m = self._model
        heads = (m.heads + 2 * m.kv_heads) * m.head_dim
        shapes = [("gate_up", 2 * m.intermediate, m.hidden)]
        if rows <= few_rows.FEW_ROWS:
            shapes += [
                ("qkv", heads, m.hidden),
                ("output", m.hidden, m.heads * m.head_dim),
                ("down", m.hidden, m.intermediate),
            ]
        for name, columns, depth in shapes:
            x = self._random(rows, depth)
            weight = self._random(columns, depth, scale=depth**-0.5)
            yield from self._product(name, x, weight)
            if name == "gate_up":
                yield from self._gates(x, weight)

    def _product(self, name: str, x: torch.Tensor, weight: torch.Tensor) -> Iterator[Case]:
        rows, (columns, depth) = x.shape[0], weight.shape
        moved = (x.numel() + weight.numel() + rows * columns) * self._dtype.itemsize
        ways: dict[str, Product] = {"": self._ops.linear, ", invariant": self._invariant.linear}
        if rows <= few_rows.FEW_ROWS:
            ways[", cuBLAS"] = torch.nn.functional.linear
            for lines in OTHER_LINES:
                ways[f", {lines} lines"] = partial(few_rows_of, lines)
        for how, of in ways.items():
            yield Case(
                f"linear {name}{how} {rows} x {depth} x {columns}",
                lambda of=of: of(x, weight, None),
                lambda of=of: [(of(x, weight, None), linear.linear(x, weight, None))],
                moved,
                2 * rows * weight.numel(),
            )

    def _gates(self, x: torch.Tensor, weight: torch.Tensor) -> Iterator[Case]:
        rows, ops, size = x.shape[0], self._ops, self._dtype.itemsize

        def expected() -> torch.Tensor:
            return activation.silu_mul(linear.linear(x, weight, None))

        yield Case(
            f"gate_up with its gates {rows}",
            lambda: ops.gate_up(x, weight),
            lambda: [(ops.gate_up(x, weight), expected())],
            (x.numel() + weight.numel() + rows * weight.shape[0] // 2) * size,
            2 * rows * weight.numel(),
        )
        yield Case(
            f"linear, invariant: bits of the first row {rows}",
            lambda: None,
            lambda: [
                (triton_linear.invariant_logits(x[:1], weight),
                 triton_linear.invariant_logits(x, weight)[:1])
            ],
            0,
            0,
            exact=True,
        )  # fmt: skip

    def _head(self, rows: int) -> Iterator[Case]:
        m, size = self._model, self._dtype.itemsize
        x = self._random(rows, m.hidden)
        weight = self._random(m.vocab, m.hidden, scale=m.hidden**-0.5)
        for how, ops in (("", self._ops), (", invariant", self._invariant)):
            yield Case(
                f"logits{how} {rows}",
                lambda ops=ops: ops.logits(x, weight),
                lambda ops=ops: [(ops.logits(x, weight), linear.logits(x, weight))],
                (x.numel() + weight.numel()) * size + 4 * rows * m.vocab,
                2 * rows * weight.numel(),
            )

    def _attention(self, batch: Batch) -> Iterator[Case]:
        m, ops, size = self._model, self._ops, self._dtype.itemsize
        meta, blocks = layout(batch, self._device, self._places)
        keys, values = (
            self._random(blocks, BLOCK_TOKENS, m.kv_heads, m.head_dim) for _ in range(2)
        )
        heads = [m.heads, m.kv_heads, m.kv_heads]
        fused = self._random(batch.rows, sum(heads), m.head_dim)
        q, k, v = fused.split(heads, dim=1)
        angles = torch.rand(batch.context, m.head_dim // 2, generator=self._places) * 6
        cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).to(self._device)

        def rotated(write: Callable[..., None]) -> list[torch.Tensor]:
            parts, caches = fused.clone(), (keys.clone(), values.clone())
            write(*parts.split(heads, dim=1), cos_sin, meta, *caches)
            return [parts, *caches]

        token = (2 * m.heads + 5 * m.kv_heads) * m.head_dim * size + m.head_dim * 4
        yield Case(
            f"rope_kv_write {batch}",
            lambda: ops.rope_kv_write(q, k, v, cos_sin, meta, keys, values),
            lambda: list(zip(rotated(ops.rope_kv_write), rotated(rope.rope_kv_write), strict=True)),
            batch.rows * token,
            3 * batch.rows * (m.heads + m.kv_heads) * m.head_dim,
        )
        scale = m.head_dim**-0.5
        moved = 2 * batch.rows * m.heads * m.head_dim * size
        moved += 2 * batch.sequences * batch.context * m.kv_heads * m.head_dim * size
        for name, table in (("attention", ops), ("attention, invariant", self._invariant)):
            yield Case(
                f"{name} {batch}",
                lambda table=table: table.attention(q, keys, values, meta, scale),
                lambda table=table: [
                    (table.attention(q, keys, values, meta, scale),
                     attention.attention(q, keys, values, meta, scale))
                ],
                moved,
                4 * batch.visible * m.heads * m.head_dim,
            )  # fmt: skip
        window = max(1, batch.context // 8)
        yield Case(
            f"attention, window {window} {batch}",
            lambda: None,
            lambda: [
                (ops.attention(q, keys, values, meta, scale, window=window),
                 attention.attention(q, keys, values, meta, scale, window=window))
            ],
            0,
            0,
        )  # fmt: skip

    def _kv(self) -> Iterator[Case]:
        m = self._model
        cache = self._random(4, 64, BLOCK_TOKENS, m.kv_heads, m.head_dim)
        slots = torch.randperm(64 * BLOCK_TOKENS, generator=self._places)[:512].to(self._device)
        piece = kv_pack.kv_pack(cache, slots, 1, 4)

        def unpacked(write: Callable[..., None]) -> torch.Tensor:
            target = torch.zeros_like(cache)
            write(piece, target, slots, 1)
            return target

        moved = 2 * piece.numel() * piece.element_size()
        yield Case(
            "kv_pack",
            lambda: triton_kv_pack.kv_pack(cache, slots, 1, 4),
            lambda: [(triton_kv_pack.kv_pack(cache, slots, 1, 4), piece)],
            moved,
            0,
            exact=True,
        )
        yield Case(
            "kv_unpack",
            lambda: triton_kv_pack.kv_unpack(piece, cache, slots, 1),
            lambda: [(unpacked(triton_kv_pack.kv_unpack), unpacked(kv_pack.kv_unpack))],
            moved,
            0,
            exact=True,
        )

    def _sampling(self, rows: int) -> Iterator[Case]:
        drawn = 3 * torch.randn(rows, self._model.vocab, generator=self._places)
        logits = drawn.to(self._device)
        for top_p in (1.0, 0.9):
            settings = ([0.8] * rows, [top_p] * rows, list(range(rows)), [0] * rows, [7] * rows)
            parameters = pack_parameters(*settings).to(self._device)
            yield Case(
                f"sample top_p {top_p} {rows}",
                lambda parameters=parameters: sample_on_device(logits, parameters),
                lambda parameters=parameters, settings=settings: [
                    (sample_on_device(logits, parameters).cpu(),
                     torch.tensor(reference_sampling.gumbel_sample(logits.cpu(), *settings)))
                ],
                logits.numel() * (8 if top_p == 1 else 24),
                0,
                exact=True,
            )  # fmt: skip

    def _penalties(self) -> Iterator[Case]:
        vocab, entries = self._model.vocab, min(1000, self._model.vocab)
        logits = 3 * torch.randn(vocab, generator=self._places)
        ids = torch.randperm(vocab, generator=self._places)[:entries].int()
        counts = torch.randint(0, 4, (entries,), generator=self._places).int()

        def penalised(of: Callable[..., None], device: torch.device) -> torch.Tensor:
            line = logits.to(device, copy=True)
            of(line, ids.to(device), counts.to(device), 1.2, 0.5, 0.25)
            return line.cpu()

        yield Case(
            "penalize",
            lambda: None,
            lambda: [
                (penalised(self._ops.penalize, self._device),
                 penalised(penalize, torch.device("cpu")))
            ],
            0,
            0,
            exact=True,
        )  # fmt: skip
