"""What arrives goes to the disk at once, and is waited for before a bundle has its name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pop_node.store import partial
from pop_node.store.files import begin_writing
from pop_node.store.partial import partial_bundle
from pop_node.store.source import unwatched
from pop_node.store.store import Store
from tests.pop_node.store.tiny_models import write_huggingface


@pytest.fixture
def original(tmp_path: Path) -> Store:
    store = Store(tmp_path / "original")
    store.add(str(write_huggingface(tmp_path / "hf")), "tiny", "float32", unwatched)
    return store


def test_the_disk_begins_with_each_chunk_and_is_waited_for_at_the_end(
    tmp_path: Path, original: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[int, int]] = []
    synced: list[str] = []
    real = os.fsync

    def note(fd: int, offset: int, nbytes: int) -> None:
        begun.append((offset, nbytes))
        begin_writing(fd, offset, nbytes)

    def fsync(fd: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))
        real(fd)

    monkeypatch.setattr(partial, "begin_writing", note)
    monkeypatch.setattr(os, "fsync", fsync)
    bundle = original.get("tiny")
    data = bundle.manifest.data
    content = (bundle.path / data.name).read_bytes()
    root = tmp_path / "partial"
    root.mkdir()
    with partial_bundle(root, bundle.manifest, on_wait=lambda: None) as filled:
        spans = [data.span(index) for index in range(len(data.chunks))]
        for index, (offset, nbytes) in enumerate(spans):
            assert not filled.put_chunk(index, bytes(nbytes)), "not the one that is named"
            assert filled.put_chunk(index, content[offset : offset + nbytes])
        assert begun == spans, "what is wrong is not written"
        assert str(filled.path / data.name) not in synced
        filled.finish()
        assert str(filled.path / data.name) in synced
        assert (filled.path / data.name).read_bytes() == content


def test_a_system_that_cannot_begin_early_loses_nothing() -> None:
    reading, writing = os.pipe()  # nothing that lies on a disk
    try:
        begin_writing(writing, 0, 4096)
    finally:
        os.close(reading)
        os.close(writing)
    begin_writing(writing, 0, 4096)  # closed
