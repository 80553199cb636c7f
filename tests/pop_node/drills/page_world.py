"""What tests of the page cache share: a process that keeps a file's pages, and where files lie."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

MAPPER = """
import mmap, sys
with open(sys.argv[1], "rb") as file:
    view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    total = sum(view[::4096])
    print("mapped", flush=True)
    sys.stdin.readline()
"""


def kind_of(path: Path) -> str:
    """The file system under a path."""
    found = subprocess.run(
        ["stat", "-f", "-c", "%T", str(path)], capture_output=True, text=True, check=True
    )
    return found.stdout.strip()


def needs_a_disk(path: Path) -> None:
    """Skip the test where files under ``path`` are memory themselves."""
    kind = kind_of(path)
    if kind in ("tmpfs", "ramfs"):
        pytest.skip(f"files of this {kind} live in memory: there is nothing to drop")
