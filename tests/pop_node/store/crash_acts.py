"""What the crash tests kill: each runs in a process of its own, over and over until it dies.

Kept apart from the tests so that the server that forks these processes imports nothing else.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pop_node.store import fetch, layout
from pop_node.store.store import Store


def quiet(phase: str, done: int, total: int) -> None:
    pass


def act(kind: str, root: str, source: str, started: Any) -> None:
    """Do ``kind`` to the store at ``root`` again and again; ``started`` is set before the first."""
    layout.CHUNK_BYTES = 4096
    fetch.RUN_BYTES = 4 * 4096
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    store = Store(Path(root))
    started.set()
    while True:
        if kind == "load":
            from kernels.ops import load_ops
            from pop_node.models.registry import load

            load(store.get("kept").path, "float32", load_ops("reference", 1))
        elif kind == "gc":
            store.add(source, "a", "float32", quiet)
            store.gc(0)
        elif kind == "fetch":  # from a file URL: the same code, and no server to slow it down
            store.add(source, "a", None, quiet)
            store.gc(0)
        else:
            store.add(source, "a", "float32", quiet)
            store.remove("a")
