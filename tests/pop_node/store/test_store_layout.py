"""Where tensors lie and what a rank reads, against plain slicing of the matrices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pop_node.models.storage_order import StorageOrder, Unit, storage_order
from pop_node.store.layout import Described, TensorEntry, aligned, lay_out, share_of
from pop_node.store.load_plan import LoadPlan, plan_load
from pop_node.store.manifest import DataFile, KvGeometry, Manifest

LLAMA_8B = {
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 1,
    "intermediate_size": 14336,
    "hidden_size": 4096,
}


def manifest_of(
    entries: list[TensorEntry], stripes: int, chunk_bytes: int, slack: int = 0
) -> Manifest:
    """Only what a plan is made from is filled in."""
    last = entries[-1]
    nbytes = aligned(last.offset + last.nbytes) + slack
    chunks = [""] * -(-nbytes // chunk_bytes)
    data = DataFile("weights.bin", nbytes, "raw", chunk_bytes, chunks)
    kv = KvGeometry(1, 1, 1)
    return Manifest(
        2, "m", "", "", "float32", stripes, entries, data, [], "", "", kv, 8, "the tests"
    )


def test_what_is_fused_lies_back_to_back_in_the_order_of_use() -> None:
    order = storage_order(LLAMA_8B)
    assert order.stripes == 8
    shapes = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)}
    prefix = "model.layers.0."
    tensors = [
        Described(f"{prefix}self_attn.{name}_proj.weight", "BF16", shape)
        for name, shape in shapes.items()
    ]
    tensors += [
        Described(f"{prefix}mlp.{name}_proj.weight", "BF16", (14336, 4096))
        for name in ("up", "gate")
    ]
    tensors += [Described("some.other", "F32", (3,)), Described("model.norm.weight", "BF16", (7,))]
    entries = lay_out(tensors, order)
    assert [entry.name.removeprefix(prefix) for entry in entries] == [
        *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "model.norm.weight",
        "some.other",
    ]
    q, k, v, o, gate, up, norm, other = entries
    assert (k.offset, v.offset) == (q.offset + q.nbytes, k.offset + k.nbytes)
    assert up.offset == gate.offset + gate.nbytes
    assert q.unit == k.unit == v.unit < o.unit < gate.unit == up.unit < norm.unit < other.unit
    assert [e.axis for e in entries] == [0, 0, 0, 1, 0, 0, None, None]
    assert all(e.offset % 4096 == 0 for e in (q, o, gate, norm, other))


@pytest.mark.parametrize(
    ("changes", "stripes", "kv_axis"),
    [
        ({}, 8, 0),
        ({"num_key_value_heads": 1}, 8, None),
        ({"num_key_value_heads": None}, 8, 0),
        ({"num_attention_heads": 9, "num_key_value_heads": 3}, 1, 0),
        ({"num_attention_heads": 12, "num_key_value_heads": 4}, 4, 0),
        ({"intermediate_size": 14338}, 2, 0),
    ],
)
def test_stripes_follow_heads_and_inner_neurons(
    changes: dict[str, int | None], stripes: int, kv_axis: int | None
) -> None:
    order = storage_order(LLAMA_8B | changes)
    attention = next(unit for unit in order.units if len(unit.names) == 3)
    assert (order.stripes, attention.axes[1:]) == (stripes, (kv_axis, kv_axis))


@pytest.mark.parametrize("changes", [{"model_type": "other"}, {"num_hidden_layers": "two"}])
def test_unknown_families_are_stored_by_name(changes: dict[str, object]) -> None:
    order = storage_order(LLAMA_8B | changes)
    assert order == StorageOrder((), 1)
    entries = lay_out([Described(name, "F32", (2, 2)) for name in "cab"], order)
    assert [(e.name, e.offset, e.axis) for e in entries] == [
        ("a", 0, None),
        ("b", 4096, None),
        ("c", 8192, None),
    ]


def test_tensors_of_different_types_are_never_one_unit() -> None:
    order = StorageOrder((Unit(("a", "b"), (0, 0)),), 2)
    entries = lay_out([Described("a", "F32", (2, 3)), Described("b", "BF16", (2, 3))], order)
    assert entries[0].unit != entries[1].unit
    assert entries[1].offset == 4096


def test_what_stripes_do_not_divide_every_rank_has_whole() -> None:
    order = StorageOrder((Unit(("a", "b"), (0, 1)),), 4)
    entries = lay_out([Described("a", "F32", (6, 4)), Described("b", "F32", (6, 6))], order)
    assert [entry.axis for entry in entries] == [None, None]
    assert share_of(entries[0], 4, 3, 4).shape == (6, 4)


# ---- plans, carried out on a small file --------------------------------------------------------


def carry_out(plan: LoadPlan, data: bytes, *, in_place: bool) -> np.ndarray:
    """The plain meaning of a plan."""
    arena = np.full(plan.arena_bytes, 0xEE, np.uint8)
    file = np.frombuffer(data, np.uint8)
    for chunk in plan.chunks:
        source = file[chunk.offset : chunk.offset + chunk.nbytes]
        if in_place and chunk.in_place is not None:
            arena[chunk.in_place : chunk.in_place + chunk.nbytes] = source
            continue
        for move in chunk.moves:
            for row in range(move.rows):
                begin = move.source + row * move.width
                target = move.target + row * move.stride
                arena[target : target + move.width] = source[begin : begin + move.width]
    return arena


@st.composite
def models(draw: st.DrawFn) -> tuple[dict[str, np.ndarray], StorageOrder]:
    stripes = draw(st.sampled_from([1, 2, 3, 4, 8]))
    count = draw(st.integers(1, 6))
    units, tensors = [], {}
    for number in range(count):
        names, axes = [], []
        for part in range(draw(st.integers(1, 3))):
            axis = draw(st.sampled_from([None, 0, 1]))
            shape = [draw(st.integers(1, 40)), draw(st.integers(1, 40))]
            if axis is not None:
                shape[axis] = stripes * draw(st.integers(1, 9))
            name = f"t{number}.{part}"
            names.append(name)
            axes.append(axis)
            size = shape[0] * shape[1]
            tensors[name] = np.arange(size, dtype=np.float32).reshape(shape) + 1000 * len(tensors)
        units.append(Unit(tuple(names), tuple(axes)))
    return tensors, StorageOrder(tuple(units), stripes)


@given(models(), st.data())
def test_every_rank_of_every_degree_gets_its_slice(
    model: tuple[dict[str, np.ndarray], StorageOrder], data: st.DataObject
) -> None:
    tensors, order = model
    entries = lay_out([Described(n, "F32", t.shape) for n, t in tensors.items()], order)
    manifest = manifest_of(entries, order.stripes, chunk_bytes=4096)
    stored = bytearray(manifest.data.nbytes)
    for entry in entries:
        value = tensors[entry.name]
        cut = np.split(value, order.stripes, axis=1) if entry.axis == 1 else [value]
        raw = b"".join(np.ascontiguousarray(part).tobytes() for part in cut)
        stored[entry.offset : entry.offset + entry.nbytes] = raw
    ranks = data.draw(st.sampled_from([n for n in (1, 2, 3, 4, 8) if order.stripes % n == 0]))
    for rank in range(ranks):
        plan = plan_load(manifest, rank, ranks)
        arena = carry_out(plan, bytes(stored), in_place=data.draw(st.booleans()))
        ends: dict[int, int] = {}
        for entry, bound in zip(entries, plan.tensors, strict=True):
            value = tensors[entry.name]
            wanted = value if entry.axis is None else np.split(value, ranks, entry.axis)[rank]
            flat = arena[bound.offset : bound.offset + wanted.nbytes].view(np.float32)
            np.testing.assert_array_equal(flat.reshape(bound.shape), wanted)
            assert bound.offset == ends.get(entry.unit, aligned(bound.offset)), "units are packed"
            ends[entry.unit] = bound.offset + wanted.nbytes


def test_a_rank_reads_one_contiguous_range_of_each_tensor() -> None:
    order = StorageOrder((Unit(("down",), (1,)),), 8)
    (entry,) = lay_out([Described("down", "BF16", (4096, 14336))], order)
    manifest = manifest_of([entry], 8, chunk_bytes=4 << 20)
    for ranks in (1, 2, 4, 8):
        for rank in range(ranks):
            read = [chunk.index for chunk in plan_load(manifest, rank, ranks).chunks]
            assert read == list(range(read[0], read[-1] + 1))
            assert len(read) <= len(manifest.data.chunks) // ranks + 2


def test_whole_models_are_read_in_place_but_for_striped_columns() -> None:
    order = storage_order(LLAMA_8B)
    shapes = {"mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096)}
    shapes["mlp.down_proj"] = (4096, 14336)
    entries = lay_out(
        [Described(f"model.layers.0.{n}.weight", "BF16", s) for n, s in shapes.items()], order
    )
    manifest = manifest_of(entries, 8, chunk_bytes=4 << 20)
    plan = plan_load(manifest)
    assert plan.arena_bytes == manifest.data.nbytes
    down = entries[2].offset
    for chunk in plan.chunks:
        untouched = chunk.offset + chunk.nbytes <= down
        assert chunk.in_place == (chunk.offset if untouched else None)
