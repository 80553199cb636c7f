"""Phases of an engine's start, counted from the start of its process."""

from __future__ import annotations

import os
import time

import psutil
import pytest

from pop_node.engine.start_clock import StartClock, made_at


def test_the_start_of_this_process_is_the_one_that_the_kernel_knows() -> None:
    age_s = time.time() - psutil.Process(os.getpid()).create_time()
    # psutil counts from the boot time, which the kernel tells in whole seconds.
    assert time.monotonic() - made_at(os.getpid()) == pytest.approx(age_s, abs=1.5)


def test_phases_count_from_the_start_and_are_ordered_by_their_own() -> None:
    clock = StartClock(100.0)
    clock.add("read", 103.0, 104.5, 4096)
    clock.add("imports", 99.99, 102.0)  # a moment before the start, which is told in ticks
    assert clock.spans() == [("imports", 0.0, 2.0, 0), ("read", 3.0, 4.5, 4096)]
    assert clock.length_s("read") == 1.5
    clock.add("verify", 104.0, 105.0)  # half of it beside the reads
    assert clock.length_s("verify", "read") == 2.0
    assert clock.length_s("bind") == 0.0


def test_a_phase_that_fails_did_not_take_place() -> None:
    clock = StartClock(time.monotonic())
    with clock.phase("setup"):
        pass
    with pytest.raises(OSError, match="no"), clock.phase("load"):
        raise OSError("no")
    assert [name for name, *_ in clock.spans()] == ["setup"]
