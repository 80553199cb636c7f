"""The GPU benchmark without a GPU: its checks of the kernels run, and tell right from wrong."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from kernels.triton.shapes import ModelShape

PATH = Path(__file__).parents[3] / "benchmarks" / "gpu" / "kernel_rates.py"
TINY = ModelShape("tiny", 40, 6, 2, 16, 24, 300)


@pytest.fixture(scope="module")
def rates() -> Iterator[ModuleType]:
    """The script as it imports its neighbours when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PATH.parent))
        yield load()


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernel_rates", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_case_checks_its_kernel(rates: ModuleType) -> None:
    batches = [rates.Batch(2, 1, 40), rates.Batch(1, 20, 30)]
    bench = rates.Bench(TINY, torch.device("cpu"), torch.float32)
    cases = list(bench.cases(batches, [3]))
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        if "bits of" not in case.name:  # the interpreter's products depend on the row
            assert rates.check(case)["right"], case.name
        case.run()
    x = torch.ones(3)
    off = dataclasses.replace(cases[0], exact=False, pairs=lambda: [(x, x), (x + 1e-3, x)])
    assert rates.check(off) == {"right": False, "worst": pytest.approx(49, abs=1), "exact": False}
    nan = dataclasses.replace(off, pairs=lambda: [(x / 0 * 0, x)])
    assert not rates.check(nan)["right"]
    exact = dataclasses.replace(off, exact=True)
    assert rates.check(exact) == {"right": False, "worst": 3, "exact": True}


def test_the_visible_pairs_are_counted(rates: ModuleType) -> None:
    assert rates.Batch(3, 1, 100).visible == 300
    assert rates.Batch(2, 4, 4).visible == 2 * (1 + 2 + 3 + 4)
    assert rates.Batch(1, 2, 10).visible == 9 + 10


def test_the_share_is_of_the_nearer_ceiling(rates: ModuleType) -> None:
    ceilings = rates.Ceilings(copy_bytes_s=4e12, product_flops_s=8e14, launch_s=2e-6)
    case = rates.Case("x", lambda: None, list, 4_000_000_000, 8_000_000_000)
    row = rates.summary(case, [2.0, 2.0, 9.0], ceilings)
    assert row["median_ms"] == pytest.approx(2.0)
    assert row["gigabytes_s"] == pytest.approx(2000)
    assert row["teraflops_s"] == pytest.approx(4)
    assert row["share"] == pytest.approx(0.5)  # 1 ms of bytes, 0.01 ms of FLOPs
    compute = dataclasses.replace(case, flops=1_600_000_000_000)
    assert rates.summary(compute, [4.0], ceilings)["share"] == pytest.approx(0.5)


class CountedEvent:
    """Stands for a device's event: time is the number of calls that were timed."""

    calls = 0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = CountedEvent.calls

    def elapsed_time(self, end: CountedEvent) -> float:
        return float(end.at - self.at)


def test_right_cases_are_timed_call_by_call(
    rates: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", CountedEvent)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for name, small in (("FLUSH_BYTES", 64), ("COPY_BYTES", 64), ("PRODUCT_SIDE", 8)):
        monkeypatch.setattr(rates, name, small)
    noted: dict[str, Any] = {}
    monkeypatch.setattr(rates.Ceilings, "bound_s", lambda self, nbytes, flops: 1e-3)
    # Their own calls are not counted.
    monkeypatch.setattr(rates, "measure_ceilings", lambda *_: rates.Ceilings(4e12, 8e14, 2e-6))

    def run() -> None:
        CountedEvent.calls += 2

    x = torch.ones(3)
    measured = rates.Rates(SimpleNamespace(note=noted.update), torch.device("cpu"))
    assert noted["ceilings"]["copy_bytes_s"] == 4e12
    row = measured.row_of(rates.Case("x", run, lambda: [(x, x)], 1 << 20, 0))
    assert row["samples_ms"] == [2.0] * rates.TIMED_CALLS
    assert (row["right"], row["share"]) == (True, pytest.approx(0.5))
    wrong = measured.row_of(rates.Case("x", run, lambda: [(x + 1, x)], 1 << 20, 0))
    assert "median_ms" not in wrong
    assert CountedEvent.calls == 2 * (rates.WARM_CALLS + rates.TIMED_CALLS)


def test_ceilings_are_of_a_copy_and_a_product(
    rates: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "COPY_BYTES", 4000)
    monkeypatch.setattr(rates, "PRODUCT_SIDE", 10)
    spans = iter(([2.0], [4.0], [5.0]))

    def timed(run: Callable[[], Any], flush: torch.Tensor) -> list[float]:
        run()
        return next(spans)

    monkeypatch.setattr(rates, "times_ms", timed)
    found = rates.measure_ceilings(torch.device("cpu"), torch.zeros(4))
    assert found.copy_bytes_s == pytest.approx(2 * 4000 / 2e-3)
    assert found.product_flops_s == pytest.approx(2 * 10**3 / 4e-3)
    assert found.launch_s == pytest.approx(5e-3)


def test_without_a_device_it_says_so(
    rates: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["kernel_rates.py", "--out", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit) as ended:
        rates.main()
    assert ended.value.code == 2
    assert "needs a CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_a_speedup_is_of_the_same_product(rates: ModuleType) -> None:
    resident = importlib.import_module("resident_rates")
    rows = [
        {"case": "resident qkv 1 x 64 x 8", "median_ms": 2.0},
        {"case": "cuBLAS qkv 1 x 64 x 8", "median_ms": 3.0},
        {"case": "resident qkv 4 x 64 x 8", "median_ms": 2.0},
        {"case": "unpack qkv", "median_ms": 1.0},
        {"case": "cuBLAS qkv 4 x 64 x 8", "right": False},
    ]
    found = resident.speedups(rows)
    assert found == [{"product": "qkv 1 x 64 x 8", "way": "resident", "speedup": 1.5}]
