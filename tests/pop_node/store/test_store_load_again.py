"""A bundle that is completed, and so moved, while it is read is read again from its new place."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path

import pytest

from pop_node.store import reading
from pop_node.store.bundle import read_texts
from pop_node.store.host_arena import HostArena
from pop_node.store.load_plan import ChunkPlan, LoadPlan
from pop_node.store.manifest import Manifest
from pop_node.store.reading import read_bundle
from pop_node.store.store import Bundle
from wire.errors import ConfigError


@pytest.mark.parametrize("what", ["texts", "chunks"])
def test_what_was_read_in_vain_keeps_no_memory(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    partial = tmp_path / "here" / "partial" / bundle.path.name
    published = tmp_path / "here" / "bundles" / bundle.path.name
    shutil.copytree(bundle.path, partial)
    published.parent.mkdir()
    made: list[weakref.ref[object]] = []

    class Watched(HostArena):
        def __init__(self, plan: LoadPlan, lanes: int, chunk_bytes: int) -> None:
            assert not any(memory() is not None for memory in made), "twice the memory"
            super().__init__(plan, lanes, chunk_bytes)
            made.append(weakref.ref(self.memory))

        def place(self, lane: int, chunk: ChunkPlan) -> int:
            if what == "chunks" and partial.exists():
                partial.rename(published)
                raise ConfigError("a chunk that cannot be read any more")
            return super().place(lane, chunk)

    def texts(path: Path, manifest: Manifest) -> dict[str, bytes]:
        if what == "texts" and partial.exists():
            partial.rename(published)
        return read_texts(path, manifest)

    monkeypatch.setattr(reading, "read_texts", texts)
    gc.disable()
    try:
        read = read_bundle(partial, Watched)
    finally:
        gc.enable()
    read.hold.close()
    assert read.directory == published
    assert len(made) == 2
