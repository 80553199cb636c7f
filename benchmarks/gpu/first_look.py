"""The first look at a GPU: what is there, and whether each thing that the engine needs of CUDA
works.

    python benchmarks/gpu/first_look.py --out build/gpu/first_look.json

Versions, the driver's own words, and one row for each of: page-locked memory, page-locking memory
that another process shares, copies beside a stream that computes, events between them, a kernel of
Triton (with the time its first launch takes), a product into float32, and a graph of all of it that
is captured while another thread uses the device, then replayed over new numbers. Last, what a short
kernel costs in a row of them: launched by the host, in a graph, and in a graph where they overlap.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from running import Report, arguments, seconds_of

from kernels.triton.norm import add_rms_norm, rms_norm
from pop_node.engine.running.cuda_device import CudaDevice
from pop_node.kv_stream.staging import Staging, StagingLayout

PACKAGES = ("torch", "triton", "numpy", "transformers", "tokenizers", "safetensors", "msgpack")
ELEMENTS = 1 << 20
LAUNCHES, REPLAYS = 300, 20


def what_is_there() -> dict[str, Any]:
    """Versions, processors, memory, and what the driver says."""
    found: dict[str, Any] = {"python": sys.version, "cores": os.cpu_count()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    try:
        said = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False)
        found["nvidia_smi"] = said.stdout[-3000:]
    except OSError as exc:
        found["nvidia_smi"] = str(exc)
    return found


class Look:
    """Each method is one row: raises, or says whether it was right."""

    def __init__(self) -> None:
        self._where = torch.device("cuda", torch.cuda.current_device())
        self._device = CudaDevice(self._where)

    def page_locked(self) -> dict[str, Any]:
        memory = self._device.page_locked(ELEMENTS)
        return {"right": bool(memory.is_pinned()) and not memory.any()}

    def page_lock_shared(self) -> dict[str, Any]:
        """Of the size that an engine has by default; then a copy there and back."""
        staging = Staging.create(StagingLayout())
        memory = torch.frombuffer(staging.everything(), dtype=torch.uint8)
        began = time.perf_counter()
        self._device.page_lock(memory)
        took_ms = (time.perf_counter() - began) * 1e3
        values = torch.randint(0, 256, (len(memory),), dtype=torch.uint8, device=self._where)
        lane, ready, done = self._device.lane(), self._device.event(), self._device.event()
        ready.record()
        lane.wait(ready)
        lane.copy(memory, values)
        lane.record(done)
        done.synchronize()
        same = torch.equal(memory, values.cpu())
        return {"right": same, "nbytes": len(memory), "page_lock_ms": took_ms}

    def copies_beside(self) -> dict[str, Any]:
        """A copy begins after what computes, and what computes next after it."""
        host = self._device.page_locked(4 * ELEMENTS).view(torch.float32)
        lane, ready, done = self._device.lane(), self._device.event(), self._device.event()
        values = torch.zeros(ELEMENTS, device=self._where)
        right = True
        for turn in range(1, 20):
            torch.cuda._sleep(200_000)
            values.fill_(turn)
            ready.record()
            lane.wait(ready)
            lane.copy(host, values)
            lane.record(done)
            done.wait()
            values.fill_(-1)
            done.synchronize()
            right &= bool((host == turn).all())
        return {"right": right}

    def triton(self) -> dict[str, Any]:
        x, weight = torch.randn(8, 576, device=self._where), torch.ones(576, device=self._where)
        began = time.perf_counter()
        found = rms_norm(x, weight, 1e-5)
        torch.cuda.synchronize()
        first_ms = (time.perf_counter() - began) * 1e3
        expected = x / (x.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
        return {"right": torch.allclose(found, expected, atol=1e-5), "first_launch_ms": first_ms}

    def product(self) -> dict[str, Any]:
        a, b = (torch.randn(32, 64, device=self._where).bfloat16() for _ in range(2))
        found = torch.mm(a, b.T, out_dtype=torch.float32)
        return {"right": torch.allclose(found, a.float() @ b.float().T, atol=1e-3)}

    def graph(self) -> dict[str, Any]:
        """Captured beside a thread that copies, as the thread does that stages KV."""
        x, out = (torch.zeros(4, 576, device=self._where) for _ in range(2))
        weight = torch.randn(576, 576, device=self._where)
        norm = torch.ones(576, device=self._where)
        stop, failed = threading.Event(), []

        def beside() -> None:
            try:
                lane, event = self._device.lane(), self._device.event()
                host = self._device.page_locked(4 * ELEMENTS).view(torch.float32)
                there = torch.zeros(ELEMENTS, device=self._where)
                while not stop.is_set():
                    lane.run(lambda: there.copy_(host.clone(), non_blocking=True))
                    lane.record(event)
                    while not event.query():
                        time.sleep(1e-4)
            except RuntimeError as exc:
                failed.append(str(exc))

        def work() -> None:
            out.copy_(rms_norm(x @ weight, norm, 1e-5))

        thread = threading.Thread(target=beside)
        thread.start()
        try:
            with torch.inference_mode():
                replays = [self._device.capture(work) for _ in range(3)]
        finally:
            stop.set()
            thread.join()
        right = not failed
        for replay in replays:
            x.normal_()
            replay()
            expected = rms_norm(x @ weight, norm, 1e-5)
            right &= torch.allclose(out, expected, atol=1e-5)
        return {"right": right, "failed": failed}

    def launched(self) -> dict[str, Any]:
        """By the host, one after the other: its time, if that is longer than the device's."""
        run = self._row_of_norms(overlap=False)
        run()
        return {"us": self._us(run)}

    def in_a_graph(self) -> dict[str, Any]:
        return {"us": self._us(self._device.capture(self._row_of_norms(overlap=False)))}

    def overlapping(self) -> dict[str, Any]:
        return {"us": self._us(self._device.capture(self._row_of_norms(overlap=True)))}

    def _row_of_norms(self, *, overlap: bool) -> Callable[[], None]:
        x = torch.randn(1, 4096, device=self._where).bfloat16()
        weight = torch.ones(4096, device=self._where).bfloat16()

        def run() -> None:
            for _ in range(LAUNCHES):
                add_rms_norm(x, x, weight, 1e-5, overlap=overlap)

        return run

    @staticmethod
    def _us(run: Callable[[], None]) -> float:
        """Microseconds per launch, of the quickest of some runs."""
        return min(seconds_of(run, dry=False) for _ in range(REPLAYS)) / LAUNCHES * 1e6


def main() -> int:
    given = arguments(__doc__)
    report = Report(__doc__, given)
    report.add({"look": "what is there"}, what_is_there)
    if given.dry:
        print("nothing to look at without a GPU")
        return report.ended()
    look = Look()
    for name in (
        "page_locked",
        "page_lock_shared",
        "copies_beside",
        "triton",
        "product",
        "graph",
        "launched",
        "in_a_graph",
        "overlapping",
    ):
        report.add({"look": name}, getattr(look, name))
    return report.ended()


if __name__ == "__main__":
    sys.exit(main())
