"""The models of a store as text: a table, one model in full, what a collection removed."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Column, Table

from popmesh.render.words import counted, name_column

if TYPE_CHECKING:
    from pop_node.store.store import Collected, Row

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_AGES = ((86400, "d"), (3600, "h"), (60, "min"))
BAR_CELLS = 20

WIDE = 130
"""Columns of a terminal from which on a bar and the sources fit beside the rest."""


def size(nbytes: int) -> str:
    """``269 MB``: decimal units, three digits."""
    value, unit = float(nbytes), 0
    while value >= 999.5 and unit + 1 < len(_UNITS):
        value, unit = value / 1000, unit + 1
    return f"{value:.3g} {_UNITS[unit]}"


def age(used_ns: int, now_s: float) -> str:
    """``3 h ago``; ``now_s`` in seconds since 1970."""
    seconds = max(0.0, now_s - used_ns / 1e9)
    for length, unit in _AGES:
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"


def state(row: Row) -> str:
    """What keeps it or what is wrong with it, in a word or two."""
    facts = {
        "pinned": row.entry.pinned,
        "loaded": row.loaded,
        "unusable": row.manifest is None,
    }
    return ", ".join(word for word, is_so in facts.items() if is_so) or "on disk"


def stored_as(row: Row) -> str:
    """``raw``, or ``packed from`` the bytes that it decodes to."""
    if row.manifest is None:
        return "-"
    data = row.manifest.data
    if data.packing is None:
        return "raw"
    return f"packed from {size(data.decoded_bytes)}"


def models_table(rows: Sequence[Row], now_s: float, width: int) -> Table:
    """One line per model; in a terminal of ``width`` columns that is wide, with its source and a
    bar of its share of the store."""
    is_wide = width >= WIDE
    stored = sum({row.entry.bundle: row.nbytes for row in rows}.values())
    table = Table(
        name_column("Name"),
        Column("Size", justify="right", no_wrap=True),
        *([Column("", no_wrap=True)] if is_wide else []),
        Column("Dtype", no_wrap=True),
        *("Stored", "State", "Used"),
        Column("Digest", no_wrap=True),
        *([name_column("Source")] if is_wide else []),
        caption=f"{size(stored)} in {len(rows)} models; 'popmesh model show NAME' tells all of one",
    )
    largest = max((row.nbytes for row in rows), default=0) or 1
    for row in rows:
        table.add_row(
            row.name,
            size(row.nbytes),
            *(["█" * max(1, round(row.nbytes / largest * BAR_CELLS))] if is_wide else []),
            row.entry.dtype,
            stored_as(row),
            state(row),
            age(row.used_ns, now_s),
            row.manifest.identity[:12] if row.manifest else "-",
            *([row.entry.source] if is_wide else []),
        )
    return table


def models_lines(rows: Iterable[Row]) -> list[str]:
    """For pipes: name, dtype, identity, source, bytes, state; separated by tabs."""
    return [
        "\t".join(
            (
                row.name,
                row.entry.dtype,
                row.manifest.identity if row.manifest else "-",
                row.entry.source,
                str(row.nbytes),
                state(row),
            )
        )
        for row in rows
    ]


def model_lines(row: Row) -> list[str]:
    """Everything about one model, one fact per line."""
    return [f"{name:16} {value}" for name, value in _facts(row)]


def _facts(row: Row) -> Iterable[tuple[str, str]]:
    yield "name", row.name
    yield "state", state(row)
    yield "added from", row.entry.source
    yield "last used", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row.used_ns / 1e9))
    yield "on disk", f"{size(row.nbytes)} ({row.nbytes} bytes)"
    manifest = row.manifest
    if manifest is None:
        yield "problem", row.problem
        return
    yield "digest to pin", manifest.identity
    yield "bundle", manifest.bundle
    yield "dtype, codec", f"{manifest.dtype}, {manifest.data.codec}"
    if manifest.data.packing is not None:
        decoded = manifest.data.decoded_bytes
        yield "packed", f"{size(manifest.data.nbytes)} of weights that decode to {size(decoded)}"
    yield "licence", manifest.licence or "not stated"
    yield "origin", manifest.source
    yield "context", f"{manifest.context_tokens} tokens"
    kv = manifest.kv
    width = 2 if manifest.dtype == "bfloat16" else 4
    per_token = 2 * kv.layers * kv.kv_heads * kv.head_dim * width
    yield "KV cache", f"{size(per_token)} per token ({kv.layers} layers, {kv.kv_heads} heads)"
    chunk = size(manifest.data.chunk_bytes)
    yield (
        "weights",
        f"{len(manifest.tensors)} tensors, {len(manifest.data.chunks)} chunks of {chunk}",
    )
    degrees = [n for n in range(1, manifest.stripes + 1) if manifest.stripes % n == 0]
    yield "tensor parallel", f"degrees {', '.join(map(str, degrees))}"
    yield "files", ", ".join(f"{entry.name} ({size(entry.nbytes)})" for entry in manifest.files)
    yield "created by", manifest.created_by


def collected_lines(collected: Collected) -> list[str]:
    """What is gone and what is left."""
    lines = [
        f"removed {', '.join(bundle.names) or bundle.bundle[:12]} ({size(bundle.nbytes)})"
        for bundle in collected.bundles
    ]
    if collected.num_partials:
        lines.append(f"removed {counted(collected.num_partials, 'abandoned download')}")
    lines.append(f"freed {size(collected.freed_bytes)}, {size(collected.kept_bytes)} are in use")
    return lines


def row_json(row: Row, *, full: bool) -> dict[str, Any]:
    """For programs; ``full`` adds the manifest but for its tables of tensors and chunks."""
    facts: dict[str, Any] = {
        "name": row.name,
        "dtype": row.entry.dtype,
        "identity": row.manifest.identity if row.manifest else None,
        "bundle": row.entry.bundle,
        "source": row.entry.source,
        "nbytes": row.nbytes,
        "codec": row.manifest.data.codec if row.manifest else None,
        "decoded_bytes": row.manifest.data.decoded_bytes if row.manifest else None,
        "pinned": row.entry.pinned,
        "loaded": row.loaded,
        "used_s": row.used_ns / 1e9,
        "problem": row.problem or None,
    }
    if full and (manifest := row.manifest):
        facts |= {
            "format_version": manifest.format_version,
            "stripes": manifest.stripes,
            "num_tensors": len(manifest.tensors),
            "num_chunks": len(manifest.data.chunks),
            "chunk_bytes": manifest.data.chunk_bytes,
            "data_bytes": manifest.data.nbytes,
            "files": {entry.name: entry.nbytes for entry in manifest.files},
            "licence": manifest.licence,
            "origin": manifest.source,
            "context_tokens": manifest.context_tokens,
            "kv": {
                "layers": manifest.kv.layers,
                "kv_heads": manifest.kv.kv_heads,
                "head_dim": manifest.kv.head_dim,
            },
            "created_by": manifest.created_by,
        }
    return facts


def collected_json(collected: Collected) -> dict[str, Any]:
    """For programs."""
    return {
        "removed": [
            {"bundle": b.bundle, "names": list(b.names), "nbytes": b.nbytes}
            for b in collected.bundles
        ],
        "num_partials": collected.num_partials,
        "freed_bytes": collected.freed_bytes,
        "kept_bytes": collected.kept_bytes,
    }
