"""The key that the prefix chains of a mesh's routers begin with, in a file.

With the same key all routers know by the same values what nodes have in their caches, also those
that were started later. Without it nobody can tell from a value which prompt it stands for.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from wire.errors import ConfigError

FILE = "cache-key"
"""Its name in a directory of certificates."""

NUM_BYTES = 32
"""As long as the digest that it keys, see ``wire.prefix``."""


def make_cache_key(path: Path) -> None:
    """Write a new key to ``path``, readable by its owner alone; an old one is replaced."""
    write_cache_key(path, secrets.token_bytes(NUM_BYTES))


def write_cache_key(path: Path, key: bytes) -> None:
    """Write ``key`` to ``path``, readable by its owner alone; an old one is replaced."""
    path.unlink(missing_ok=True)  # an old file's mode and links would otherwise survive
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(key.hex() + "\n")


def load_cache_key(path: Path) -> bytes:
    """The key in ``path``; raises ``ConfigError``."""
    try:
        key = bytes.fromhex(path.read_text().strip())
    except (OSError, ValueError) as exc:
        raise ConfigError(
            f"the cache key cannot be read: {exc}",
            where=str(path),
            suggestion=f"a file with {NUM_BYTES} bytes as {2 * NUM_BYTES} hexadecimal digits, the "
            "same at all routers of the mesh",
        ) from exc
    if len(key) != NUM_BYTES:
        raise ConfigError(
            f"the cache key has {len(key)} bytes instead of {NUM_BYTES}",
            where=str(path),
            suggestion=f"openssl rand -hex {NUM_BYTES}, the same at all routers of the mesh",
        )
    return key
