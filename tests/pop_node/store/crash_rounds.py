"""Rounds of kill -9 at random moments of what a store does, and what must hold after each.

    python -m tests.pop_node.store.crash_rounds --kills 200 [--seed N]

The store is the old one or the new one, goes on, and leaks nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pop_node.peers.giver import Giver
from pop_node.store import layout
from pop_node.store.dtypes import Dtype
from pop_node.store.source import unwatched
from pop_node.store.store import Store
from tests.pop_node.store.crash_acts import bring
from tests.pop_node.store.tiny_models import tensors, write_huggingface

CRASH_ACTS = Path(__file__).with_name("crash_acts.py")
KINDS = ("add", "pack", "fetch", "peer", "arrive", "gc", "load")
LONGEST_S = {"peer": 0.3, "arrive": 0.8, "pack": 0.15} | dict.fromkeys(
    ("add", "fetch", "gc", "load"), 0.08
)
"""Several rounds of each act: a kill may hit any step of any of them."""

DTYPES: dict[str, Dtype | None] = {"fetch": None, "pack": "bfloat16"}
"""What ``a`` is added as; float32 by the others."""


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


@contextmanager
def giving(store: Store) -> Iterator[str]:
    """A node that gives what the store has, in a thread; the value is its address."""
    giver = Giver(
        store,
        node="giver",
        rate_bytes_per_s=1e9,
        is_busy=lambda: False,
        authorize=lambda name, peer: None,
    )
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        address = asyncio.run_coroutine_threadsafe(giver.start("127.0.0.1", 0, None), loop)
        yield address.result(10)
    finally:
        asyncio.run_coroutine_threadsafe(giver.close(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def crash(kind: str, kills: int, folder: Path, rng: random.Random) -> set[tuple[int, ...]]:
    """Kill ``kills`` processes in the middle of ``kind``; raises ``AssertionError`` if one leaves
    what it must not. Returns the different states that the kills left: how many bundles, names,
    workspaces and partial bundles."""
    store = Store(folder / "store")
    first = str(write_huggingface(folder / "kept", tensors(1)))
    kept = store.add(first, "kept", "float32", unwatched)
    store.pin("kept", True)
    source = str(write_huggingface(folder / "source"))
    states = set()
    with ExitStack() as stack:
        if kind in ("fetch", "peer", "arrive"):
            there = Store(folder / "there")
            there.add(source, "a", "float32", unwatched)
            url = there.get("a").path.as_uri()
            source = url if kind == "fetch" else stack.enter_context(giving(there))
        for _ in _killed(kind, kills, store.root, source, rng):
            states.add(
                tuple(
                    len(list((store.root / folder).iterdir()))
                    for folder in ("bundles", "names", "tmp", "partial")
                )
            )
            settled(store, kept.identity)
            if rng.random() < 0.5:  # else the next one starts from the wreck
                clean(store)
        if kind in ("peer", "arrive"):
            asyncio.run(bring(store, source, and_load=kind == "arrive"))
        else:
            store.add(source, "a", DTYPES.get(kind, "float32"), unwatched)
    settled(store, kept.identity)
    store.remove("a")
    clean(store)
    return states


def _killed(kind: str, kills: int, store: Path, source: str, rng: random.Random) -> Iterator[None]:
    """Each time, a process died in the middle of its act."""
    command = [sys.executable, str(CRASH_ACTS), kind, str(store), source]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    ) as killer:
        assert killer.stdin
        assert killer.stdout
        for _ in range(kills):
            killer.stdin.write(f"{rng.uniform(0, LONGEST_S[kind])}\n")
            killer.stdin.flush()
            assert killer.stdout.readline() == "9\n", "it failed by itself"
            yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=20260)
    arguments = parser.parse_args()
    layout.CHUNK_BYTES = 4096
    each = max(1, -(-arguments.kills // len(KINDS)))
    for kind in KINDS:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            rng = random.Random(f"{arguments.seed} {kind}")
            states = crash(kind, each, Path(folder), rng)
        took_s = time.monotonic() - began
        print(f"{kind}: {each} kills, {len(states)} different wrecks, {took_s:.0f} s", flush=True)


if __name__ == "__main__":
    main()
