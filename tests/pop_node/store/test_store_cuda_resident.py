"""The way to an accelerator in the resident form, on the fake streams of ``test_store_cuda_arena``:
every bit comes back, and what was packed is not kept in 16 bits."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_store_cuda_arena import streams as streams
from test_store_resident_load import HEADS, HIDDEN, KV_HEADS, WIDTH, make, weights

from kernels.reference.resident import dense
from kernels.resident import ResidentMatrix, Weight
from kernels.triton.resident_pack import pack
from pop_node.models import registry
from pop_node.models.binding import build_read, views
from pop_node.models.packing import as_it_is
from pop_node.store import cuda_resident_arena, layout
from pop_node.store.cuda_resident_arena import CudaResidentArena, UnitMemory
from pop_node.store.facts import Bundle
from pop_node.store.host_arena import HostArena
from pop_node.store.load_plan import plan_load
from pop_node.store.loader import Crew, load_chunks
from pop_node.store.unit_plan import plan_units
from wire.errors import ConfigError

CPU = torch.device("cpu")
INNER = 384
DOWN = "model.layers.1.mlp.down_proj.weight"
Allocate = Callable[[int], torch.Tensor]


@pytest.fixture(params=[False, True], ids=["raw", "packed"])
def bundle(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Bundle:
    """Matrices that get smaller, but for one; chunks hold several units and parts of them."""
    monkeypatch.setattr(layout, "CHUNK_BYTES", 5 * layout.ALIGNMENT)
    values = weights(INNER)
    values[DOWN] *= 10.0 ** -(torch.arange(INNER) % 37).float().numpy()  # all exponents there are
    values[DOWN] = (values[DOWN].view("uint32") & 0xFFFF0000).view("float32")
    return make(tmp_path, values, INNER, packed=request.param)


def loaded(bundle: Bundle, crew: Crew, pack: Any = pack) -> UnitMemory:
    plan = plan_units(bundle.manifest)
    assert len(plan.chunks) > crew.lanes
    data = bundle.manifest.data
    arena = CudaResidentArena(plan, crew.arena_lanes(data), data.chunk_bytes, CPU, pack)
    load_chunks(bundle.path, bundle.manifest, plan, arena, crew)
    assert arena.memory is not None
    return arena.memory


@pytest.mark.parametrize("crew", [Crew(1, 1), Crew(3, 2)])
def test_every_bit_arrives_however_late(
    bundle: Bundle, streams: pytest.MonkeyPatch, crew: Crew
) -> None:
    found = loaded(bundle, crew)
    plan = plan_load(bundle.manifest)
    data = bundle.manifest.data
    host = HostArena(plan, crew.arena_lanes(data), data.chunk_bytes)
    load_chunks(bundle.path, bundle.manifest, plan, host, crew)
    expected = views(plan, torch.from_numpy(host.memory))
    seen: set[str] = set()
    for unit, memory in found.plain:
        for name, tensor in views(unit, memory).items():
            assert torch.equal(tensor.view(torch.int16), expected[name].view(torch.int16)), name
            seen.add(name)
    for names, matrix in found.packed.items():
        whole = torch.cat([expected[name] for name in names])
        assert torch.equal(dense(matrix).view(torch.int16), whole.view(torch.int16)), names
        seen |= set(names)
    assert seen == expected.keys()
    assert {len(names) for names in found.packed} == {1, 2, 3}  # gates with ups, and q with k and v
    assert (DOWN,) not in found.packed
    assert (DOWN.replace("layers.1", "layers.0"),) in found.packed


def test_the_device_needs_room_for_one_form_alone(
    bundle: Bundle, streams: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    most = 0
    real = cuda_resident_arena.device_memory

    def noted(nbytes: int, device: torch.device) -> torch.Tensor:
        nonlocal most
        memory = real(nbytes, device)
        held.append(weakref.ref(memory))
        return memory

    def packing(weight: torch.Tensor, allocate: Allocate) -> Weight:
        nonlocal most
        most = max(most, sum(each() is not None for each in held))
        own = partial(torch.empty, dtype=torch.uint8)
        return pack(weight, own)

    streams.setattr(cuda_resident_arena, "device_memory", noted)
    found = loaded(bundle, Crew(1, 1), packing)
    matrices = sum(unit.shape is not None for unit in plan_units(bundle.manifest).units)
    assert len(found.packed) == matrices - 1
    left = sum(each() is not None for each in held)
    assert left == len(found.plain)  # norms, and the matrix that stays as it is
    assert most <= left + 3  # the one that is packed, and what its last chunk begins


def test_a_model_for_a_device_is_packed_on_its_way(
    bundle: Bundle, streams: pytest.MonkeyPatch
) -> None:
    def on_cpu(*arguments: Any, device: torch.device, **more: Any) -> CudaResidentArena:
        assert device.type == "cuda"
        return CudaResidentArena(*arguments, device=CPU, **more)

    streams.setattr(registry, "CudaResidentArena", on_cpu)
    streams.setattr(registry, "_arena", lambda device: pytest.fail("was read as it is"))
    ops: Any = SimpleNamespace(device=torch.device("cuda", 0), pack=pack)
    read = registry._read(bundle.path, "bfloat16", ops, "resident", plain=())
    read.hold.close()
    model = build_read(read, "bfloat16", registry.load_backend("reference", 1), as_it_is)
    layers = model.weights.layers
    assert isinstance(layers[0].qkv, ResidentMatrix)
    assert layers[0].qkv.shape == ((HEADS + 2 * KV_HEADS) * WIDTH, HIDDEN)
    assert isinstance(layers[1].gate_up, ResidentMatrix)
    assert isinstance(layers[1].down, torch.Tensor)


def test_no_room_is_said(streams: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **more: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    streams.setattr(torch, "empty", full)
    with pytest.raises(ConfigError, match="no room on cpu for 4096 bytes of weights"):
        cuda_resident_arena.device_memory(4096, CPU)
