"""Who uses the codec needs no torch; who has no compiler, no C."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from codec_cases import weights

from kernels import codec

USE = """
import sys
from kernels import codec
block = codec.encode(bytes(64), "bfloat16")
codec.decode_into(block, bytearray(codec.decoded_bytes(block)))
print("torch" in sys.modules, "triton" in sys.modules)
"""


def test_using_it_imports_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", USE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_without_a_compiler_the_reference_does_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = weights(5000)
    block = codec.encode(data, "bfloat16")
    codec._codec.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    try:
        with caplog.at_level(logging.WARNING):
            assert codec.encode(data, "bfloat16") == block
        out = bytearray(10_000)
        codec.decode_into(block, out)
    finally:
        codec._codec.cache_clear()
    assert out == data.tobytes()
    assert caplog.text.count("no C compiler on PATH") == 1
