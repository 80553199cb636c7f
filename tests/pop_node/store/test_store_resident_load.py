"""Loading into the resident form: every bit comes back, whatever the chunks and stripes are."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import LAYERS, TOKENS, Tensors, write_huggingface

from kernels.ops import native_ops
from kernels.reference.resident import dense
from kernels.resident import ResidentMatrix
from kernels.resident_layout import TILE_ROWS
from pop_node.models.registry import load
from pop_node.store import layout
from pop_node.store.facts import Bundle
from pop_node.store.load_plan import ChunkPlan
from pop_node.store.reading import ReadBundle, read_share
from pop_node.store.resident_arena import PackedMatrix, ResidentArena, ResidentMemory
from pop_node.store.resident_plan import (
    WEIGHT_BYTES,
    MatrixPlan,
    plan_resident,
    seams,
    weights_bytes,
)
from pop_node.store.resident_reading import packer_for, read_resident
from pop_node.store.source import unwatched
from pop_node.store.store import Store
from wire.errors import ConfigError

HEADS, KV_HEADS, WIDTH = 4, 2, 64
HIDDEN = HEADS * WIDTH
DOWN = "model.layers.1.mlp.down_proj.weight"


def weights(inner: int, seed: int = 3) -> Tensors:
    """Float32 values that bfloat16 holds, with a few strange exponents."""
    rng = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (len(TOKENS), HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        shapes |= {
            at + "input_layernorm.weight": (HIDDEN,),
            at + "post_attention_layernorm.weight": (HIDDEN,),
            at + "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            at + "self_attn.k_proj.weight": (KV_HEADS * WIDTH, HIDDEN),
            at + "self_attn.v_proj.weight": (KV_HEADS * WIDTH, HIDDEN),
            at + "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            at + "mlp.gate_proj.weight": (inner, HIDDEN),
            at + "mlp.up_proj.weight": (inner, HIDDEN),
            at + "mlp.down_proj.weight": (HIDDEN, inner),
        }
    found = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32)
        values[rng.random(shape) < 0.004] *= 1e-20
        bits = values.view(np.uint32) & 0xFFFF0000
        found[name] = bits.view(np.float32)
    return found


def make(tmp_path: Path, values: Tensors, inner: int, *, packed: bool = False) -> Bundle:
    source = write_huggingface(
        tmp_path / "source",
        values,
        hidden_size=HIDDEN,
        intermediate_size=inner,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=WIDTH,
    )
    store = Store(tmp_path / "store")
    store.add(str(source), "wide", "bfloat16", unwatched)
    if packed:
        store.pack("wide", progress=unwatched)
    return store.get("wide")


def read(bundle: Bundle) -> ReadBundle:
    packer = packer_for("resident", "bfloat16")
    assert packer is not None
    found = read_resident(bundle.path, packer)
    found.hold.close()
    return found


def as_tensor(matrix: PackedMatrix) -> torch.Tensor:
    rows, columns = matrix.shape
    tiles = torch.from_numpy(matrix.tiles).view(-(-rows // TILE_ROWS), -(-columns // 64), 384)
    return dense(
        ResidentMatrix(
            matrix.shape,
            torch.from_numpy(matrix.palette),
            tiles,
            torch.from_numpy(matrix.starts),
            torch.from_numpy(matrix.escapes),
        )
    )


def bits(values: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """Of float32 that bfloat16 holds."""
    return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)


def check(memory: ResidentMemory, values: Tensors) -> set[str]:
    """Every tensor once, with every bit; the names of those that are packed."""
    left = dict(values)
    for matrix in memory.matrices:
        found = as_tensor(matrix).view(torch.uint16).numpy()
        expected = np.concatenate([left.pop(name) for name in matrix.names])
        np.testing.assert_array_equal(found, bits(expected))
    packed = values.keys() - left.keys()
    for plan, arena in memory.placed:
        for tensor in plan.tensors:
            nbytes = int(np.prod(tensor.shape)) * WEIGHT_BYTES
            flat = arena[tensor.offset : tensor.offset + nbytes].view(np.uint16)
            np.testing.assert_array_equal(
                flat.reshape(tensor.shape), bits(left.pop(tensor.name)), tensor.name
            )
    assert not left
    assert not memory.misfits
    return packed


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("chunk_bytes", "inner"), [(4096, 512), (36864, 512), (1 << 22, 640)])
def test_every_bit_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, inner: int, packed: bool
) -> None:
    """Chunks of less than a tile, of several, and of the model; stripes of whole groups or not."""
    monkeypatch.setattr(layout, "CHUNK_BYTES", chunk_bytes)
    values = weights(inner)
    bundle = make(tmp_path, values, inner, packed=packed)
    assert bundle.manifest.stripes == 4
    assert (bundle.manifest.data.packing is not None) == (packed and chunk_bytes > 4096)
    found = read(bundle)
    names = check(found.memory, values)
    assert (DOWN in names) == (inner == 512)
    assert "model.layers.0.mlp.up_proj.weight" in names
    assert sum(len(matrix.escapes) for matrix in found.memory.matrices) > 0
    data = bundle.manifest.data
    coded = [index for index in range(len(data.chunks)) if data.is_packed(index)]
    assert bool(coded) == (packed and chunk_bytes > 4096)
    nbytes = {"decode": sum(data.decoded_span(index)[1] for index in coded)}
    nbytes["pack"] = data.decoded_bytes - nbytes["decode"]
    for phase, expected in nbytes.items():  # what is packed on its way from the codec is decoded
        assert (found.report.phases[phase].nbytes if expected else 0) == expected


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize(("chunk_bytes", "inner"), [(36864, 512), (20480, 768), (1 << 22, 512)])
def test_what_has_too_many_escapes_is_read_again_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, inner: int, coded: bool
) -> None:
    """Chunks end between its tiles, or within: then a seam has begun that nobody needs any more."""
    monkeypatch.setattr(layout, "CHUNK_BYTES", chunk_bytes)
    values = weights(inner)
    patterns = np.random.default_rng(0).integers(0, 1 << 16, values[DOWN].shape, np.uint32)
    values[DOWN] = (patterns << 16).view(np.float32)
    values[DOWN][np.isnan(values[DOWN])] = 1.0  # the source's own checks
    packed = check(read(make(tmp_path, values, inner, packed=coded)).memory, values)
    assert DOWN not in packed
    assert DOWN.replace("layers.1", "layers.0") in packed


def test_the_model_is_the_one_of_the_plain_load(tmp_path: Path) -> None:
    bundle = make(tmp_path, weights(640), 640)
    ops = native_ops(1)
    ours, theirs = (load(bundle.path, "bfloat16", ops, form=f) for f in ("resident", "plain"))
    for one, other in zip(ours.model.weights.layers, theirs.model.weights.layers, strict=True):
        for part in ("qkv", "output", "gate_up", "down"):
            mine = getattr(one, part)
            # `down` could not be packed on the way, and was when the model was bound
            assert isinstance(mine, ResidentMatrix)
            assert torch.equal(dense(mine), getattr(other, part))
    assert ours.phases["pack"].nbytes
    assert "pack" not in theirs.phases


def test_a_damaged_chunk_is_an_error(tmp_path: Path) -> None:
    bundle = make(tmp_path, weights(512), 512)
    path = bundle.path / bundle.manifest.data.name
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(damaged)
    with pytest.raises(ConfigError, match="does not match its digest"):
        read(bundle)


def test_chunks_may_come_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CHUNK_BYTES", 12288)
    values = weights(512)
    bundle = make(tmp_path, values, 512)
    _, image, _ = read_share(bundle.path, bundle.manifest)
    plan = plan_resident(bundle.manifest)
    packer = packer_for("resident", "bfloat16")
    assert packer is not None
    raw = (bundle.path / bundle.manifest.data.name).read_bytes()
    for seed in range(3):
        arena = ResidentArena(plan, 1, bundle.manifest.data.chunk_bytes, packer)
        arena.prepare(threading.Event())
        order: list[ChunkPlan] = list(plan.chunks)
        np.random.default_rng(seed).shuffle(order)  # type: ignore[arg-type]
        for chunk in order:
            arena.landing(0, chunk)[:] = raw[chunk.offset : chunk.offset + chunk.nbytes]
            arena.place(0, chunk)
        arena.finish()
        assert arena.memory is not None
        check(arena.memory, values)
    assert weights_bytes(bundle.manifest) == plan.tiles_bytes + plan.arena_bytes
    assert len(image) > weights_bytes(bundle.manifest) > 0.7 * len(image)


def test_nothing_is_packed_for_float32_or_plain_weights() -> None:
    assert packer_for("plain", "bfloat16") is None
    assert packer_for("resident", "float32") is None


@given(
    rows=st.integers(1, 60),
    width=st.integers(1, 9).map(lambda groups: 64 * groups),
    at=st.integers(0, 30).map(lambda pages: 4096 * pages),
    chunk_bytes=st.integers(1, 6).map(lambda pages: 4096 * pages),
)
def test_seams_are_whole_tiles_around_every_cut(
    rows: int, width: int, at: int, chunk_bytes: int
) -> None:
    matrix = MatrixPlan(("w",), rows, width, at, 1, 0)
    found = seams(matrix, at, chunk_bytes)
    end = 0
    for seam in found:
        assert end <= seam.begin < seam.end <= matrix.panel_bytes
        assert seam.begin % matrix.tile_bytes == 0
        assert seam.end % matrix.tile_bytes == 0 or seam.end == matrix.panel_bytes
        end = seam.end
    for boundary in range(chunk_bytes - at % chunk_bytes, matrix.panel_bytes, chunk_bytes):
        inside = any(seam.begin < boundary < seam.end for seam in found)
        assert inside or boundary % matrix.tile_bytes == 0


@pytest.mark.parametrize("plain", [{(HIDDEN, HIDDEN)}, {(2 * 512, HIDDEN), (HIDDEN, 512)}])
@pytest.mark.parametrize("chunk_bytes", [36864, 1 << 22])
def test_shapes_that_stay_plain_are_placed_as_they_are(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chunk_bytes: int,
    plain: set[tuple[int, int]],
) -> None:
    monkeypatch.setattr(layout, "CHUNK_BYTES", chunk_bytes)
    values = weights(512)
    bundle = make(tmp_path, values, 512, packed=True)
    packer = packer_for("resident", "bfloat16")
    assert packer is not None
    found = read_resident(bundle.path, packer, plain=plain)
    found.hold.close()
    check(found.memory, values)
    shapes = {matrix.shape for matrix in found.memory.matrices}
    assert shapes
    assert not shapes & plain
