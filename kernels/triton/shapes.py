"""Launches worth compiling without a GPU: the kernels as two models use them.

Tensors are on the meta device, so nothing is allocated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from kernels.codec.layout import FLOAT_TYPES, TILE_VALUES
from kernels.meta import AttentionMeta
from kernels.resident import GROUP_BYTES, ResidentMatrix, group_count, tile_count
from kernels.triton.activation import plan_silu_mul
from kernels.triton.attention import plan_attention
from kernels.triton.exponent_codec import TABLE_WORDS, TILE_WORDS, BlockPlan, plan_decode
from kernels.triton.few_rows import plan_few_rows
from kernels.triton.kv_pack import plan_kv_move
from kernels.triton.launch import Launch
from kernels.triton.linear import plan_matmul
from kernels.triton.norm import plan_norm
from kernels.triton.penalties import plan_penalize
from kernels.triton.resident_form import plan_rows, plan_unpack
from kernels.triton.resident_products import FEW_ROWS, MANY_ROWS, plan_product
from kernels.triton.rope import plan_rope_kv_write
from kernels.triton.sampling import PARAMETERS, plan_sample

MULTIPROCESSORS = 132
"""Of an H100 or H200 SXM. Source: NVIDIA H100 architecture paper, table 3."""

BLOCK_TOKENS = 16
"""Of the engine's KV blocks, by default."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a Llama's configuration decides the shapes of its kernels."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int


SMOLLM2_135M = ModelShape("smollm2-135m", 576, 9, 3, 64, 1536, 49152)
LLAMA3_8B = ModelShape("llama3-8b", 4096, 32, 8, 128, 14336, 128256)
"""Source: the models' published configurations."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A launch with its name in the table; ``cores``: tensor-core instructions that it must have,
    ``HMMA`` (of a warp) or ``GMMA`` (of a group of four)."""

    name: str
    launch: Launch
    cores: str = ""


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _batch(queries: int, context: int, sequences: int) -> AttentionMeta:
    """``sequences`` of the same length."""
    rows = sequences * queries
    return AttentionMeta(
        positions=_meta(rows, dtype=torch.int64),
        slots=_meta(rows, dtype=torch.int64),
        query_starts=_meta(sequences + 1, dtype=torch.int32),
        context_lens=_meta(sequences, dtype=torch.int32),
        block_tables=_meta(sequences, context // BLOCK_TOKENS, dtype=torch.int32),
        block_tokens=BLOCK_TOKENS,
        max_query=queries,
        max_context=context,
        query_lens_host=[queries] * sequences,
        context_lens_host=[context] * sequences,
    )


def _attention(
    model: ModelShape,
    queries: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    window: int | None = None,
    chunk: int | None = None,
    batch_invariant: bool = False,
) -> list[Launch]:
    q = _meta(queries, model.heads, model.head_dim, dtype=dtype)
    cache = _meta(1024, BLOCK_TOKENS, model.kv_heads, model.head_dim, dtype=dtype)
    return plan_attention(
        q,
        cache,
        cache,
        _batch(queries, 8192, 1),
        model.head_dim**-0.5,
        torch.empty_like(q),
        window=window,
        chunk=chunk,
        multiprocessors=MULTIPROCESSORS,
        batch_invariant=batch_invariant,
    )


def _of_every_model(model: ModelShape) -> Iterator[Shape]:
    rows, heads = 64, [model.heads, model.kv_heads, model.kv_heads]
    x = _meta(rows, model.hidden)
    weight = _meta(model.hidden)
    yield Shape("add_rms_norm", plan_norm(x, x, weight, 1e-5, x, x))
    q, k, v = _meta(rows, sum(heads), model.head_dim).split(heads, dim=1)
    cache = _meta(1024, BLOCK_TOKENS, model.kv_heads, model.head_dim)
    angles = _meta(8192, model.head_dim, dtype=torch.float32)
    batch = _batch(1, 8192, rows)
    yield Shape("rope_kv_write", plan_rope_kv_write(q, k, v, angles, batch, cache, cache))
    (wide,) = _attention(model, 512)
    yield Shape("attention, prefill", wide, "GMMA")
    narrow, merge = _attention(model, 1)
    yield Shape("attention, decode", narrow, "HMMA")
    yield Shape("attention, merge", merge)
    (invariant,) = _attention(model, 1, batch_invariant=True)
    yield Shape("attention, invariant", invariant, "GMMA")
    product = plan_matmul(x, _meta(model.hidden, model.hidden), None, x)
    yield Shape("matmul, invariant", product, "GMMA")


def _of_one_model(model: ModelShape) -> Iterator[Shape]:
    rows = 64
    x, gate_up = _meta(rows, model.hidden), _meta(rows, 2 * model.intermediate)
    yield Shape("rms_norm", plan_norm(x, None, _meta(model.hidden), 1e-5, x, None))
    yield Shape("silu_mul", plan_silu_mul(gate_up, _meta(rows, model.intermediate)))
    weight = _meta(2 * model.intermediate, model.hidden)
    yield Shape("matmul, invariant, many outputs", plan_matmul(x, weight, None, gate_up), "GMMA")
    for few in (1, 4):
        row, gated = _meta(few, model.hidden), _meta(few, model.intermediate)
        yield Shape(
            f"matmul, {few} x few outputs",
            plan_few_rows(gated, _meta(model.hidden, model.intermediate), row, gate=False),
        )
        yield Shape(f"matmul, {few} x gates and ups", plan_few_rows(row, weight, gated, gate=True))
    (windowed,) = _attention(model, 512, window=1024)
    yield Shape("attention, prefill, window", windowed, "GMMA")
    windowed, _ = _attention(model, 1, window=2048)
    yield Shape("attention, decode, window", windowed, "HMMA")
    (oracle,) = _attention(model, 512, dtype=torch.float32)
    yield Shape("attention, prefill, float32", oracle)
    oracle, _ = _attention(model, 1, dtype=torch.float32)
    yield Shape("attention, decode, float32", oracle)
    logits = _meta(rows, model.vocab, dtype=torch.float32)
    parameters = _meta(rows, PARAMETERS, dtype=torch.int64)
    for launch in plan_sample(logits, parameters, _meta(rows, dtype=torch.int64)):
        name = launch.kernel.__name__.removesuffix("_kernel")
        yield Shape(f"sample, {name}", launch)
    entries = _meta(4096, dtype=torch.int32)
    yield Shape("penalize", plan_penalize(logits[0], entries, entries, 1.2, 0.5, 0.5))
    component = _meta(32, 1024, BLOCK_TOKENS, model.kv_heads, model.head_dim)
    piece = _meta(4, 64, model.kv_heads, model.head_dim)
    slots = _meta(64, dtype=torch.int64)
    yield Shape("kv_pack", plan_kv_move(component, piece, slots, 8, pack=True))
    yield Shape("kv_unpack", plan_kv_move(component, piece, slots, 8, pack=False))


def _overlapping(model: ModelShape) -> Iterator[Shape]:
    """The kernels of a decode step of one sequence, each beginning while the one before ends."""
    x, weight = _meta(1, model.hidden), _meta(model.hidden)
    heads = [model.heads, model.kv_heads, model.kv_heads]
    q, k, v = _meta(1, sum(heads), model.head_dim).split(heads, dim=1)
    cache = _meta(1024, BLOCK_TOKENS, model.kv_heads, model.head_dim)
    angles = _meta(8192, model.head_dim, dtype=torch.float32)
    rope = plan_rope_kv_write(q, k, v, angles, _batch(1, 8192, 1), cache, cache)
    narrow, merge = _attention(model, 1)
    gates = _meta(2 * model.intermediate, model.hidden)
    found = {
        "add_rms_norm": plan_norm(x, x, weight, 1e-5, x, x),
        "rope_kv_write": rope,
        "attention": narrow,
        "merge": merge,
        "few outputs": plan_few_rows(x, _meta(model.hidden, model.hidden), x, gate=False),
        "gates and ups": plan_few_rows(x, gates, _meta(1, model.intermediate), gate=True),
    }
    for name, launch in found.items():
        constants = {**launch.constants, "OVERLAP": True}
        yield Shape(f"overlapping, {name}", dataclasses.replace(launch, constants=constants))


def _of_codec(model: ModelShape) -> Iterator[Shape]:
    """One matrix as a block of each kind."""
    values = model.hidden * model.intermediate
    count = values // TILE_VALUES
    table = _meta(TABLE_WORDS, dtype=torch.int32)
    tiles = _meta(count, TILE_WORDS, dtype=torch.int32)
    damaged = _meta(count, dtype=torch.int32)
    for dtype, kind in FLOAT_TYPES.items():
        block = _meta(values * kind.bytes * 2 // 3 // 4 * 4, dtype=torch.uint8)
        out = _meta(values, dtype=torch.int16 if kind.bytes == 2 else torch.uint8)
        plan = BlockPlan(kind, values, 68 + 12 * count, table, tiles)
        launch = plan_decode(plan, block, table, tiles, out, damaged)
        yield Shape(f"exponent_decode, {dtype}", launch)


def _resident(rows: int, columns: int, palette: torch.Tensor) -> ResidentMatrix:
    tiles = tile_count(rows)
    return ResidentMatrix(
        shape=(rows, columns),
        palette=palette,
        tiles=_meta(tiles, group_count(columns), GROUP_BYTES, dtype=torch.uint8),
        starts=_meta(tiles + 1, dtype=torch.int32),
        escapes=_meta(1000, dtype=torch.int32),
    )


def _of_resident(model: ModelShape) -> Iterator[Shape]:
    """A matrix whose codes are added to an exponent, as nearly all are, and one where they are
    looked up."""
    window = torch.arange(112, 128, dtype=torch.uint8)
    looked_up = torch.cat((torch.zeros(1, dtype=torch.uint8), window[1:]))
    for name, palette in (("", window), (", looked up", looked_up)):
        matrix = _resident(model.hidden, model.hidden, palette)
        whole = _meta(model.hidden, model.hidden)
        yield Shape(f"resident, unpack{name}", plan_unpack(matrix, 0, whole))
        ids = _meta(64, dtype=torch.int64)
        yield Shape(f"resident, rows{name}", plan_rows(matrix, ids, _meta(64, model.hidden)))
        for rows, cores in ((1, ""), (FEW_ROWS, "HMMA"), (MANY_ROWS, "HMMA")):
            x, out = _meta(rows, model.hidden), _meta(rows, model.hidden)
            product = plan_product(x, matrix, None, out)
            yield Shape(f"resident, {rows} x weights{name}", product, cores)


def shapes() -> list[Shape]:
    """All of them, named after their model."""
    found = [(SMOLLM2_135M, shape) for shape in _of_every_model(SMOLLM2_135M)]
    found += [(LLAMA3_8B, shape) for shape in _of_every_model(LLAMA3_8B)]
    found += [(LLAMA3_8B, shape) for shape in _of_one_model(LLAMA3_8B)]
    found += [(LLAMA3_8B, shape) for shape in _overlapping(LLAMA3_8B)]
    found += [
        (model, shape) for model in (SMOLLM2_135M, LLAMA3_8B) for shape in _of_resident(model)
    ]
    found += [(LLAMA3_8B, shape) for shape in _of_codec(LLAMA3_8B)]
    return [Shape(f"{model.name}: {s.name}", s.launch, s.cores) for model, s in found]
