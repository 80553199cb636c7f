"""Captures, on a CUDA that is faked: it only remembers in which order it was asked for what."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from pop_node.engine.running import cuda_device
from pop_node.engine.running.cuda_device import WARM_RUNS, CudaDevice


class NotedStream:
    def __init__(self, name: object, said: list[str]) -> None:
        self._name, self._said = name, said

    def wait_stream(self, other: NotedStream) -> None:
        self._said.append(f"{self._name} waits for {other._name}")


class NotedGraph:
    def __init__(self, said: list[str]) -> None:
        self._said = said

    def replay(self) -> None:
        self._said.append("replay")


class NotedCuda:
    """In the place of ``torch.cuda``."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.graph_pool_handle = object

    def Stream(self, device: torch.device) -> NotedStream:
        return NotedStream("capturing", self.said)

    def CUDAGraph(self) -> NotedGraph:
        return NotedGraph(self.said)

    def current_stream(self, device: torch.device) -> NotedStream:
        return NotedStream("current", self.said)

    @contextmanager
    def stream(self, stream: NotedStream) -> Iterator[None]:
        self.said.append("warm")
        yield
        self.said.append("warmed")

    @contextmanager
    def graph(self, graph: NotedGraph, **how: Any) -> Iterator[None]:
        assert how["capture_error_mode"] == "thread_local"
        self.said.append("begin")
        try:
            yield
        finally:
            self.said.append("end")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> NotedCuda:
    noted = NotedCuda()
    monkeypatch.setattr(cuda_device, "_cuda", noted)
    return noted


def test_work_is_warm_before_it_is_captured(cuda: NotedCuda) -> None:
    device = CudaDevice(torch.device("cpu"))
    replay = device.capture(lambda: cuda.said.append("work"))
    before = ["capturing waits for current", "warm", *["work"] * WARM_RUNS, "warmed"]
    assert cuda.said == [*before, "current waits for capturing", "begin", "work", "end"]
    replay()
    assert cuda.said[-1] == "replay"


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_collected_while_a_graph_is_captured(cuda: NotedCuda, enabled: bool) -> None:
    found: list[bool] = []

    def work() -> None:
        found.append(gc.isenabled())
        if cuda.said[-1] == "begin":
            raise RuntimeError("no such kernel")

    was = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(RuntimeError, match="no such kernel"):
            CudaDevice(torch.device("cpu")).capture(work)
        after = gc.isenabled()
    finally:
        (gc.enable if was else gc.disable)()
    assert (found, after) == ([enabled] * WARM_RUNS + [False], enabled)
