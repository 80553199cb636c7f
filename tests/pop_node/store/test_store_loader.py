"""Loading a bundle: exact, verified, bounded, nothing left behind."""

from __future__ import annotations

import errno
import gc
import json
import mmap
import os
import random
import threading
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest
import torch
from tiny_models import tensors, write_huggingface

from kernels.ops import load_ops
from pop_node.models.registry import load, load_model, load_weights
from pop_node.store import host_arena, layout
from pop_node.store.holding import Hold
from pop_node.store.host_arena import PREPARE_BYTES, HostArena
from pop_node.store.host_memory import HUGE_PAGE_BYTES, aligned_memory
from pop_node.store.load_plan import LoadPlan, plan_load
from pop_node.store.loader import Crew, crew_for, load_chunks
from pop_node.store.store import Bundle, Store
from wire.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """With the model ``tiny`` in chunks of a page, so that tensors and chunks cross."""
    monkeypatch.setattr(layout, "CHUNK_BYTES", 4096)
    store = Store(tmp_path / "store")
    store.add(str(write_huggingface(tmp_path / "source")), "tiny", "float32", lambda *_: None)
    return store


@pytest.fixture
def bundle(store: Store) -> Bundle:
    return store.get("tiny")


def open_files() -> set[str]:
    """What this process has open. Garbage goes first: it may hold files, and let go of them between
    the list and the look at what is on it."""
    gc.collect()
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the list's own, or another thread's that is closed now
            found.add(os.readlink(f"/proc/self/fd/{fd}"))
    return found


# ---- exactness ---------------------------------------------------------------------------------


def test_a_model_is_one_allocation_and_its_tensors_are_views(bundle: Bundle) -> None:
    weights, report = load_weights(bundle.path, bundle.manifest, CPU)
    expected = tensors()
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(weights[name].numpy(), value)
    assert len({tensor.untyped_storage().data_ptr() for tensor in weights.values()}) == 1
    assert report.phases["read"].nbytes == report.phases["verify"].nbytes
    assert report.phases["read"].nbytes == bundle.manifest.data.nbytes
    assert report.phases["decode"].nbytes > 0
    assert 0 < report.phases["read"].wall_s <= report.wall_s


def test_fused_matrices_are_views_too(bundle: Bundle) -> None:
    model = load(bundle.path, "float32", load_ops("reference", 1)).model
    layer = model.weights.layers[1]
    storages = {t.untyped_storage().data_ptr() for t in (layer.qkv, layer.gate_up, layer.down)}
    assert len(storages) == 1
    expected = tensors()
    parts = [expected[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"]
    np.testing.assert_array_equal(layer.qkv.numpy(), np.concatenate(parts))
    parts = [expected[f"model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up")]
    np.testing.assert_array_equal(layer.gate_up.numpy(), np.concatenate(parts))
    assert layer.qkv.is_contiguous()


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_together_have_the_model(bundle: Bundle, ranks: int) -> None:
    shares = [load_weights(bundle.path, bundle.manifest, CPU, r, ranks)[0] for r in range(ranks)]
    for entry in bundle.manifest.tensors:
        parts = [share[entry.name] for share in shares]
        whole = parts[0] if entry.axis is None else torch.cat(parts, dim=entry.axis)
        np.testing.assert_array_equal(whole.numpy(), tensors()[entry.name])
        assert all(part.is_contiguous() for part in parts)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_gpu_gets_the_same(bundle: Bundle, ranks: int) -> None:
    for rank in range(ranks):
        there, report = load_weights(
            bundle.path, bundle.manifest, torch.device("cuda:0"), rank, ranks
        )
        here, _ = load_weights(bundle.path, bundle.manifest, CPU, rank, ranks)
        assert report.phases["to_device"].nbytes > 0
        assert all(torch.equal(there[name].cpu(), here[name]) for name in here)


def test_where_direct_reads_are_refused_buffered_ones_do(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open, real_preadv = os.open, os.preadv
    direct_fds = set()

    def refuse_open(path: str, flags: int, *rest: int, **named: object) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct reads")
        return real_open(path, flags, *rest, **named)  # type: ignore[arg-type]

    def watch_open(path: str, flags: int, *rest: int, **named: object) -> int:
        fd = real_open(path, flags, *rest, **named)  # type: ignore[arg-type]
        (direct_fds.add if flags & os.O_DIRECT else direct_fds.discard)(fd)
        return fd

    def refuse_read(fd: int, buffers: list[memoryview], offset: int) -> int:
        if fd in direct_fds:
            raise OSError(errno.EINVAL, "no direct reads")
        return real_preadv(fd, buffers, offset)

    for patches in ({"open": refuse_open}, {"open": watch_open, "preadv": refuse_read}):
        with monkeypatch.context() as patch:
            for name, replacement in patches.items():
                patch.setattr(os, name, replacement)
            weights, report = load_weights(bundle.path, bundle.manifest, CPU)
        assert not report.direct
        np.testing.assert_array_equal(
            weights["model.norm.weight"].numpy(), tensors()["model.norm.weight"]
        )


# ---- damage ------------------------------------------------------------------------------------


def test_one_flipped_bit_anywhere_is_found_before_a_token(bundle: Bundle) -> None:
    """Any bit of any file that reaches the engine; in the manifest those that mean something."""
    rng = random.Random(4)
    ops = load_ops("reference", 1)
    for name in ("weights.bin", "config.json", "tokenizer.json", "manifest.json"):
        path = bundle.path / name
        good = path.read_bytes()
        places = {0, len(good) - 1, *rng.sample(range(len(good)), 20)}
        if name == "manifest.json":
            people = [good.index(f'"{key}"'.encode()) for key in ("source", "created_by")]
            start = good.index(b'"identity"')
            places = {p for p in places if start <= p < min(people)} | {start + 20}
        for place in places:
            bad = bytearray(good)
            bad[place] ^= 1 << rng.randrange(8)
            path.write_bytes(bad)
            with pytest.raises(ConfigError):
                load(bundle.path, "float32", ops)
        path.write_bytes(good)
    load(bundle.path, "float32", ops)


def test_a_cut_or_missing_file_is_refused(bundle: Bundle) -> None:
    weights = bundle.path / "weights.bin"
    good = weights.read_bytes()
    for length in (0, 1, 4096, len(good) - 4096, len(good) - 1):
        os.truncate(weights, length)
        with pytest.raises(ConfigError, match=r"weights\.bin: (is cut short|cannot be read)"):
            load_weights(bundle.path, bundle.manifest, CPU)
        weights.write_bytes(good)
    weights.unlink()
    with pytest.raises(ConfigError, match="cannot be opened"):
        load_weights(bundle.path, bundle.manifest, CPU)


def test_a_failing_drive_ends_the_load_and_leaves_nothing(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th read fails, for every n, until a load gets through."""
    load_weights(bundle.path, bundle.manifest, CPU)
    real = os.preadv
    before, threads = open_files(), threading.active_count()
    for fails_at in range(1, 1000):
        calls = iter(range(1, 1_000_000))

        def preadv(
            fd: int, buffers: list[memoryview], offset: int, n: int = fails_at, c: object = calls
        ) -> int:
            if next(c) == n:  # type: ignore[call-overload]
                raise OSError(errno.EIO, "the drive failed")
            return real(fd, buffers, offset)

        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", preadv)
            said = ""
            try:
                load_model(bundle.path, "float32", load_ops("reference", 1))
            except ConfigError as exc:
                said = str(exc)
        if not said:
            break
        assert "the drive failed" in said
        assert open_files() == before
        assert threading.active_count() == threads
    assert fails_at > len(bundle.manifest.data.chunks)


def test_the_first_damaged_chunk_stops_the_others(bundle: Bundle) -> None:
    digests = ["0" * 64] * len(bundle.manifest.data.chunks)
    data = msgspec.structs.replace(bundle.manifest.data, chunks=digests)
    plan = plan_load(bundle.manifest)

    class Counting(HostArena):
        landed = 0

        def landing(self, lane, chunk):  # type: ignore[no-untyped-def]
            self.landed += 1
            return super().landing(lane, chunk)

    crew = Crew(2, 1)
    arena = Counting(plan, crew.lanes, 4096)
    with pytest.raises(ConfigError, match="does not match its digest"):
        load_chunks(
            bundle.path, msgspec.structs.replace(bundle.manifest, data=data), plan, arena, crew
        )
    assert arena.landed <= crew.lanes < len(plan.chunks)


def test_a_plain_model_directory_is_still_read(tmp_path: Path) -> None:
    loaded = load(write_huggingface(tmp_path / "plain"), "float32", load_ops("reference", 1))
    assert (loaded.phases, loaded.hold) == ({}, None)


# ---- memory ------------------------------------------------------------------------------------


def test_memory_is_aligned_and_given_back() -> None:
    memory = aligned_memory(3 * HUGE_PAGE_BYTES + 5)
    assert memory.ctypes.data % HUGE_PAGE_BYTES == 0
    assert len(memory) == 3 * HUGE_PAGE_BYTES + 5
    assert not memory.any()
    memory[-1] = 1
    with pytest.raises(ConfigError, match="no memory for"):
        aligned_memory(1 << 60)


def test_what_a_load_touches_is_the_model_and_the_pool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All memory of a load comes from ``mmap``; the sum is the arena and a buffer per lane."""
    store = Store(tmp_path / "store")
    store.add(str(write_huggingface(tmp_path / "source")), "tiny", "float32", lambda *_: None)
    bundle = store.get("tiny")
    sizes: list[int] = []

    class Recording(mmap.mmap):
        def __new__(cls, fd: int, length: int, **rest: int) -> Recording:
            sizes.append(length)
            return super().__new__(cls, fd, length, **rest)

    monkeypatch.setattr(mmap, "mmap", Recording)
    load_weights(bundle.path, bundle.manifest, CPU)
    arena = bundle.manifest.data.nbytes + HUGE_PAGE_BYTES
    buffer = bundle.manifest.data.chunk_bytes + HUGE_PAGE_BYTES
    assert sorted(sizes) == sorted(
        [4096, arena, *[buffer] * crew_for(plan_load(bundle.manifest)).lanes]
    )
    gc.collect()


def test_memory_is_touched_ahead_of_the_reads_and_keeps_what_is_in_it() -> None:
    plan = LoadPlan(8 * HUGE_PAGE_BYTES, [], [])
    arena = HostArena(plan, 2, HUGE_PAGE_BYTES)  # the first two chunks are left to the reads
    arena.memory[-1] = 7
    process = psutil.Process()
    before = process.memory_info().rss
    arena.prepare(threading.Event())
    # The last huge page may have been touched above; the process may give back a little.
    assert process.memory_info().rss - before > 4 * HUGE_PAGE_BYTES
    assert arena.memory[-1] == 7


def test_touching_ends_with_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    stop, touched = threading.Event(), []

    def populate(address: int, nbytes: int) -> bool:
        touched.append(nbytes)
        stop.set()
        return True

    monkeypatch.setattr(host_arena, "populate", populate)
    arena = HostArena(LoadPlan(4 * PREPARE_BYTES, [], []), 1, 4096)
    arena.prepare(stop)
    assert touched == [PREPARE_BYTES]


# ---- in use ------------------------------------------------------------------------------------


def test_a_loaded_model_cannot_be_removed_or_collected(store: Store, bundle: Bundle) -> None:
    loaded = load(bundle.path, "float32", load_ops("reference", 1))
    assert store.row("tiny").loaded
    with pytest.raises(ConfigError, match="tiny is loaded"):
        store.remove("tiny")
    assert store.gc(0).bundles == []
    assert loaded.hold is not None
    loaded.hold.close()
    assert not store.row("tiny").loaded
    assert [bundle.names for bundle in store.gc(0).bundles] == [("tiny",)]
    with pytest.raises(ConfigError, match="cannot be read"):
        Hold(bundle.path)


def test_loading_counts_as_use(store: Store, bundle: Bundle) -> None:
    os.utime(bundle.path / "manifest.json", (1, 1))
    assert store.row("tiny").used_ns == 10**9
    load(bundle.path, "float32", load_ops("reference", 1))
    assert store.row("tiny").used_ns > 10**9
    json.loads((bundle.path / "manifest.json").read_text())
