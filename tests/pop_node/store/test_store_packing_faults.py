"""Packing on disks that break or fill at any moment: a name means the old bundle or the new one."""

from __future__ import annotations

from pathlib import Path

import pytest

from pop_node.store import layout
from pop_node.store.layout import ALIGNMENT
from pop_node.store.source import unwatched
from pop_node.store.store import Store
from wire.errors import ConfigError


@pytest.fixture
def store(store: Store, source: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """With ``tiny`` in bfloat16, raw."""
    monkeypatch.setattr(layout, "CHUNK_BYTES", 4 * ALIGNMENT)  # the least that saves a page
    store.add(str(source), "tiny", "bfloat16", unwatched)
    return store


def sweep(store: Store, disk: list[int], said: str, target: str | None) -> int:
    """Pack until the disk, failing one step later each time, fails no more; how often it did."""
    raw = store.get("tiny").manifest
    for step in range(1, 200):
        disk[0] = step
        try:
            store.pack("tiny", target=target, progress=unwatched)
        except ConfigError as exc:
            failure = str(exc)
        else:
            failure = ""
        disk[0] = 0
        manifests = {manifest.name: manifest for manifest in store.list()}
        assert {manifest.identity for manifest in manifests.values()} == {raw.identity}
        assert set(manifests) <= {"tiny", target}
        for name in manifests:
            store.verify(name)
        if not failure:
            return step - 1
        assert said in failure
        assert not list((store.root / "tmp").iterdir())
        if manifests.get(target or "tiny", raw).bundle != raw.bundle:  # after the name appeared
            if target:
                store.remove(target)
            else:
                store.pack("tiny", "raw", progress=unwatched)
        store.gc()
        assert [path.name for path in (store.root / "bundles").iterdir()] == [raw.bundle]
    raise AssertionError("it never ends")


@pytest.mark.parametrize("target", [None, "packed"])
def test_a_disk_that_breaks_leaves_the_old_bundle_or_the_new(
    store: Store, failing_disk: list[int], target: str | None
) -> None:
    assert sweep(store, failing_disk, "disk failed", target) > 8
    assert store.get(target or "tiny").manifest.data.packing is not None


@pytest.mark.parametrize("target", [None, "packed"])
def test_a_disk_that_fills_leaves_the_old_bundle_or_the_new(
    store: Store, filling_disk: list[int], target: str | None
) -> None:
    assert sweep(store, filling_disk, "No space left", target) > 8
    assert store.get(target or "tiny").manifest.data.packing is not None
