"""What was measured of a model's matrices, as a file beside its bundle's: a table per machine.

    ROOT/bundles/DIGEST/weights.json

It is no part of the bundle: no digest covers it, nobody fetches it, and it goes when the bundle
goes. A model without it, or with one that cannot be read, loads plain (``engine.weight_form``).
"""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from pop_node.store.files import place_durably
from pop_node.store.machine import Machine
from pop_node.store.manifest import TABLES_FILE
from pop_node.store.weight_choice import ShapeTimings

VERSION = 1

MAX_TABLES = 16
"""Machines that share a store, with their numbers of threads. Guess; the latest are kept."""

MAX_BYTES = 1 << 20
"""Of the file: 16 tables of ten shapes take 100 kB."""

_log = logging.getLogger(__name__)


class WeightTable(msgspec.Struct, frozen=True):
    """What was measured on one machine."""

    machine: Machine
    shapes: tuple[ShapeTimings, ...]


class _File(msgspec.Struct, frozen=True):
    version: int
    tables: tuple[WeightTable, ...]


def read_tables(bundle: Path) -> tuple[WeightTable, ...]:
    """All of a bundle, the latest last; none where there is no file, or none that means anything,
    which is logged."""
    path = bundle / TABLES_FILE
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        found = msgspec.json.decode(text, type=_File)
        problem = f"over {MAX_BYTES} bytes" if len(text) > MAX_BYTES else _problem(found)
    except FileNotFoundError:
        return ()
    except (OSError, msgspec.DecodeError) as exc:
        problem = str(exc)
    if problem:
        _log.warning("%s is not used: %s; 'popmesh model tune' measures anew", path, problem)
        return ()
    return found.tables


def _problem(file: _File) -> str:
    if file.version != VERSION:
        return f"version {file.version}, not {VERSION}"
    shapes = [shape for table in file.tables for shape in table.shapes]
    timings = [timing for shape in shapes for timing in shape.timings]
    if not all(shape.timings for shape in shapes):
        return "a shape without times"
    if not all(0 < us < float("inf") for one in timings for us in (one.plain_us, one.resident_us)):
        return "times that cannot be"
    return ""


def table_for(bundle: Path, machine: Machine) -> WeightTable | None:
    """What was measured of a bundle on ``machine``."""
    return next((table for table in read_tables(bundle) if table.machine == machine), None)


def write_table(bundle: Path, table: WeightTable, scratch: Path) -> None:
    """Keep ``table`` in place of what is there of its machine, durably; raises ``OSError``.

    ``scratch`` is a directory of the caller's on the same file system.
    """
    others = [other for other in read_tables(bundle) if other.machine != table.machine]
    kept = (*others[1 - MAX_TABLES :], table)
    text = msgspec.json.format(msgspec.json.encode(_File(VERSION, kept)), indent=1) + b"\n"
    place_durably(bundle / TABLES_FILE, text, scratch)
