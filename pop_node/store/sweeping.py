"""Takes out of a store what nobody needs; what that is, is decided in ``pop_node.store.collect``.

Everything goes by a rename into the workspace of the caller, who holds the store's lock: a crash
leaves a bundle in its place or among the leftovers. What somebody loads stays.
"""

from __future__ import annotations

from pathlib import Path

from pop_node.store.collect import Held, least_used
from pop_node.store.facts import Collected
from pop_node.store.files import tree_bytes
from pop_node.store.holding import claimed, last_used_ns
from pop_node.store.names import Names
from pop_node.store.partial import abandoned_partials


def sweep(names: Names, bundles: Path, work: Path) -> None:
    """Remove bundles without a name: one just forgotten, and what crashes left."""
    used = names.by_bundle()
    for path in bundles.iterdir():
        if path.name not in used:
            with claimed(path) as free:
                if free:
                    path.rename(work / path.name)


def collected(
    names: Names,
    bundles: Path,
    partial: Path,
    work: Path,
    budget_bytes: int | None,
    *,
    abandoned: bool,
) -> Collected:
    """What ``Store.gc`` removes; see there. Raises ``ConfigError`` if a name is damaged."""
    held = _held(names, bundles)
    limit = budget_bytes if budget_bytes is not None else sum(b.nbytes for b in held)
    removed = []
    for bundle in least_used(held, limit):
        with claimed(bundles / bundle.bundle) as free:
            if not free:  # loaded since
                continue
            for name in bundle.names:
                names.forget(name)
            (bundles / bundle.bundle).rename(work / bundle.bundle)
        removed.append(bundle)
    freed = sum(bundle.nbytes for bundle in removed)
    kept = sum(bundle.nbytes for bundle in held) - freed
    num_partials = 0
    for path in abandoned_partials(partial) if abandoned else ():
        freed += tree_bytes(path)
        path.rename(work / f"partial-{path.name}")
        num_partials += 1
    return Collected(removed, num_partials, freed, kept)


def _held(names: Names, bundles: Path) -> list[Held]:
    """All bundles that are here, with what speaks for keeping each."""
    users = names.by_bundle()
    held = []
    for path in bundles.iterdir():
        meant = users.get(path.name, [])
        pinned = any(entry.pinned for _, entry in meant)
        with claimed(path) as free:
            held.append(
                Held(
                    path.name,
                    tree_bytes(path),
                    last_used_ns(path),
                    tuple(name for name, _ in meant),
                    "pinned" if pinned else "" if free else "loaded",
                )
            )
    return held
