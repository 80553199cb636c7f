"""What arrives goes to the disk at once, and is waited for before a bundle has its name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pop_node.store import adding, partial
from pop_node.store.files import begin_writing
from pop_node.store.names import NameEntry, Names
from pop_node.store.partial import partial_bundle
from pop_node.store.source import unwatched
from pop_node.store.store import Store
from tests.pop_node.store.tiny_models import write_huggingface


class DiedError(Exception):
    """In place of the end of the process."""


def die(*arguments: object) -> None:
    raise DiedError


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


class Journal:
    """What a power loss would leave: paths whose content, or for directories whose entries, are on
    the disk, and the moves that are not there yet."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.synced: set[Path] = set()
        self.pending: set[Path] = set()  # appeared in a directory that was not synced since
        self.named = 0
        real_fsync, real_rename, real_mkdir = os.fsync, Path.rename, Path.mkdir

        def fsync(fd: int) -> None:
            real_fsync(fd)
            path = Path(os.readlink(f"/proc/self/fd/{fd}"))
            self.synced.add(path)
            self.pending = {each for each in self.pending if each.parent != path}

        def mkdir(self_: Path, *arguments: Any, **named: Any) -> None:
            if not self_.exists():
                self.pending.add(self_)
            real_mkdir(self_, *arguments, **named)

        def rename(self_: Path, target: Path) -> Path:
            if target.parent == root / "names":
                self.check(root, self_)
            moved = real_rename(self_, target)
            for path in {each for each in self.synced if each.is_relative_to(self_)}:
                self.synced.add(target / path.relative_to(self_))
            self.pending.add(target)
            return moved

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(Path, "mkdir", mkdir)
        monkeypatch.setattr(Path, "rename", rename)

    def check(self, root: Path, name_file: Path) -> None:
        """A bundle is about to get its name: all of it would survive."""
        self.named += 1
        assert name_file in self.synced
        bundle = (
            root / "bundles" / msgspec.json.decode(name_file.read_bytes(), type=NameEntry).bundle
        )
        assert {bundle, *bundle.iterdir()} <= self.synced
        lasting = [bundle, root / "names", *(each for each in bundle.parents)]
        assert not self.pending.intersection(lasting)


@pytest.mark.parametrize("way", ["directory", "url", "packed", "died before"])
def test_a_bundle_has_its_name_only_once_a_power_loss_would_leave_all_of_it(
    tmp_path: Path, original: Store, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    root = tmp_path / "not" / "there" / "yet"
    journal = Journal(root, monkeypatch)
    store = Store(root)
    source = original.get("tiny").path.as_uri() if way == "url" else str(tmp_path / "hf")
    if way == "died before":
        with monkeypatch.context() as dying:
            dying.setattr(Names, "write", die)
            dying.setattr(adding, "sync_directory", lambda path: None)
            with pytest.raises(DiedError):
                store.add(source, "tiny", "float32", unwatched)
    store.add(source, "tiny", "float32", unwatched)
    if way == "packed":
        store.pack("tiny", target="packed", progress=unwatched)
    assert journal.named == (2 if way == "packed" else 1)


def test_a_system_that_cannot_begin_early_loses_nothing() -> None:
    reading, writing = os.pipe()  # nothing that lies on a disk
    try:
        begin_writing(writing, 0, 4096)
    finally:
        os.close(reading)
        os.close(writing)
    begin_writing(writing, 0, 4096)  # closed
