"""What form a model's matrices take in an engine's memory where its operator leaves that open.

Only engines on a CPU have a choice: what was measured of the model on this machine decides, else a
rule. Every choice has the same bits.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from pop_node.engine.config import EngineConfig, WeightForm
from pop_node.store.machine import this_machine
from pop_node.store.reading import is_bundle
from pop_node.store.resident_reading import packer_for
from pop_node.store.weight_choice import Shape, plain_shapes, rule
from pop_node.store.weight_tables import WeightTable, table_for

NO_SHAPES: frozenset[Shape] = frozenset()


def settle(config: EngineConfig) -> tuple[EngineConfig, frozenset[Shape]]:
    """``config``, of an engine on a CPU, with ``weights`` that are not ``auto``, and the shapes of
    matrices that stay plain all the same."""
    form, plain = _form(config)
    return replace(config, weights=form), plain


def _form(config: EngineConfig) -> tuple[WeightForm, frozenset[Shape]]:
    if config.backend == "reference" or packer_for("resident", config.dtype) is None:
        return "plain", NO_SHAPES
    machine = this_machine(config.threads)
    table = table_for(config.model_dir, machine) if is_bundle(config.model_dir) else None
    return choose(table, machine.instructions)


def choose(
    table: WeightTable | None, instructions: Collection[str]
) -> tuple[WeightForm, frozenset[Shape]]:
    """The form, and shapes that stay plain in it: by ``table``, without one by a rule. Pure."""
    if table is None:
        return ("resident" if rule(instructions) else "plain"), NO_SHAPES
    plain = plain_shapes(table.shapes)
    if len(plain) == len({one.shape for one in table.shapes}):
        return "plain", NO_SHAPES
    return "resident", plain
