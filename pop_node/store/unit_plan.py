"""Where a bundle goes unit by unit, each in memory of its own: for what is made smaller on arrival.

A unit holds what a model multiplies as one (``layout``). Pure arithmetic.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import groupby

from pop_node.store.layout import TensorEntry
from pop_node.store.load_plan import Bound, LoadPlan, plan_load
from pop_node.store.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Unit:
    """Bytes ``[begin, end)`` of the arena, with ``tensors`` bound from ``begin`` on, of which
    ``nbytes`` are brought there. ``shape``: rows and columns, if it is one matrix of bfloat16."""

    begin: int
    end: int
    nbytes: int
    tensors: list[Bound]
    shape: tuple[int, int] | None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class UnitPlan(LoadPlan):
    """A plan for a whole model whose moves each stay within one of ``units``, which ascend."""

    units: tuple[Unit, ...]

    def unit_at(self, offset: int) -> int:
        """The number of the unit that byte ``offset`` of the arena is of."""
        return bisect_right(self.units, offset, key=lambda unit: unit.begin) - 1


def plan_units(manifest: Manifest) -> UnitPlan:
    """The plan for a whole model."""
    plan = plan_load(manifest)
    at = {tensor.name: tensor for tensor in plan.tensors}
    units = tuple(
        _unit(list(entries), at)
        for _, entries in groupby(manifest.tensors, key=lambda entry: entry.unit)
    )
    return UnitPlan(plan.arena_bytes, plan.chunks, plan.tensors, units)


def _unit(entries: list[TensorEntry], at: dict[str, Bound]) -> Unit:
    begin = at[entries[0].name].offset
    ends = [at[entry.name].offset + entry.nbytes for entry in entries]
    tensors = [at[entry.name]._replace(offset=at[entry.name].offset - begin) for entry in entries]
    begins = [begin + tensor.offset for tensor in tensors]
    fits = all(entry.dtype == "BF16" and len(entry.shape) == 2 for entry in entries)
    widths = {entry.shape[-1] for entry in entries} if fits else set()
    whole = fits and len(widths) == 1 and ends[:-1] == begins[1:]
    shape = (sum(entry.shape[0] for entry in entries), widths.pop()) if whole else None
    return Unit(begin, ends[-1], sum(entry.nbytes for entry in entries), tensors, shape)
