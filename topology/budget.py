"""What models take of a node's memory, and which of them are in it when its doors open.

The arithmetic that nodes act on and that the planner foretells, in one place. Sizes are arguments:
this file knows no store.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from topology.model import Node

GB = 10**9
"""Bytes in a ``_gb`` of a topology."""

ENGINE_BYTES = 300_000_000
"""What an engine takes besides weights and KV cache: 150 MB of Python and torch (private pages once
all is imported, measured), 50 MB of staging (``StagingLayout``), and a guess for a step's tensors.
"""


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Bytes of one model: its bundle on the disk, its weights in memory, one token of its KV cache,
    its weights where they are kept ``resident``.

    ``kv_bytes_per_token`` 0, ``resident_bytes`` None: not known.
    """

    disk_bytes: int
    weights_bytes: int
    kv_bytes_per_token: int
    resident_bytes: int | None = None

    def weights_on(self, node: Node) -> int:
        """What the weights take of the memory of ``node``; where it chooses their form itself, at
        most so much: no form takes more than the plain one."""
        if node.weights == "resident" and self.resident_bytes is not None:
            return self.resident_bytes
        return self.weights_bytes

    def memory_bytes(self, node: Node) -> int:
        """What the model takes of the ``memory_gb`` of ``node``."""
        return self.weights_on(node) + self.kv_bytes_per_token * node.kv_tokens + ENGINE_BYTES


def memory_budget(node: Node) -> int | None:
    """Bytes that models may take on ``node``; None: no bound, all of them are kept in memory."""
    return None if node.memory_gb is None else round(node.memory_gb * GB)


def disk_budget(node: Node) -> int | None:
    """Bytes that bundles may take on the disk of ``node``; None: what the disk has."""
    return None if node.disk_gb is None else round(node.disk_gb * GB)


def by_precedence(models: Sequence[str], pinned: Collection[str]) -> list[str]:
    """``models`` with the pinned ones first, otherwise in their own order."""
    return sorted(models, key=lambda model: model not in pinned)


def first_fit(order: Sequence[str], nbytes: Mapping[str, int], budget: int | None) -> list[str]:
    """Those of ``order`` that fit ``budget`` bytes together: each is taken that still fits.

    Whatever is not in ``nbytes`` is passed over: nobody knows its size.
    """
    taken: list[str] = []
    left = budget
    for model in order:
        size = nbytes.get(model)
        if size is None or (left is not None and size > left):
            continue
        taken.append(model)
        left = None if left is None else left - size
    return taken


def warm_at_start(node: Node, memory: Mapping[str, int]) -> list[str]:
    """The models that are in memory when the doors of ``node`` open: pinned ones, then as many
    others as fit, in the file's order. ``memory`` is bytes by model, as ``memory_bytes`` says."""
    return first_fit(by_precedence(node.models, node.pinned), memory, memory_budget(node))
