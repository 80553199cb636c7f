"""Which models a store gives up when it must shrink: a pure decision with its reasons."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Held:
    """A bundle: its size, when it was last loaded or added, its names, why it has to stay."""

    bundle: str
    nbytes: int
    used_ns: int
    names: tuple[str, ...]
    kept: Literal["", "pinned", "loaded"]


def least_used(held: Iterable[Held], budget_bytes: int) -> list[Held]:
    """Bundles to remove, in order, until the rest has ``budget_bytes`` or must stay.

    Bundles that no name means go first and in any case, then the least recently used.
    """
    everything = list(held)
    total = sum(bundle.nbytes for bundle in everything)
    chosen = []
    for bundle in sorted(everything, key=lambda b: (bool(b.names), b.used_ns, b.bundle)):
        if bundle.kept or (bundle.names and total <= budget_bytes):
            continue
        chosen.append(bundle)
        total -= bundle.nbytes
    return chosen
