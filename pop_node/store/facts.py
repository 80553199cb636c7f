"""What a store says of what it holds, as frozen values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pop_node.store.collect import Held
from pop_node.store.manifest import Manifest
from pop_node.store.names import NameEntry


@dataclass(frozen=True, slots=True)
class Bundle:
    """A model ready to load: a directory whose manifest and text files were checked."""

    path: Path
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class Row:
    """A name and what is known about its bundle.

    ``manifest`` is None where ``problem`` says why it cannot be used. ``nbytes`` on the disk;
    ``used_ns``: added or last loaded, ns since 1970; ``loaded``: some process holds it.
    """

    name: str
    entry: NameEntry
    manifest: Manifest | None
    problem: str
    nbytes: int
    used_ns: int
    loaded: bool


@dataclass(frozen=True, slots=True)
class Collected:
    """What ``gc`` removed: ``bundles``, and ``num_partials`` abandoned fetches."""

    bundles: list[Held]
    num_partials: int
    freed_bytes: int
    kept_bytes: int
