"""How many threads engines get."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from topology.cores import engine_threads, usable_cores
from topology.model import Address, Node

NOWHERE = Address("127.0.0.1", 0)


def node(**changes: object) -> Node:
    given = {"name": "n", "site": "fra", "roles": frozenset({"decode"}), "models": ("m",)}
    return Node(**(given | {"mesh": NOWHERE, "kv": NOWHERE} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cores", "engines", "threads"),
    [(1, 1, 1), (2, 1, 2), (2, 4, 1), (8, 3, 2), (96, 1, 96), (4, 0, 4)],
)
def test_engines_share_cores_alike(cores: int, engines: int, threads: int) -> None:
    assert engine_threads(node(), cores, engines) == threads


def test_what_the_operator_says_counts() -> None:
    assert engine_threads(node(threads=7), 2, 4) == 7
    assert engine_threads(node(threads=7, device="cuda"), 2, 4) == 7


def test_a_device_leaves_the_cores_to_others() -> None:
    assert engine_threads(node(device="cuda"), 64, 1) == 1


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up tree of control groups; this process, on eight cores, is in pods/mine."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    group = tmp_path / "cgroup" / "pods" / "mine"
    group.mkdir(parents=True)
    (tmp_path / "own").write_text("0::/pods/mine\n")
    return group


def cores(mine: Path) -> int:
    cgroups = mine.parent.parent
    return usable_cores(cgroups, cgroups.parent / "own")


def test_without_a_quota_all_cores_are_usable(mine: Path) -> None:
    assert cores(mine) == 8
    (mine / "cpu.max").write_text("max 100000\n")
    assert cores(mine) == 8


@pytest.mark.parametrize(
    ("quota", "usable"),
    [("400000 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("9900000 100000", 8)],
)
def test_a_quota_bounds_them(mine: Path, quota: str, usable: int) -> None:
    (mine / "cpu.max").write_text(quota + "\n")
    assert cores(mine) == usable


def test_a_quota_of_a_group_above_bounds_them_too(mine: Path) -> None:
    (mine / "cpu.max").write_text("400000 100000\n")
    (mine.parent / "cpu.max").write_text("300000 100000\n")
    assert cores(mine) == 3


def test_what_is_not_understood_bounds_nothing(mine: Path) -> None:
    (mine / "cpu.max").write_text("a lot\n")
    assert cores(mine) == 8
    own = mine.parent.parent.parent / "own"
    own.write_text("3:cpu:/old\n")  # version 1
    assert cores(mine) == 8
    own.unlink()
    assert cores(mine) == 8


def test_this_machine_has_cores() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
