"""When each part of an engine's start began and ended, counted from the start of its process."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pop_node.store.load_clock import covered

Span = tuple[str, float, float, int]
"""(phase, start_s, end_s, bytes that went through it), as ``messages.Ready`` carries it."""


def made_at(pid: int) -> float:
    """When a process was made, on the monotonic clock, to a tick of the kernel (10 ms); now if it
    is gone. Source: proc(5), stat, field 22."""
    try:  # the command's name, in brackets, may hold anything
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return time.monotonic()
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[22 - 3]) / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - max(0.0, age_s)


class StartClock:
    """Collects phases of one start. Phases may overlap and lie within one another."""

    def __init__(self, process_at: float) -> None:
        self._zero = process_at
        self._spans: list[Span] = []

    def add(self, phase: str, began: float, ended: float, nbytes: int = 0) -> None:
        """A phase that took place between two moments of the monotonic clock."""
        zero = self._zero
        self._spans.append((phase, max(0.0, began - zero), max(0.0, ended - zero), nbytes))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is done inside is a phase, if it succeeds."""
        began = time.monotonic()
        yield
        self.add(name, began, time.monotonic())

    def length_s(self, *names: str) -> float:
        """For how long any phase of these names took place."""
        return covered(
            [(began, ended) for phase, began, ended, _ in self.spans() if phase in names]
        )

    def spans(self) -> list[Span]:
        """All phases so far, by their start."""
        return sorted(self._spans, key=lambda span: span[1])
