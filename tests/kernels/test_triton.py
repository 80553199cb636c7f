"""Triton's kernels without a GPU: in the interpreter, and compiled for sm_90; their availability.

Both run in processes of their own: triton decides when it is imported whether it interprets, and an
access out of bounds ends an interpreter without a word.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.ops import TritonUnavailableError, load_ops
from kernels.triton import available
from pop_node.models.registry import load_backend
from wire.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = ROOT / "tests" / "kernels" / "interpreted"
LIMIT_S = 840
"""Both long tests take a minute or less of processor time, on a machine that may have others."""

pytestmark = pytest.mark.timeout(900)


def run_python(arguments: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    """A Python of this environment in the project's root."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def test_in_the_interpreter_every_kernel_agrees_with_its_reference() -> None:
    done = run_python(
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(INTERPRETED)], TRITON_INTERPRET="1"
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]
    assert " passed" in done.stdout


def test_every_kernel_compiles_for_hopper_without_spills_and_with_tensor_cores(
    tmp_path: Path,
) -> None:
    done = run_python(["-m", "kernels.triton.compiled", "--json"], TRITON_CACHE_DIR=str(tmp_path))
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert report["faults"] == []
    assert done.returncode == 0
    rows = {row["name"]: row for row in report["rows"]}
    assert len(rows) == len(report["rows"])
    assert rows["llama3-8b: attention, prefill"]["gmma"] > 0
    assert rows["llama3-8b: attention, decode"]["hmma"] > 0
    # Loops over K and V wait for no load: their tiles are copied while others are multiplied.
    assert rows["llama3-8b: attention, prefill"]["copies"] > 0
    assert rows["llama3-8b: attention, decode"]["copies"] > 0
    assert not any(row["hmma"] or row["gmma"] for row in rows.values() if "sample" in row["name"])
    # All programs of 4,096 outputs are at work at once: four on each multiprocessor are enough.
    for few in (1, 4):
        assert rows[f"llama3-8b: matmul, {few} x few outputs"]["registers"] <= 128
    # Weights come to the cache while the kernel before still runs: a line for each thread.
    for name in ("few outputs", "gates and ups"):
        assert rows[f"llama3-8b: overlapping, {name}"]["ahead"] == 1
    # A row's sums are the same in tiles of either width only by the same instructions.
    for rows_of_x in (16, 64):
        resident = rows[f"llama3-8b: resident, {rows_of_x} x weights"]
        assert (resident["gmma"], resident["hmma"] > 0, resident["copies"] > 0) == (0, True, True)


def test_a_fault_is_told() -> None:
    # In a process of its own: here triton must not be imported before somebody decides how.
    program = """
import dataclasses
from kernels.triton.compiled import MAX_SHARED_BYTES, Compiled, table

good = Compiled("k", 32, 0, 1024, 4, 0, 8, 4)
assert good.faults("") == good.faults("GMMA") == []
assert good.faults("HMMA") == ["k: no HMMA instructions"]
bad = dataclasses.replace(good, spilled=3, shared_bytes=MAX_SHARED_BYTES + 1, gmma=0, early=-1)
assert len(bad.faults("GMMA")) == 4, bad.faults("GMMA")
assert (good.programs_per_sm, dataclasses.replace(good, registers=168).programs_per_sm) == (16, 3)
assert len(table([good, bad]).splitlines()) == 3
"""
    done = run_python(["-c", program])
    assert done.returncode == 0, done.stderr


def test_windows_and_chunks_of_any_size_run_the_kernels_of_the_table() -> None:
    program = """
from kernels.triton.shapes import LLAMA3_8B, _attention

for queries in (1, 512):
    theirs = _attention(LLAMA3_8B, queries, window=2048)[0]
    for reach in ({"window": 999}, {"chunk": 8192}, {"window": 1024, "chunk": 8192}):
        mine = _attention(LLAMA3_8B, queries, **reach)[0]
        assert mine.kernel is theirs.kernel
        assert mine.constants == theirs.constants, (queries, reach)
        for parameter in mine.kernel.params:
            one, other = (x.arguments.get(parameter.name) for x in (mine, theirs))
            if isinstance(one, int) and not parameter.do_not_specialize:
                assert one == other, (parameter.name, one, other)
"""
    done = run_python(["-c", program])
    assert done.returncode == 0, done.stderr


def test_a_kernel_that_spills_is_seen(tmp_path: Path) -> None:
    program = """
import dataclasses
from kernels.triton import compiled, shapes

(shape,) = [s for s in shapes.shapes() if s.name == "llama3-8b: attention, prefill"]
launch = dataclasses.replace(shape.launch, warps=4)  # half the registers for the same tile
assert compiled.compile_launch("narrowed", launch).faults("GMMA"), "no spill was seen"
"""
    done = run_python(["-c", program], TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_an_overlapping_kernel_that_loads_before_its_turn_is_seen(tmp_path: Path) -> None:
    program = """
import dataclasses
import triton
import triton.language as tl
from kernels.triton import compiled, overlap
from kernels.triton.launch import Launch
from kernels.triton.shapes import _meta

@triton.jit
def hasty(x_ptr, OVERLAP: tl.constexpr = False):
    x = tl.load(x_ptr + tl.arange(0, 32))
    overlap.await_turn(OVERLAP)
    tl.store(x_ptr + tl.arange(0, 32), x + 1)

launch = Launch(hasty, (1,), {"x_ptr": _meta(32)}, {"OVERLAP": True}, warps=1)
assert compiled.compile_launch("hasty", launch).early == 1
alone = dataclasses.replace(launch, constants={})
assert compiled.compile_launch("alone", alone).faults("") == []
"""
    (tmp_path / "hasty.py").write_text(program)
    done = run_python([str(tmp_path / "hasty.py")], TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr


def test_without_a_device_the_backend_is_refused_and_auto_takes_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TritonUnavailableError, match="no CUDA device"):
        load_ops("triton", 1)
    with pytest.raises(ConfigError, match="cannot be used: torch sees no CUDA device"):
        load_backend("triton", 1)
    ops = load_ops("auto", 1)
    assert not ops.name.startswith("triton")
    assert ops.device == torch.device("cpu")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A torch that claims to see an H200."""

    class Facts:
        major, minor, multi_processor_count = 9, 0, 132

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Facts)
    return monkeypatch


def test_a_device_that_is_too_old_is_refused(cuda: pytest.MonkeyPatch) -> None:
    cuda.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(TritonUnavailableError, match="compute capability"):
        available.find_device()


def test_without_triton_the_backend_is_refused(cuda: pytest.MonkeyPatch) -> None:
    cuda.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TritonUnavailableError, match="not installed"):
        available.find_device()


CHOICE = """
import torch
class Facts:
    major, minor, multi_processor_count = 9, 0, 132
torch.cuda.is_available = lambda: True
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_capability = lambda device: (9, 0)
torch.cuda.get_device_properties = lambda device: Facts
from kernels.ops import load_ops
for backend in ("auto", "triton"):
    ops = load_ops(backend, 1)
    assert (ops.name, ops.device) == ("triton/sm_90", torch.device("cuda", 0)), ops.name
ops = load_ops("triton", 1, batch_invariant=True)
assert ops.name == "triton/sm_90+batch_invariant"
assert ops.linear.__self__.dense_linear.__name__ == "invariant_linear"
assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
"""


def test_with_a_device_auto_is_triton() -> None:
    done = run_python(["-c", CHOICE])
    assert done.returncode == 0, done.stderr
