"""What tuning a model found, by shape of its matrices: a table with bars, lines, JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from rich.table import Column, Table

from pop_node.store.weight_choice import (
    DECODE_ROWS,
    PREFILL_ROWS,
    ShapeTimings,
    gain,
    pays_on,
)
from pop_node.store.weight_tables import WeightTable

BAR_CELLS = 10

FULL_GAIN = 0.25
"""A full bar: what the biggest shape of a small model brings (measured: 0.1)."""


def tuning_table(table: WeightTable) -> Table:
    """One line per shape: how many times as fast the model's steps are where its matrices alone are
    resident, by rows of the step, the mean that decides with a bar, the form that follows."""
    buckets = DECODE_ROWS + PREFILL_ROWS
    found = Table(
        Column("Matrices", no_wrap=True),
        *(Column(str(rows), justify="right", no_wrap=True) for rows in buckets),
        Column("Mean", justify="right", no_wrap=True),
        Column("", no_wrap=True),
        Column("Kept", no_wrap=True),
        caption="Speed of a step with these matrices in 12 bits / with all in 16, by its rows "
        f"(to {DECODE_ROWS[-1]}: decode); {table.machine.threads} threads. Bar: 1.00 to 1.25.",
    )
    for shape in table.shapes:
        speedups = {one.rows: one.speedup for one in shape.timings}
        mean = gain(shape.timings)
        cells = max(0, min(BAR_CELLS, round((mean - 1) / FULL_GAIN * BAR_CELLS)))
        found.add_row(
            f"{shape.count} {_shape(shape)}",
            *(f"{speedups[rows]:.2f}" if rows in speedups else "" for rows in buckets),
            f"{mean:.2f}",
            "█" * cells + "░" * (BAR_CELLS - cells),
            _kept(shape),
        )
    return found


def tuning_lines(table: WeightTable) -> list[str]:
    """For pipes, a line per shape: count, shape, mean, form; separated by tabs."""
    return [
        "\t".join((str(one.count), _shape(one), f"{gain(one.timings):.3f}", _kept(one)))
        for one in table.shapes
    ]


def tuning_json(name: str, table: WeightTable) -> dict[str, Any]:
    """The table as it is kept, with what follows from it."""
    kept = {_shape(one): _kept(one) for one in table.shapes}
    return {"name": name, "table": msgspec.to_builtins(table), "kept": kept}


def summary(name: str, shapes: Sequence[ShapeTimings]) -> str:
    """What nodes make of it."""
    resident = sum(one.count for one in shapes if pays_on(one.timings))
    total = sum(one.count for one in shapes)
    return (
        f"{name}: {resident} of {total} matrices stay resident on nodes of this machine with "
        "'weights: auto'; every choice has the same bits"
    )


def _shape(one: ShapeTimings) -> str:
    return f"{one.shape[0]}x{one.shape[1]}"


def _kept(one: ShapeTimings) -> str:
    return "resident" if pays_on(one.timings) else "plain"
