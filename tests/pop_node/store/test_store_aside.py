"""A model that is put aside is not there, and comes back whatever happens meanwhile."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tensors, write_huggingface

from pop_node.store.holding import Hold
from pop_node.store.source import unwatched
from pop_node.store.store import Store
from wire.errors import ConfigError, PeerError


@pytest.fixture
def source(tmp_path: Path) -> str:
    return str(write_huggingface(tmp_path / "source"))


@pytest.fixture
def store(tmp_path: Path, source: str) -> Store:
    store = Store(tmp_path / "store")
    store.add(source, "m", "float32", unwatched)
    store.pin("m", True)
    return store


def leftovers(store: Store) -> list[Path]:
    return list((store.root / "tmp").iterdir())


def test_it_is_not_there_and_then_it_is_as_it_was(store: Store):
    before, entry = store.get("m"), store.row("m").entry
    with store.put_aside("m"):
        assert not store.has("m")
        assert not before.path.exists()
        with pytest.raises(ConfigError):
            store.get("m")
    assert store.get("m") == before
    assert store.row("m").entry == entry, "pinned, from the same source"
    store.verify("m")
    assert leftovers(store) == []


def test_it_comes_back_when_what_is_done_meanwhile_fails(store: Store):
    with pytest.raises(PeerError), store.put_aside("m"):
        raise PeerError("nobody gives it")
    store.verify("m")
    assert leftovers(store) == []


def test_an_error_of_the_disk_that_is_not_the_stores_is_left_alone(store: Store):
    with pytest.raises(OSError, match="elsewhere"), store.put_aside("m"):
        raise OSError("elsewhere")
    store.verify("m")


def test_the_copy_that_came_meanwhile_stays_and_means_what_it_meant(store: Store, source: str):
    entry = store.row("m").entry
    with store.put_aside("m"):
        store.add(source, "m", "float32", unwatched)
        inode = (store.get("m").path / "manifest.json").stat().st_ino
    assert (store.get("m").path / "manifest.json").stat().st_ino == inode
    assert store.row("m").entry == entry, "pinned as before"
    assert leftovers(store) == []


def test_another_bundle_that_came_meanwhile_is_left_alone(store: Store, tmp_path: Path):
    other = str(write_huggingface(tmp_path / "other", tensors(7)))
    before = store.get("m").manifest.bundle
    with store.put_aside("m"):
        store.add(other, "m", "float32", unwatched)
    assert store.get("m").manifest.bundle != before
    store.verify("m")


def test_a_collection_meanwhile_does_not_take_it(store: Store):
    with store.put_aside("m"):
        store.gc(0)
    store.verify("m")


def test_what_others_use_is_not_put_aside(store: Store, source: str):
    hold = Hold(store.get("m").path)
    with pytest.raises(ConfigError, match="loaded or being checked"), store.put_aside("m"):
        raise AssertionError("never")
    hold.close()
    store.add(source, "twin", "float32", unwatched)
    with pytest.raises(ConfigError, match="twin is the same bundle"), store.put_aside("m"):
        raise AssertionError("never")
    with pytest.raises(ConfigError, match="no model x"), store.put_aside("x"):
        raise AssertionError("never")
    assert store.has("m")
    assert leftovers(store) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from pop_node.store.store import Store
with Store(Path(sys.argv[1])).put_aside("m"):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_that_dies_meanwhile_leaves_a_whole_store_without_it(store: Store, source: str):
    child = subprocess.run((sys.executable, "-c", KILLED, str(store.root)), check=False, timeout=60)
    assert child.returncode == -signal.SIGKILL
    assert not store.has("m")
    assert len(leftovers(store)) == 1
    store.gc()
    assert leftovers(store) == []
    store.add(source, "m", "float32", unwatched)
    store.verify("m")
