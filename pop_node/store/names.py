"""The names of a store: which bundle each means, as one small file per name."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from pop_node.store.files import place_durably, sync_directory
from wire.errors import ConfigError

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class NameEntry(msgspec.Struct, frozen=True):
    """Content of a name file; ``source`` is as the user gave it, to recognise a repeated add."""

    bundle: str
    source: str
    dtype: str
    pinned: bool = False


class Names:
    """The folder of name files. Writing needs the store's lock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def all(self) -> Sequence[str]:
        """Sorted; a store that does not exist has none. Raises ``ConfigError`` if it cannot be
        read."""
        try:
            files = [entry.name for entry in os.scandir(self.folder)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as exc:
            raise ConfigError(f"cannot be read: {exc}", where=str(self.folder)) from exc
        stems = (name.removesuffix(".json") for name in files if name.endswith(".json"))
        return sorted(stem for stem in stems if _NAME.fullmatch(stem))

    def has(self, name: str) -> bool:
        """Whether there is such a name; damaged ones are, and those that cannot be looked at."""
        try:
            return self.path(name).is_file()
        except OSError:
            return True

    def read(self, name: str) -> NameEntry | None:
        """None if there is no such name; raises ``ConfigError`` if its file is damaged."""
        path = self.path(name)
        try:
            entry = msgspec.json.decode(path.read_bytes(), type=NameEntry)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as exc:
            raise ConfigError(f"cannot be read: {exc}", where=str(path)) from exc
        if not _DIGEST.fullmatch(entry.bundle):
            raise ConfigError("does not name a bundle", where=str(path))
        return entry

    def need(self, name: str) -> NameEntry:
        """As ``read``; raises ``ConfigError`` with a suggestion if there is no such name."""
        entry = self.read(name)
        if entry is None:
            raise self.missing(name)
        return entry

    def write(self, name: str, entry: NameEntry, scratch: Path) -> None:
        """Durably; ``scratch`` is a directory of the caller's on the same file system."""
        text = msgspec.json.format(msgspec.json.encode(entry)) + b"\n"
        place_durably(self.path(name), text, scratch)

    def forget(self, name: str) -> None:
        """Durably; no such name is fine."""
        self.path(name).unlink(missing_ok=True)
        sync_directory(self.folder)

    def by_bundle(self) -> dict[str, list[tuple[str, NameEntry]]]:
        """Who means which bundle; raises ``ConfigError`` if a name is damaged."""
        found: dict[str, list[tuple[str, NameEntry]]] = {}
        for name in self.all():
            if entry := self.read(name):
                found.setdefault(entry.bundle, []).append((name, entry))
        return found

    def path(self, name: str) -> Path:
        """The file of a name."""
        return self.folder / f"{name}.json"

    def missing(self, name: str) -> ConfigError:
        """The error for a name that nobody gave."""
        names = self.all()
        close = difflib.get_close_matches(name, names, n=1)
        if close:
            hint = f"did you mean {close[0]}?"
        elif names:
            hint = f"there are: {', '.join(names)}"
        else:
            hint = "the store is empty; add one with `popmesh model add`"
        return ConfigError(f"no model {name} in the store {self.folder.parent}", suggestion=hint)


def check_name(name: str) -> None:
    """Raises ``ConfigError`` for what cannot be a model's name."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is not a model name",
            suggestion="1 to 64 of a-z 0-9 . _ -, beginning with a letter or digit",
        )
