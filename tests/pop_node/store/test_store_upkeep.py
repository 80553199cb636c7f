"""Keeping a store small and whole: collection, pins, old formats, bad disks."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tensors, write_huggingface

from kernels.ops import load_ops
from pop_node.models.registry import load
from pop_node.store import layout
from pop_node.store.collect import Held, least_used
from pop_node.store.holding import Hold
from pop_node.store.manifest import OutdatedBundleError
from pop_node.store.source import unwatched
from pop_node.store.store import Store
from tests.pop_node.disks import remount
from wire.errors import ConfigError


def fill(store: Store, folder: Path, *names: str) -> None:
    """Models of equal size, used in this order."""
    for number, name in enumerate(names, start=1):
        source = write_huggingface(folder / f"source-{name}", tensors(number))
        store.add(str(source), name, "float32", unwatched)
        os.utime(store.get(name).path / "manifest.json", (number, number))


# ---- what goes ---------------------------------------------------------------------------------

HELD = st.builds(
    Held,
    bundle=st.text("0123456789abcdef", min_size=8, max_size=8),
    nbytes=st.integers(0, 100),
    used_ns=st.integers(0, 50),
    names=st.sampled_from([(), ("a",), ("a", "b")]),
    kept=st.sampled_from(["", "", "pinned", "loaded"]),
)


@given(st.lists(HELD, max_size=12, unique_by=lambda h: h.bundle), st.integers(0, 500))
def test_only_what_must_go_goes_and_the_oldest_first(held: list[Held], budget: int) -> None:
    chosen = least_used(held, budget)
    gone = {bundle.bundle for bundle in chosen}
    left = [bundle for bundle in held if bundle.bundle not in gone]
    assert all(not bundle.kept for bundle in chosen)
    assert all(bundle.names or bundle.kept for bundle in left), "no nameless bundle stays"
    named = [bundle for bundle in chosen if bundle.names]
    total = sum(bundle.nbytes for bundle in left)
    assert total <= budget or all(bundle.kept for bundle in left)
    if named:  # the last one was needed
        assert total + named[-1].nbytes > budget
        stayed = [bundle.used_ns for bundle in left if not bundle.kept]
        assert max(b.used_ns for b in named) <= min(stayed, default=10**9)


def test_gc_removes_the_least_recently_used_down_to_the_budget(
    store: Store, tmp_path: Path
) -> None:
    fill(store, tmp_path, "oldest", "older", "old", "new")
    sizes = {row.name: row.nbytes for row in store.rows()}
    store.pin("oldest", True)
    hold = Hold(store.get("older").path)
    budget = sum(sizes.values()) - sizes["old"]
    collected = store.gc(budget)
    assert [bundle.names for bundle in collected.bundles] == [("old",)]
    assert (collected.freed_bytes, collected.kept_bytes) == (sizes["old"], budget)
    hold.close()
    assert [bundle.names for bundle in store.gc(0).bundles] == [("older",), ("new",)]
    assert [row.name for row in store.rows()] == ["oldest"]
    store.verify("oldest")
    assert not list((store.root / "tmp").iterdir())


def test_gc_without_a_budget_removes_only_rubbish(store: Store, tmp_path: Path) -> None:
    assert store.gc().bundles == []
    assert not store.root.exists()
    fill(store, tmp_path, "a")
    (store.root / "bundles" / ("0" * 64)).mkdir()
    (store.root / "tmp" / "left").mkdir()
    for name in ("1" * 64, "2" * 64):
        (store.root / "partial" / name).mkdir()
    (store.root / "partial" / ("1" * 64) / "weights.bin").write_bytes(bytes(100))
    busy = os.open(store.root / "partial" / ("2" * 64), os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(busy, fcntl.LOCK_EX)
    collected = store.gc()
    assert [bundle.bundle for bundle in collected.bundles] == ["0" * 64]
    assert (collected.num_partials, collected.freed_bytes) == (1, 100)
    assert [path.name for path in (store.root / "partial").iterdir()] == ["2" * 64]
    assert not list((store.root / "tmp").iterdir())
    store.verify("a")
    os.close(busy)
    assert store.gc().num_partials == 1


def test_a_bundle_with_two_names_stays_for_the_pinned_one(store: Store, source: Path) -> None:
    store.add(str(source), "a", "float32", unwatched)
    store.add(str(source), "b", "float32", unwatched)
    store.pin("b", True)
    assert store.gc(0).bundles == []
    store.remove("a")
    with pytest.raises(ConfigError, match="b is pinned"):
        store.remove("b")
    store.pin("b", False)
    assert [bundle.names for bundle in store.gc(0).bundles] == [("b",)]


def test_pins_survive_and_need_a_model(store: Store, source: Path) -> None:
    with pytest.raises(ConfigError, match="no model a"):
        store.pin("a", True)
    store.add(str(source), "a", "float32", unwatched)
    store.pin("a", True)
    store.add(str(source), "a", "float32", unwatched)
    assert Store(store.root).row("a").entry.pinned


# ---- format 1 ----------------------------------------------------------------------------------


def as_version_1(store: Store, source: Path, name: str) -> Path:
    """Puts the model of ``source`` back as an earlier popmesh stored it; returns the bundle."""
    manifest = store.add(str(source), name, "float32", unwatched)
    entry = json.loads((store.root / "names" / f"{name}.json").read_text())
    store.remove(name)
    bundle = store.root / "bundles" / ("a" * 64)
    bundle.mkdir()
    for path in source.iterdir():
        (bundle / path.name).write_bytes(path.read_bytes())
    (bundle / "README.md").unlink()
    old = {"format_version": 1, "name": name, "identity": manifest.identity}
    old |= {"source": "huggingface:x", "licence": "apache-2.0", "bundle": "a" * 64}
    (bundle / "manifest.json").write_text(json.dumps(old))
    entry |= {"bundle": "a" * 64}
    del entry["pinned"]
    (store.root / "names" / f"{name}.json").write_text(json.dumps(entry))
    return bundle


def test_format_1_is_said_and_converted_by_adding_again(store: Store, source: Path) -> None:
    bundle = as_version_1(store, source, "a")
    with pytest.raises(OutdatedBundleError, match=r"bundle format 1.*converts it on this disk"):
        store.get("a")
    assert store.list() == []
    (row,) = store.rows()
    assert "bundle format 1" in row.problem
    (source / "model.safetensors").unlink()  # the source is not needed any more
    manifest = store.add(str(source), "a", "float32", unwatched)
    assert (manifest.format_version, manifest.licence) == (2, "apache-2.0")
    assert [m.identity for m in store.list()] == [manifest.identity]
    store.verify("a")
    assert not bundle.exists()


def test_a_damaged_bundle_of_format_1_is_not_made_into_a_good_one(
    store: Store, source: Path
) -> None:
    bundle = as_version_1(store, source, "a")
    weights = bytearray((bundle / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (bundle / "model.safetensors").write_bytes(weights)
    with pytest.raises(ConfigError, match="the bundle of a is damaged"):
        store.add(str(source), "a", "float32", unwatched)
    assert bundle.exists()
    store.remove("a")
    store.add(str(source), "a", "float32", unwatched)
    store.verify("a")


# ---- disks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["directory", "url"])
def test_a_disk_that_fills_at_any_moment_leaves_the_old_state(
    tmp_path: Path, source: Path, filling_disk: list[int], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(layout, "CHUNK_BYTES", 16384)
    there = Store(tmp_path / "there")
    there.add(str(source), "tiny", "float32", unwatched)
    origin = there.get("tiny").path.as_uri() if way == "url" else str(source)
    store = Store(tmp_path / "here")
    first = write_huggingface(tmp_path / "first", tensors(7))
    store.add(str(first), "first", "float32", unwatched)
    steps = 0
    for steps in range(1, 200):
        filling_disk[0] = steps
        said = ""
        try:
            store.add(origin, "tiny", "float32", unwatched)
        except ConfigError as exc:
            said = str(exc)
        filling_disk[0] = 0
        if not said:
            break
        assert "No space left" in said
        assert [m.name for m in store.list()] in (["first"], ["first", "tiny"])
        store.gc()
        for folder in ("tmp", "partial"):
            assert not list((store.root / folder).iterdir())
        if len(store.list()) == 2:  # failed after the name had appeared
            store.remove("tiny")
    assert steps > 12
    store.verify("first")
    store.verify("tiny")


def test_a_real_disk_that_is_full_and_then_read_only(
    disk: Path, source: Path, tmp_path: Path
) -> None:
    store = Store(disk / "store")
    store.add(str(source), "a", "float32", unwatched)
    before = sorted(str(path) for path in disk.rglob("*"))
    (disk / "ballast").write_bytes(bytes(60_000))
    other = write_huggingface(tmp_path / "other", tensors(3))
    with pytest.raises(ConfigError, match=r"cannot be changed.*No space left"):
        store.add(str(other), "b", "float32", unwatched)
    (disk / "ballast").unlink()
    after = {str(path) for path in disk.rglob("*")} - set(before)
    assert after == {str(store.root / "locks" / "b.name")}
    remount(disk, "ro")
    for change in (
        lambda: store.add(str(other), "b", "float32", unwatched),
        lambda: store.remove("a"),
        lambda: store.pin("a", True),
        lambda: store.gc(0),
    ):
        with pytest.raises(ConfigError, match="Read-only file system"):
            change()
    store.verify("a")
    loaded = load(store.get("a").path, "float32", load_ops("reference", 1))
    assert loaded.hold is not None
    loaded.hold.close()


def test_a_model_is_lacking_without_its_name_or_its_bundle(store: Store, source: Path) -> None:
    assert store.lacks("a"), "there is not even a store"
    store.add(str(source), "a", "float32", unwatched)
    assert not store.lacks("a")
    bundle = store.get("a").path
    (bundle / "manifest.json").write_text("damaged")
    assert not store.lacks("a")
    bundle.rename(bundle.with_name("elsewhere"))
    assert store.lacks("a")
    bundle.with_name("elsewhere").rename(bundle)
    store.remove("a")
    assert store.lacks("a")


def test_names_of_an_earlier_version_are_not_pinned(store: Store, source: Path) -> None:
    store.add(str(source), "a", "float32", unwatched)
    path = store.root / "names" / "a.json"
    entry = json.loads(path.read_text())
    del entry["pinned"]
    path.write_bytes(msgspec.json.encode(entry))
    assert not store.row("a").entry.pinned
