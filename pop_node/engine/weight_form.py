"""What form a model's matrices take in an engine's memory where its operator leaves that open.

Only engines on a CPU have a choice, and what was measured of the model on this machine decides:
what nobody measured stays plain. Every choice has the same bits.
"""

from __future__ import annotations

from dataclasses import replace

from pop_node.engine.config import EngineConfig, WeightForm
from pop_node.store.machine import this_machine
from pop_node.store.weight_choice import Shape, plain_shapes
from pop_node.store.weight_tables import WeightTable, table_for

NO_SHAPES: frozenset[Shape] = frozenset()


def settle(config: EngineConfig) -> tuple[EngineConfig, frozenset[Shape]]:
    """``config``, of an engine on a CPU, with ``weights`` that are not ``auto``, and the shapes of
    matrices that stay plain all the same."""
    form, plain = choose(table_for(config.model_dir, this_machine(config.threads)))
    if form == "resident" and not _can_be_resident(config):
        form, plain = "plain", NO_SHAPES
    return replace(config, weights=form), plain


def choose(table: WeightTable | None) -> tuple[WeightForm, frozenset[Shape]]:
    """The form, and shapes that stay plain in it. Pure."""
    shapes = () if table is None else table.shapes
    plain = plain_shapes(shapes)
    if len(plain) == len({one.shape for one in shapes}):
        return "plain", NO_SHAPES
    return "resident", plain


def _can_be_resident(config: EngineConfig) -> bool:
    from pop_node.store.reading import is_bundle
    from pop_node.store.resident_reading import packer_for  # takes its time

    if config.backend == "reference" or not is_bundle(config.model_dir):
        return False
    return packer_for("resident", config.dtype) is not None
