"""The few things of CUDA that a runner needs beside kernels: copies on streams of their own, events
between streams, page-locked memory, and graphs. Thin: decides nothing.

``Device`` is the seam: tests put a host in its place whose copies come late.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from wire.errors import ConfigError

WARM_RUNS = 2
"""Before a capture: the first compiles and loads kernels and makes handles, none of which may
happen in a capture; the second shows that nothing of that is left to do."""

_cuda: Any = torch.cuda  # whose constructors carry no types


class Event(Protocol):
    """A mark in a stream; without one, of what computes. One that was never set has passed."""

    def record(self) -> None: ...

    def wait(self) -> None:
        """What is computed from here on comes after it. Does not block."""

    def query(self) -> bool: ...

    def synchronize(self) -> None:
        """Block until it has passed."""


class Lane(Protocol):
    """A stream for copies, in order, beside what computes."""

    def run(self, work: Callable[[], None]) -> None:
        """Queue what ``work`` launches."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Begin to copy; host memory has to be page-locked and to stay."""

    def record(self, event: Any) -> None: ...

    def wait(self, event: Any) -> None: ...


class Device(Protocol):
    """Where steps are computed."""

    @property
    def device(self) -> torch.device: ...

    def page_locked(self, nbytes: int) -> torch.Tensor:
        """[nbytes] uint8 of the host."""

    def page_lock(self, memory: torch.Tensor) -> None:
        """Keep ``memory`` of the host, which stays as long as the process, where it is.

        Raises ConfigError: the system does not allow it.
        """

    def lane(self) -> Lane: ...

    def event(self) -> Event: ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """What repeats the launches of ``work``, which is also run, and must do the same on each
        run, in the same memory."""


class CudaLane:
    """See ``Lane``."""

    def __init__(self, device: torch.device) -> None:
        self._stream = _cuda.Stream(device)

    def run(self, work: Callable[[], None]) -> None:
        with _cuda.stream(self._stream):
            work()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with _cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def record(self, event: Any) -> None:
        event.record(self._stream)

    def wait(self, event: Any) -> None:
        event.wait(self._stream)


class CudaDevice:
    """See ``Device``. All graphs share one pool of memory: they never run beside each other."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._capturing = _cuda.Stream(device)
        self._pool = _cuda.graph_pool_handle()

    def page_locked(self, nbytes: int) -> torch.Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)

    def page_lock(self, memory: torch.Tensor) -> None:
        code = int(_cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
        if code:
            raise ConfigError(
                f"{memory.nbytes} bytes cannot be page-locked: CUDA error {code}",
                suggestion="raise the limit of locked memory (ulimit -l)",
            )

    def lane(self) -> CudaLane:
        return CudaLane(self.device)

    def event(self) -> Event:
        event: Event = _cuda.Event()
        return event

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        current = _cuda.current_stream(self.device)
        self._capturing.wait_stream(current)
        with _cuda.stream(self._capturing):
            for _ in range(WARM_RUNS):
                work()
        current.wait_stream(self._capturing)
        graph = _cuda.CUDAGraph()
        # Of this thread alone: the thread that stages KV may query its events meanwhile.
        with (
            _without_collections(),
            _cuda.graph(
                graph, pool=self._pool, stream=self._capturing, capture_error_mode="thread_local"
            ),
        ):
            work()
        replay: Callable[[], None] = graph.replay
        return replay


@contextmanager
def _without_collections() -> Iterator[None]:
    """A collection destroys graphs and kernels that are garbage, which breaks a capture that is
    under way. Source: pytorch, pull request 161037."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
