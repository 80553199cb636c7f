"""What packing a model made of its tensors, by class: a table with bars, lines, JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Column, Table

from pop_node.store.pack_table import ClassRow, class_rows
from popmesh.render.models import size

if TYPE_CHECKING:
    from pop_node.store.manifest import Manifest
    from pop_node.store.packing import Packed

BAR_CELLS = 10


def pack_table(packed: Packed) -> Table:
    """One line per class; the bar is what is left of each, its light part what was saved."""
    table = Table(
        Column("Tensors", no_wrap=True),
        Column("Before", justify="right", no_wrap=True),
        Column("After", justify="right", no_wrap=True),
        Column("", no_wrap=True),
        Column("Left", justify="right", no_wrap=True),
        Column("Bits", justify="right", no_wrap=True),
        Column("Limit", justify="right", no_wrap=True),
        Column("Share", justify="right", no_wrap=True),
        caption="Bits per weight; no coder of these exponents can be below the limit, their "
        "entropy. Share of the packed model.",
    )
    rows = class_rows(packed.manifest, packed.pieces)
    total = sum(row.stored_bytes for row in rows) or 1
    for row in rows:
        left = _left(row)
        cells = round(left * BAR_CELLS)
        table.add_row(
            f"{row.num_tensors} {row.name}",
            size(row.decoded_bytes),
            size(round(row.stored_bytes)),
            "█" * cells + "░" * (BAR_CELLS - cells),
            f"{100 * left:.1f} %",
            f"{row.bits_per_weight:.2f}",
            f"{row.limit_bits_per_weight:.2f}",
            f"{100 * row.stored_bytes / total:.1f} %",
        )
    return table


def class_lines(packed: Packed) -> list[str]:
    """For pipes, a line per class: name, bytes before and after, bits per weight, entropy;
    separated by tabs."""
    return [
        "\t".join(
            (
                row.name,
                str(row.decoded_bytes),
                str(round(row.stored_bytes)),
                f"{row.bits_per_weight:.3f}",
                f"{row.limit_bits_per_weight:.3f}",
            )
        )
        for row in class_rows(packed.manifest, packed.pieces)
    ]


def pack_lines(name: str, packed: Packed) -> list[str]:
    """What is stored as it is, and why; then the sum."""
    data = packed.manifest.data
    lines = [
        f"{row.name}: {size(nbytes)} raw, {reason}"
        for row in class_rows(packed.manifest, packed.pieces)
        for reason, nbytes in row.raw.items()
    ]
    before, after = size(data.decoded_bytes), size(data.nbytes)
    if data.packing is None:
        return [*lines, f"{name} is stored raw: {after} of weights"]
    share = 100 * data.nbytes / data.decoded_bytes
    return [*lines, f"{name} is packed: {before} of weights in {after} ({share:.1f} %)"]


def intact_line(name: str, manifest: Manifest) -> str:
    """What it means that every byte of a model matched."""
    if manifest.data.packing is None:
        return f"{name} is intact"
    return (
        f"{name} is intact: its packed weights decode, bit for bit, to those of the model's digest "
        f"{manifest.identity[:12]}"
    )


def pack_json(name: str, packed: Packed) -> dict[str, Any]:
    """For programs."""
    data = packed.manifest.data
    return {
        "name": name,
        "identity": packed.manifest.identity,
        "bundle": packed.manifest.bundle,
        "codec": data.codec,
        "decoded_bytes": data.decoded_bytes,
        "stored_bytes": data.nbytes,
        "classes": [
            {
                "name": row.name,
                "num_tensors": row.num_tensors,
                "num_weights": row.num_weights,
                "decoded_bytes": row.decoded_bytes,
                "stored_bytes": round(row.stored_bytes),
                "bits_per_weight": row.bits_per_weight,
                "limit_bits_per_weight": row.limit_bits_per_weight,
                "raw_bytes": row.raw,
            }
            for row in class_rows(packed.manifest, packed.pieces)
        ],
    }


def _left(row: ClassRow) -> float:
    return row.stored_bytes / row.decoded_bytes if row.decoded_bytes else 1.0
