"""Memory that is touched before there is a model for it."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np

from pop_node.store.host_memory import HUGE_PAGE_BYTES
from pop_node.store.spare_memory import SpareMemory

MB = 1 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_it_is_touched_as_far_as_was_said_and_what_is_too_much_goes_back() -> None:
    before = resident_bytes()
    spare = SpareMemory(256 * MB, 128 * MB)
    spare._toucher.join()
    touched = resident_bytes() - before
    assert 120 * MB < touched < 160 * MB
    memory = spare.take(32 * MB - 5)
    assert (memory.size, memory.dtype, memory.ctypes.data % HUGE_PAGE_BYTES) == (
        32 * MB - 5,
        np.uint8,
        0,
    )
    assert resident_bytes() - before < 64 * MB
    assert not memory.any()


def test_a_larger_model_and_a_second_one_get_memory_of_their_own() -> None:
    spare = SpareMemory(4 * MB, 4 * MB)
    assert spare.take(8 * MB).size == 8 * MB
    spare = SpareMemory(4 * MB, 0)
    first, second = spare.take(4 * MB), spare.take(4 * MB)
    first[:] = 1
    assert not second.any()


def test_a_load_does_not_wait_until_all_is_touched() -> None:
    spare = SpareMemory(1024 * MB, 1024 * MB)
    assert spare.take(2 * MB).size == 2 * MB
    assert not spare._toucher.is_alive()


def test_no_model_needs_none() -> None:
    assert SpareMemory(0, 0).take(MB).size == MB
