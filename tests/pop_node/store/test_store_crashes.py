"""kill -9 at random moments: the store is the old one or the new one, goes on, and leaks nothing.

``POPMESH_CRASHES`` sets how many processes die (40 by default); the seed is printed by a failure.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from pop_node.store import layout
from tests.pop_node.store.crash_rounds import KINDS, crash

CRASHES = int(os.environ.get("POPMESH_CRASHES", "40"))
SEED = 20260


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost_or_left_by_processes_that_die(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(layout, "CHUNK_BYTES", 4096)
    print(f"seed {SEED}")
    states = crash(kind, max(1, CRASHES // len(KINDS)), tmp_path, random.Random(f"{SEED} {kind}"))
    if CRASHES >= 40 and kind != "load":
        hit = any(tmp or partial for _, _, tmp, partial in states)
        assert hit, "the kills never hit the middle of anything"
