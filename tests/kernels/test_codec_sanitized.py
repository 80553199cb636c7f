"""The codec's C under the address and undefined-behaviour sanitizers, on damaged blocks."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from kernels.native.build import SOURCE_FOLDER, find_compiler

SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
ROUNDS = 2000
"""Of 21 blocks each; thirty thousand of them were run before the format was settled."""


def built(folder: Path) -> Path:
    """``codec_fuzz.c`` with the sources of the codec."""
    program = folder / "codec_fuzz"
    sources = [*sorted(SOURCE_FOLDER.glob("codec/*.c")), SOURCE_FOLDER / "pool.c"]
    command = [*find_compiler(), "-std=gnu11", "-O1", "-g", "-ffp-contract=off", *SANITIZE]
    command += ["-fno-strict-aliasing", "-pthread", f"-I{SOURCE_FOLDER}"]
    command += [str(Path(__file__).parent / "codec_fuzz.c"), *map(str, sources)]
    done = subprocess.run(
        [*command, "-lm", "-o", str(program)], capture_output=True, text=True, check=False
    )
    if done.returncode and "cannot find" in done.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert done.returncode == 0, done.stderr
    return program


def test_damage_is_noticed_and_nothing_outside_is_touched(tmp_path: Path) -> None:
    program = built(tmp_path)
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [program, "20261121", str(ROUNDS)],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    refused, decoded = (int(word) for word in done.stdout.split() if word.isdigit())
    assert refused > 10 * ROUNDS
    assert decoded > ROUNDS
