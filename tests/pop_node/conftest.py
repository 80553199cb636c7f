"""Asynchronous tests of this folder run on the loop that agents run on; and a disk to spoil."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import uvloop

from tests.pop_node.disks import mount, unmount


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for one tiny model."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if not mount(disk, "256k"):
        pytest.skip("this user may not mount a file system")
    yield disk
    unmount(disk)
