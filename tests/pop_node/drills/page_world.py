"""What tests of the page cache share: a process that keeps a file's pages, and where files lie."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

IN_MEMORY = ("tmpfs", "ramfs")
BUILD = Path(__file__).resolve().parents[3] / "build"

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


@contextmanager
def disk_folder(path: Path) -> Iterator[Path]:
    """``path``, or a folder of the test's own in the project's ``build`` where files under ``path``
    are memory themselves, as below many a ``/tmp``. Skips the test where those are too."""
    if kind_of(path) not in IN_MEMORY:
        yield path
        return
    BUILD.mkdir(exist_ok=True)
    if (kind := kind_of(BUILD)) in IN_MEMORY:
        pytest.skip(f"files of this {kind} live in memory: there is nothing to drop")
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        yield Path(folder)
