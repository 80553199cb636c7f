"""Puts a bundle where the store does not see it, and back: for rehearsing that it is not here.

What is aside lies in a workspace of the process that put it there. If that process dies it goes the
way of all leftovers (``pop_node.store.files.workspace``), so only what can be had elsewhere is put
aside.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pop_node.store.files import locked, sync_directory, workspace
from pop_node.store.holding import claimed
from pop_node.store.names import NameEntry, Names, check_name
from wire.errors import ConfigError


@contextmanager
def put_aside(name: str, names: Names, bundles: Path, tmp: Path, guard: Path) -> Iterator[None]:
    """Within, there is no such model; afterwards there is again: the copy that came meanwhile, else
    the one put aside. Raises ``ConfigError`` as ``_set_down`` does, or when the disk fails."""
    check_name(name)
    with ExitStack() as stack:
        with _writing(bundles):
            work = stack.enter_context(workspace(tmp, guard))
            with locked(guard):
                entry = _set_down(name, names, bundles, work)
        try:
            yield
        finally:
            with _writing(bundles), locked(guard):
                _take_up(name, entry, names, bundles, work)


@contextmanager
def _writing(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise ConfigError(f"the store cannot be changed: {exc}", where=str(where)) from exc


def _set_down(name: str, names: Names, bundles: Path, work: Path) -> NameEntry:
    """Forget the name and move its bundle to ``work``; returns what the name meant.

    The caller holds the store's lock. Raises ``ConfigError`` if there is no such name, another name
    means the same bundle, or somebody has it loaded.
    """
    entry = names.need(name)
    others = [other for other, _ in names.by_bundle()[entry.bundle] if other != name]
    if others:
        raise ConfigError(f"{name} cannot be put aside: {', '.join(others)} is the same bundle")
    with claimed(bundles / entry.bundle) as free:
        if not free:
            raise ConfigError(
                f"{name} is loaded or being checked by another process",
                suggestion="a node that shares its store with others cannot be without a model",
            )
        names.forget(name)
        (bundles / entry.bundle).rename(work / entry.bundle)
    sync_directory(bundles)
    return entry


def _take_up(name: str, entry: NameEntry, names: Names, bundles: Path, work: Path) -> None:
    """The name means what it meant: the copy that has come meanwhile, else the one put aside.

    A copy that is another bundle is left alone. The caller holds the store's lock.
    """
    came = names.read(name)
    if came is not None and came.bundle != entry.bundle and (bundles / came.bundle).is_dir():
        return
    if not (bundles / entry.bundle).is_dir():
        (work / entry.bundle).rename(bundles / entry.bundle)
    sync_directory(bundles)
    names.write(name, entry, work)
