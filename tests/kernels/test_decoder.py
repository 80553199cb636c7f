"""A native decoder in one call: the bits of its operations one by one, near the reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from kernel_cases import DTYPES, ISAS, PagedBatch, native, place

from kernels.decoder import DecoderLayer, DecoderWeights
from kernels.native.decoder import NativeDecoder
from kernels.ops import Ops, reference_ops
from kernels.reference.decoder import decoder

LAYERS, VOCAB, POSITIONS, BLOCK_TOKENS = 2, 97, 160, 16


@dataclass(frozen=True)
class Shape:
    """Sizes of a small decoder: of a head, of the hidden state and of the MLP."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    inner: int


SHAPES = [Shape(9, 3, 64, 576, 1536), Shape(4, 4, 6, 31, 45), Shape(5, 1, 18, 70, 33)]
SMALL = SHAPES[1:]


def draw_weights(rng: torch.Generator, s: Shape, dtype: torch.dtype) -> DecoderWeights:
    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=rng) / columns**0.5).to(dtype)

    def norm() -> torch.Tensor:
        return (1 + torch.randn(s.hidden, generator=rng) / 10).to(dtype)

    query, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    layers = tuple(
        DecoderLayer(
            attention_norm=norm(),
            qkv=matrix(query + 2 * kv, s.hidden),
            output=matrix(s.hidden, query),
            mlp_norm=norm(),
            gate_up=matrix(2 * s.inner, s.hidden),
            down=matrix(s.hidden, s.inner),
        )
        for _ in range(LAYERS)
    )
    angles = torch.rand(POSITIONS, s.head_dim // 2, generator=rng) * 6
    embedding = matrix(VOCAB, s.hidden)
    return DecoderWeights(
        embedding=embedding,
        layers=layers,
        final_norm=norm(),
        head=embedding,
        cos_sin=torch.cat((angles.cos(), angles.sin()), dim=-1),
        heads=s.heads,
        kv_heads=s.kv_heads,
        head_dim=s.head_dim,
        norm_eps=1e-5,
        scale=s.head_dim**-0.5,
    )


@dataclass(frozen=True)
class Step:
    """One batch with a cache per layer, as ``decoder`` takes them."""

    ids: torch.Tensor
    batch: PagedBatch
    cache: tuple[torch.Tensor, torch.Tensor]
    logit_rows: torch.Tensor

    def run(self, compute: object, **more: object) -> tuple[torch.Tensor, ...]:
        """Logits, and the caches afterwards; what is given stays as it is."""
        cache = (self.cache[0].clone(), self.cache[1].clone())
        out = compute(self.ids, self.batch.meta, cache, self.logit_rows, **more)  # type: ignore[operator]
        return out.clone(), *(component.nan_to_num(7.0) for component in cache)


def draw_step(
    rng: torch.Generator, s: Shape, dtype: torch.dtype, lens: list[tuple[int, int]]
) -> Step:
    """A batch of sequences of (new tokens, context); earlier tokens have random KV."""
    contents = [torch.randn(2, c, s.kv_heads, s.head_dim, generator=rng) for _, c in lens]
    batch = place(rng, [c.to(dtype) for c in contents], [n for n, _ in lens], BLOCK_TOKENS)
    cache = [torch.stack([c] * LAYERS) for c in (batch.k_cache, batch.v_cache)]
    for component in cache:
        component.flatten(1, 2)[:, batch.meta.slots] = float("nan")
    tokens = sum(n for n, _ in lens)
    rows = torch.tensor([n for n, _ in lens]).cumsum(0) - 1
    ids = torch.randint(0, VOCAB, (tokens,), generator=rng)
    return Step(ids, batch, (cache[0], cache[1]), rows)


def one_by_one(isa: str, threads: int = 2) -> Ops:
    """Native operations without the decoder."""
    ops = native(isa, threads)
    return replace(
        reference_ops(),
        add_rms_norm=ops.add_rms_norm,
        linear=ops.linear,
        rope_kv_write=ops.rope_kv_write,
        attention=ops.attention,
        silu_mul=ops.silu_mul,
        logits=ops.logits,
    )


def same(left: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


MIXED = [(1, 1), (1, 40), (17, 33), (30, 30), (1, 16)]
MANY = [*[(1, 7)] * 9, (12, 12), *[(2, 5)] * 8]
"""More rows that want logits than a tile of any instruction set has, not all of the batch's."""


def test_a_batch_that_found_no_memory_leaves_room_as_it_was(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next batch of that size would be written beyond the workspace there is."""
    weights = draw_weights(rng, SMALL[0], torch.float32)
    few, many = (draw_step(rng, SMALL[0], torch.float32, [(n, n)]) for n in (1, 70))
    decode = NativeDecoder(native("portable", 1).context, weights)
    few.run(decode)
    before = decode._workspace

    def refuse(*sizes: object, **more: object) -> torch.Tensor:
        raise RuntimeError("not enough memory")

    prepare = partial(decode._prepare, many.ids, many.batch.meta, many.cache, many.logit_rows)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", refuse)
        with pytest.raises(RuntimeError, match="not enough memory"):
            prepare()
    prepare()
    assert decode._workspace.nbytes > before.nbytes


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_has_the_bits_of_its_operations_one_by_one(
    isa: str, dtype: torch.dtype, shape: Shape, rng: torch.Generator
) -> None:
    weights = draw_weights(rng, shape, dtype)
    for lens in ([(1, 5)], [(1, 20), (1, 33), (1, 1)], MIXED, MANY):
        step = draw_step(rng, shape, dtype, lens)
        expected = step.run(partial(decoder, one_by_one(isa), weights))
        assert expected[0].isfinite().all()
        for threads in (1, 2, 3):
            whole = NativeDecoder(native(isa, threads).context, weights)
            assert same(step.run(whole), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_the_reference(isa: str, shape: Shape, rng: torch.Generator) -> None:
    weights = draw_weights(rng, shape, torch.float32)
    step = draw_step(rng, shape, torch.float32, MIXED)
    whole = NativeDecoder(native(isa).context, weights)
    expected = step.run(partial(decoder, reference_ops(), weights))
    for actual, reference in zip(step.run(whole), expected, strict=True):
        torch.testing.assert_close(actual, reference, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch(
    isa: str, dtype: torch.dtype, rng: torch.Generator
) -> None:
    """A prompt at once, in chunks, and token by token, beside strangers."""
    shape, tokens = SHAPES[0], 40
    weights = draw_weights(rng, shape, dtype)
    whole = NativeDecoder(native(isa).context, weights)
    prompt = draw_step(rng, shape, dtype, [(tokens, tokens), (3, 9)])
    prompt = replace(prompt, logit_rows=torch.arange(tokens))
    expected = prompt.run(whole)[0]
    for chunks in ([tokens], [17, 23], [1] * tokens):
        cache = (prompt.cache[0].clone(), prompt.cache[1].clone())
        done, pieces = 0, []
        for count in chunks:
            ids = prompt.ids[done : done + count]
            meta = prompt.batch.meta
            done += count
            part = replace(
                meta,
                positions=meta.positions[done - count : done],
                slots=meta.slots[done - count : done],
                query_starts=torch.tensor([0, count], dtype=torch.int32),
                context_lens=torch.tensor([done], dtype=torch.int32),
                block_tables=meta.block_tables[:1],
            )
            pieces.append(whole(ids, part, cache, torch.arange(count)).clone())
        assert torch.equal(torch.cat(pieces), expected)


def test_layers_are_told_in_order_once_their_kv_is_written(rng: torch.Generator) -> None:
    shape = SMALL[0]
    whole = NativeDecoder(native("portable").context, draw_weights(rng, shape, torch.float32))
    step = draw_step(rng, shape, torch.float32, MIXED)
    cache, slots = step.cache, step.batch.meta.slots
    told = []

    def on_layer(layer: int) -> None:
        told.append(layer)
        written = [not component.flatten(1, 2)[:, slots].isnan().any(-1).any(-1).any(-1)[i]
                   for component in cache for i in range(LAYERS)]  # fmt: skip
        assert written == [i <= layer for i in range(LAYERS)] * 2

    out = whole(step.ids, step.batch.meta, cache, step.logit_rows, on_layer).clone()
    assert told == list(range(LAYERS))
    assert torch.equal(out, step.run(whole)[0])


def test_rows_that_nobody_asks_for_cost_no_logits(rng: torch.Generator) -> None:
    shape = SMALL[1]
    whole = NativeDecoder(native("portable").context, draw_weights(rng, shape, torch.float32))
    step = draw_step(rng, shape, torch.float32, MIXED)
    everything = replace(step, logit_rows=torch.arange(len(step.ids))).run(whole)
    for rows in ([], [0], [49, 3, 20]):
        some = replace(step, logit_rows=torch.tensor(rows, dtype=torch.int64)).run(whole)
        assert torch.equal(some[0], everything[0][rows])
        assert same(some[1:], everything[1:])


def test_memory_of_a_step_is_kept(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SMALL[1]
    whole = NativeDecoder(native("portable").context, draw_weights(rng, shape, torch.float32))
    big, small = (draw_step(rng, shape, torch.float32, lens) for lens in (MIXED, [(1, 5)]))
    first = whole(big.ids, big.batch.meta, big.cache, big.logit_rows)
    monkeypatch.setattr(torch, "empty", None)  # nothing is to be had any more
    again = whole(small.ids, small.batch.meta, small.cache, small.logit_rows)
    assert first.data_ptr() == again.data_ptr()


def test_what_would_be_read_out_of_bounds_is_refused(rng: torch.Generator) -> None:
    shape = SMALL[0]
    weights = draw_weights(rng, shape, torch.float32)
    context = native("portable").context
    whole = NativeDecoder(context, weights)
    step = draw_step(rng, shape, torch.float32, [(2, 5)])
    meta = step.batch.meta
    for ids in ([0, VOCAB], [-1, 0]):
        with pytest.raises(ValueError, match="out of range"):
            whole(torch.tensor(ids), meta, step.cache, step.logit_rows)
    far = replace(meta, positions=torch.tensor([0, POSITIONS]))
    with pytest.raises(ValueError, match="out of range"):
        whole(step.ids, far, step.cache, step.logit_rows)
    for rows in ([2], [-1], [1, 0, 1]):
        with pytest.raises(ValueError, match="out of range"):
            whole(step.ids, meta, step.cache, torch.tensor(rows))
    with pytest.raises(ValueError, match="do not fit"):
        whole(step.ids, meta, (step.cache[0], step.cache[1][:1]), step.logit_rows)
    with pytest.raises(ValueError, match="do not fit"):
        whole(torch.zeros(3, dtype=torch.int64), meta, step.cache, step.logit_rows)
    # Half as wide, or every second of a wider one: C would read on behind their end.
    for name in ("positions", "slots", "query_starts", "context_lens", "block_tables"):
        given = getattr(meta, name)
        narrow = given.to(torch.int32 if given.dtype is torch.int64 else torch.int16)
        with pytest.raises(ValueError, match="do not fit"):
            whole(step.ids, replace(meta, **{name: narrow}), step.cache, step.logit_rows)
    for ids in (step.ids.int(), step.ids.repeat_interleave(2)[::2]):
        with pytest.raises(ValueError, match="do not fit"):
            whole(ids, meta, step.cache, step.logit_rows)
    with pytest.raises(ValueError, match="do not fit"):
        whole(step.ids, meta, step.cache, step.logit_rows.int())
    with pytest.raises(ValueError, match="do not fit"):
        NativeDecoder(context, replace(weights, final_norm=torch.ones(1)))
    with pytest.raises(ValueError, match="dtypes"):
        NativeDecoder(context, replace(weights, final_norm=weights.final_norm.bfloat16()))
