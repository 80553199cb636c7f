"""kill -9 at random moments: the store is the old one or the new one, goes on, and leaks nothing.

``POPMESH_CRASHES`` sets how many processes die (40 by default); the seed is printed by a failure.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tensors, write_huggingface

from pop_node.store import layout
from pop_node.store.source import unwatched
from pop_node.store.store import Store

CRASHES = int(os.environ.get("POPMESH_CRASHES", "40"))
CRASH_ACTS = Path(__file__).with_name("crash_acts.py")
KINDS = ("add", "fetch", "gc", "load")
SEED = 20260
LONGEST_S = 0.08
"""Several rounds of each act: a kill may hit any step of any of them."""


def settled(store: Store, kept: str) -> None:
    """What must hold after any crash, without any repair."""
    names = {row.name for row in store.rows()}
    assert names <= {"a", "kept"}
    assert "kept" in names
    for row in store.rows():
        assert not row.problem
        assert not row.loaded, "the dead hold nothing"
        store.verify(row.name)
    assert store.get("kept").manifest.identity == kept


def clean(store: Store) -> None:
    """After a collection only what has a name is left."""
    store.gc()
    bundles = {row.entry.bundle for row in store.rows()}
    assert {path.name for path in (store.root / "bundles").iterdir()} == bundles
    for folder in ("tmp", "partial"):
        assert not list((store.root / folder).iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost_or_left_by_processes_that_die(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(layout, "CHUNK_BYTES", 4096)
    store = Store(tmp_path / "store")
    kept = store.add(
        str(write_huggingface(tmp_path / "kept", tensors(1))), "kept", "float32", unwatched
    )
    store.pin("kept", True)
    source = str(write_huggingface(tmp_path / "source"))
    if kind == "fetch":
        there = Store(tmp_path / "there")
        there.add(source, "a", "float32", unwatched)
        source = there.get("a").path.as_uri()
    rng = random.Random(f"{SEED} {kind}")
    states = set()
    root = Path(__file__).parents[3]
    command = [sys.executable, str(CRASH_ACTS), kind, str(store.root), source]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    ) as killer:
        assert killer.stdin
        assert killer.stdout
        for _ in range(max(1, CRASHES // len(KINDS))):
            killer.stdin.write(f"{rng.uniform(0, LONGEST_S)}\n")
            killer.stdin.flush()
            assert killer.stdout.readline() == "9\n", f"seed {SEED}: it failed by itself"
            states.add(
                tuple(
                    len(list((store.root / folder).iterdir()))
                    for folder in ("bundles", "names", "tmp", "partial")
                    if (store.root / folder).is_dir()
                )
            )
            settled(store, kept.identity)
            if rng.random() < 0.5:  # else the next one starts from the wreck
                clean(store)
    store.add(source, "a", None if kind == "fetch" else "float32", unwatched)
    settled(store, kept.identity)
    store.remove("a")
    clean(store)
    if CRASHES >= 40 and kind != "load":
        assert len(states) > 1, "the kills never hit the middle of anything"
