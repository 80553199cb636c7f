"""Which files an engine's process reads before it reads any model: Python and its libraries.

An agent knows them without importing them, so it stays free of torch.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

PACKAGES = (
    "torch",
    "numpy",
    "safetensors",
    "tokenizers",
    "msgpack",
    "blake3",
    "kernels",
    "pop_node",
)
"""What an engine imports, see ``pop_node.engine``."""

SUFFIXES = (".py", ".pyc", ".so")

_SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "include", "idlelib"})
"""Folders of Python and of packages that no process reads to start."""


def library_files() -> list[Path]:
    """Every file of Python and of an engine's packages that a start may read; takes a second where
    nothing of them is in memory."""
    roots = {Path(sysconfig.get_path("stdlib"))}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None:
            roots.update(Path(place) for place in spec.submodule_search_locations or ())
    files = {Path(sys.executable).resolve()}
    for root in roots:
        files.update(_code(root))
    return sorted(files)


def _code(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED]
        for name in names:
            if name.endswith(SUFFIXES) or ".so." in name:
                path = Path(folder, name)
                if path.is_file():
                    yield path.resolve()
