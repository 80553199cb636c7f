"""The file of measurements beside a bundle: kept whole, bounded, and never in a model's way."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import msgspec
import pytest
from tiny_models import write_huggingface

from pop_node.store.machine import Machine, this_machine
from pop_node.store.manifest import TABLES_FILE
from pop_node.store.source import unwatched
from pop_node.store.store import Store
from pop_node.store.weight_choice import ShapeTimings, Timing
from pop_node.store.weight_tables import (
    MAX_TABLES,
    WeightTable,
    read_tables,
    table_for,
)
from wire.errors import ConfigError

SHAPE = ShapeTimings((960, 576), 30, (Timing(1, 20.0, 15.0), Timing(512, 900.0, 905.5)))


def table(threads: int, *shapes: ShapeTimings) -> WeightTable:
    return WeightTable(Machine("one", ("avx2",), threads, 1), shapes or (SHAPE,))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    store.add(str(write_huggingface(tmp_path / "source")), "tiny", "bfloat16", unwatched)
    return store


def test_what_is_kept_is_found_by_its_machine(store: Store) -> None:
    bundle = store.get("tiny").path
    assert read_tables(bundle) == ()
    store.keep_table("tiny", table(1))
    store.keep_table("tiny", table(2))
    other = msgspec.structs.replace(SHAPE, count=7)
    store.keep_table("tiny", table(1, other))
    assert [one.machine.threads for one in read_tables(bundle)] == [2, 1]
    assert table_for(bundle, table(1).machine) == table(1, other)
    for change in ({"products": 2}, {"processor": "two"}, {"instructions": ()}, {"threads": 3}):
        machine = msgspec.structs.replace(table(1).machine, **change)
        assert table_for(bundle, machine) is None


def test_only_so_many_are_kept_the_latest(store: Store) -> None:
    for threads in range(1, MAX_TABLES + 4):
        store.keep_table("tiny", table(threads))
    found = [one.machine.threads for one in read_tables(store.get("tiny").path)]
    assert found == list(range(4, MAX_TABLES + 4))


def damaged() -> list[bytes]:
    whole = {"version": 1, "tables": [msgspec.to_builtins(table(1))]}

    def changed(**times: float) -> bytes:
        wrong = json.loads(json.dumps(whole))
        wrong["tables"][0]["shapes"][0]["timings"][0] |= times
        return json.dumps(wrong).encode()

    empty = json.loads(json.dumps(whole))
    empty["tables"][0]["shapes"][0]["timings"] = []
    return [
        b"",
        b"\xff\x00",
        json.dumps(whole).encode()[:-9],
        json.dumps(whole | {"version": 2}).encode(),
        json.dumps({"version": 1, "tables": 5}).encode(),
        changed(plain_us=0.0),
        changed(resident_us=-3.0),
        json.dumps(empty).encode(),
        json.dumps(whole).encode() + b" " * (1 << 20),
    ]


@pytest.mark.parametrize("text", damaged())
def test_a_damaged_file_is_as_none_and_says_so(
    store: Store, text: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = store.get("tiny").path
    (bundle / TABLES_FILE).write_bytes(text)
    with caplog.at_level(logging.WARNING):
        assert table_for(bundle, table(1).machine) is None
    (line,) = caplog.messages
    assert TABLES_FILE in line
    assert "popmesh model tune" in line
    store.verify("tiny")
    store.keep_table("tiny", table(1))
    assert table_for(bundle, table(1).machine) == table(1)


def test_it_is_no_part_of_the_bundle_and_goes_with_it(store: Store) -> None:
    before = store.get("tiny")
    store.keep_table("tiny", table(1))
    assert store.get("tiny").manifest == before.manifest
    store.verify("tiny")
    assert store.gc().freed_bytes == 0
    assert table_for(before.path, table(1).machine) is not None
    store.remove("tiny")
    assert not before.path.exists()
    with pytest.raises(ConfigError, match="no model tiny"):
        store.keep_table("tiny", table(1))


def test_a_machine_is_what_the_system_says(tmp_path: Path) -> None:
    text = (
        "processor\t: 0\nmodel name\t: AMD EPYC\ncpu family\t: 26\nmodel\t\t: 2\nstepping\t: 1\n"
        "flags\t\t: fpu avx2 avx512bw avx512_bf16\n\nprocessor\t: 1\nmodel name\t: other\n"
    )
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    found = this_machine(3, path)
    assert found.processor == "AMD EPYC 26 2 1"
    assert (found.instructions, found.threads) == (("avx2", "avx512bw", "avx512_bf16"), 3)
    assert this_machine(1, tmp_path / "none").instructions == ()
