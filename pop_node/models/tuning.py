"""Times a model's steps with the matrices of one shape after the other in the resident form.

It measures, and decides nothing (``pop_node.store.weight_choice``). What is timed is the engine's
decoder on the model's own weights: single products would find in a cache what a step reads from
memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from kernels.decoder import Decoder, DecoderLayer, DecoderWeights
from kernels.meta import AttentionMeta
from kernels.ops import Ops
from kernels.resident import ResidentMatrix, Weight
from pop_node.models.llama import Llama
from pop_node.models.packing import Packer
from pop_node.store.weight_choice import (
    DECODE_ROWS,
    PREFILL_ROWS,
    Shape,
    ShapeTimings,
    Timing,
)

BLOCK_TOKENS = 16

CONTEXT = 128
"""Tokens before a decode step: attention is a few percent of it, as in a short chat."""

MODEL_BYTES = 256 << 20
"""Layers are left out beyond so much: eight times a last cache of 32 MiB."""

ROUNDS = (6, 40)
"""Each is a step of every form; between these bounds, as many as ``ROUNDS_S`` allows."""

ROUNDS_S = 1.0
"""Of a bucket. Guess: SmolLM2 takes 25 s on one thread; medians of its pairs keep within 2 %."""

PARTS = ("qkv", "output", "gate_up", "down")

Report = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class _Form:
    """The weights with those of ``shape`` resident, None: all plain."""

    shape: Shape | None
    decode: Decoder


def measure(model: Llama, ops: Ops, report: Report) -> tuple[ShapeTimings, ...]:
    """Times by shape of the matrices of a model that is bound plain, biggest first; those left out
    that are no smaller in the resident form. Phase reported: ``tune``, in buckets.

    Raises ``ConfigError`` where ``ops`` cannot multiply with the form, RuntimeError where the two
    forms differ by a bit.
    """
    counts = _count(model.weights)
    weights = _some_layers(model.weights)
    packer = Packer(ops, release=False)
    assert ops.decoder is not None, "what packs has a decoder"
    forms = [_Form(None, ops.decoder(weights))]
    for shape in counts:
        packed = _with_resident(weights, shape, packer)
        if packed is not weights:
            forms.append(_Form(shape, ops.decoder(packed)))
    rows = DECODE_ROWS + PREFILL_ROWS
    blocks = max(max(DECODE_ROWS) * -(-CONTEXT // BLOCK_TOKENS), max(PREFILL_ROWS) // BLOCK_TOKENS)
    whole = model.allocate_cache(blocks, BLOCK_TOKENS)
    cache = tuple(part[: len(weights.layers)] for part in whole)
    timings: dict[Shape, list[Timing]] = {form.shape: [] for form in forms if form.shape}
    report("tune", 0, len(rows))
    for done, bucket in enumerate(rows, 1):
        for shape, timing in _time(forms, cache, weights.embedding.shape[0], bucket).items():
            timings[shape].append(timing)
        report("tune", done, len(rows))
    return tuple(ShapeTimings(shape, counts[shape], tuple(timings[shape])) for shape in timings)


def batch(sequences: int, queries: int, context: int) -> tuple[AttentionMeta, torch.Tensor]:
    """``sequences`` that each compute ``queries`` tokens up to ``context``, and their last rows."""
    blocks = -(-context // BLOCK_TOKENS)
    tables = torch.arange(sequences * blocks, dtype=torch.int32).view(sequences, blocks)
    positions = torch.arange(context - queries, context)
    slots = positions + torch.arange(sequences)[:, None] * blocks * BLOCK_TOKENS
    starts = torch.arange(0, sequences * queries + 1, queries, dtype=torch.int32)
    meta = AttentionMeta(
        positions=positions.repeat(sequences),
        slots=slots.flatten(),
        query_starts=starts,
        context_lens=torch.full((sequences,), context, dtype=torch.int32),
        block_tables=tables,
        block_tokens=BLOCK_TOKENS,
        max_query=queries,
        max_context=context,
        query_lens_host=[queries] * sequences,
        context_lens_host=[context] * sequences,
    )
    return meta, starts[1:].long() - 1


def matrices(weights: DecoderWeights) -> list[Weight]:
    """Every matrix once."""
    found = [weights.embedding]
    if weights.head is not weights.embedding:
        found.append(weights.head)
    for layer in weights.layers:
        found += [getattr(layer, part) for part in PARTS]
    return found


def _shape(weight: Weight) -> Shape:
    return weight.shape[0], weight.shape[1]


def _count(weights: DecoderWeights) -> dict[Shape, int]:
    """How many matrices there are of each shape, the biggest ones first."""
    counts: dict[Shape, int] = {}
    for matrix in sorted(matrices(weights), key=lambda one: -one.shape[0] * one.shape[1]):
        counts[_shape(matrix)] = counts.get(_shape(matrix), 0) + 1
    return counts


def _some_layers(weights: DecoderWeights) -> DecoderWeights:
    layer_bytes = sum(getattr(weights.layers[0], part).nbytes for part in PARTS)
    return replace(weights, layers=weights.layers[: max(1, -(-MODEL_BYTES // layer_bytes))])


def _with_resident(weights: DecoderWeights, shape: Shape, packer: Packer) -> DecoderWeights:
    """``weights`` with the matrices of ``shape`` resident, itself where none of them is smaller."""
    packed: dict[int, Weight] = {}

    def form(weight: Weight) -> Weight:
        if _shape(weight) != shape or not isinstance(weight, torch.Tensor):
            return weight
        return packed.setdefault(id(weight), packer(weight))

    def layer_in(layer: DecoderLayer) -> DecoderLayer:
        return replace(
            layer,
            qkv=form(layer.qkv),
            output=form(layer.output),
            gate_up=form(layer.gate_up),
            down=form(layer.down),
        )

    layers = tuple(map(layer_in, weights.layers))
    made = replace(
        weights, embedding=form(weights.embedding), layers=layers, head=form(weights.head)
    )
    is_smaller = any(isinstance(one, ResidentMatrix) for one in packed.values())
    return made if is_smaller else weights


def _time(
    forms: list[_Form], cache: tuple[torch.Tensor, ...], vocabulary: int, rows: int
) -> dict[Shape, Timing]:
    """Steps of ``rows`` rows: the median of plain ones, and by shape what it becomes."""
    is_decode = rows in DECODE_ROWS
    meta, last = batch(rows, 1, CONTEXT) if is_decode else batch(1, rows, rows)
    ids = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(rows))
    expected = forms[0].decode(ids, meta, cache, last).clone()
    for form in forms:
        if not torch.equal(form.decode(ids, meta, cache, last), expected):
            raise RuntimeError(f"logits of {rows} rows differ where {form.shape} is resident")
    took: dict[Shape | None, list[float]] = {form.shape: [] for form in forms}
    least, most = ROUNDS
    began = time.perf_counter()
    for number in range(most):
        if number >= least and time.perf_counter() - began > ROUNDS_S:
            break
        for form in forms if number % 2 else forms[::-1]:
            start = time.perf_counter()
            form.decode(ids, meta, cache, last)
            took[form.shape].append(time.perf_counter() - start)
    plain_us = 1e6 * statistics.median(took[None])
    found = {}
    for shape, times in took.items():
        if shape is not None:
            pairs = zip(times, took[None], strict=True)
            share = statistics.median(ours / theirs for ours, theirs in pairs)
            found[shape] = Timing(rows, round(plain_us, 1), round(plain_us * share, 1))
    return found
