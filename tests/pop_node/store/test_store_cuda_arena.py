"""The way to an accelerator, on fake streams whose copies come only when somebody waits for them.

Nothing here has met a CUDA device: what it shows is that no buffer is read into before it was
copied, and that every byte arrives.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pop_node.models import registry
from pop_node.models.binding import views
from pop_node.store import layout
from pop_node.store.cuda_arena import TURNS, CudaArena
from pop_node.store.host_arena import HostArena
from pop_node.store.host_memory import aligned_memory
from pop_node.store.load_plan import plan_load
from pop_node.store.loader import Crew, load_chunks
from pop_node.store.store import Bundle, Store

CPU = torch.device("cpu")


class LateStream:
    """Copies that were begun in it, not done yet."""

    current = threading.local()

    def __init__(self, device: torch.device) -> None:
        self.work: list[Callable[[], object]] = []
        self._doing = threading.Lock()

    def wait_stream(self, other: LateStream | None) -> None:
        """What is computed is computed at once here, so what it waits for has to be done."""
        if other is not None:
            other.synchronize()

    def wait_event(self, event: LateEvent) -> None:
        event.synchronize()

    def synchronize(self) -> None:
        with self._doing:  # what another thread does of it is not done yet
            while self.work:
                self.work.pop(0)()


class LateEvent:
    def __init__(self) -> None:
        self.stream: LateStream | None = None

    def record(self) -> None:
        self.stream = LateStream.current.stream

    def synchronize(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()


@contextmanager
def in_stream(stream: LateStream) -> Iterator[None]:
    LateStream.current.stream = stream
    yield
    LateStream.current.stream = None


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    copy, empty = torch.Tensor.copy_, torch.empty

    def late_copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> Any:
        stream = getattr(LateStream.current, "stream", None)
        if stream is None or not non_blocking:
            return copy(target, source)
        stream.work.append(lambda: copy(target, source))
        return target

    def plain_empty(*arguments: Any, pin_memory: bool = False, **more: Any) -> torch.Tensor:
        if pin_memory:  # page-locked memory begins at a page
            (shape,) = arguments
            return torch.from_numpy(aligned_memory(math.prod(shape))).view(shape)
        return empty(*arguments, **more).fill_(0xEE)

    monkeypatch.setattr(torch.Tensor, "copy_", late_copy)
    monkeypatch.setattr(torch, "empty", plain_empty)
    monkeypatch.setattr(torch.cuda, "Stream", LateStream)
    monkeypatch.setattr(torch.cuda, "Event", LateEvent)
    monkeypatch.setattr(torch.cuda, "stream", in_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    return monkeypatch


@pytest.fixture
def bundle(store: Store, source: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """In chunks of a page, so that tensors and chunks cross."""
    monkeypatch.setattr(layout, "CHUNK_BYTES", 4096)
    store.add(str(source), "tiny", "float32", lambda *_: None)
    return store.get("tiny")


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (1, 2)])
@pytest.mark.parametrize("crew", [Crew(1, 1), Crew(3, 2)])
def test_every_byte_arrives_however_late(
    bundle: Bundle, streams: pytest.MonkeyPatch, rank: int, ranks: int, crew: Crew
) -> None:
    plan = plan_load(bundle.manifest, rank, ranks)
    assert len(plan.chunks) > crew.lanes * TURNS
    arena = CudaArena(plan, crew.lanes, bundle.manifest.data.chunk_bytes, CPU)
    report = load_chunks(bundle.path, bundle.manifest, plan, arena, crew)
    expected = HostArena(plan, crew.lanes, bundle.manifest.data.chunk_bytes)
    load_chunks(bundle.path, bundle.manifest, plan, expected, crew)
    named = views(plan, torch.from_numpy(expected.memory))
    assert named
    for name, tensor in views(plan, arena.memory).items():
        assert torch.equal(tensor, named[name]), name
    assert report.phases["to_device"].nbytes == sum(
        move.rows * move.width for chunk in plan.chunks for move in chunk.moves
    )


def test_packed_chunks_are_decoded_on_their_way(
    store: Store, source: Path, streams: pytest.MonkeyPatch
) -> None:
    streams.setattr(layout, "CHUNK_BYTES", 4 * layout.ALIGNMENT)
    store.add(str(source), "raw", "bfloat16", lambda *_: None)
    store.pack("raw", target="packed", progress=lambda *_: None)
    found = []
    for name in ("raw", "packed"):
        bundle = store.get(name)
        plan = plan_load(bundle.manifest)
        crew = Crew(1, 1)
        assert len(plan.chunks) > crew.lanes
        data = bundle.manifest.data
        arena = CudaArena(plan, crew.arena_lanes(data), data.chunk_bytes, CPU)
        report = load_chunks(bundle.path, bundle.manifest, plan, arena, crew)
        found.append(views(plan, arena.memory))
    assert report.phases["decode"].nbytes > 0
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        assert torch.equal(tensor.view(torch.int16), found[1][name].view(torch.int16)), name


def test_a_bundle_for_a_device_is_read_to_where_it_stays(
    bundle: Bundle, streams: pytest.MonkeyPatch
) -> None:
    streams.setattr(registry, "_arena", lambda device: partial(CudaArena, device=CPU))
    ops = registry.load_backend("reference", 1)
    loaded = registry.load(bundle.path, "float32", ops)
    try:
        assert "to_device" in loaded.phases
        weights = loaded.model.weights
        tensors = [weights.embedding, weights.layers[1].qkv, weights.layers[1].down]
        # Views of one allocation: nothing was copied once more on the way into the model.
        assert len({t.untyped_storage().data_ptr() for t in tensors}) == 1
    finally:
        assert loaded.hold is not None
        loaded.hold.close()


def test_the_device_decides_where_a_model_is_read_to() -> None:
    assert registry._arena(CPU) is HostArena
    arena = registry._arena(torch.device("cuda", 1))
    assert isinstance(arena, partial)
    assert arena.func is CudaArena
    assert arena.keywords == {"device": torch.device("cuda", 1)}
