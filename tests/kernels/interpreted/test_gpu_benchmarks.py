"""The command for GPU machines without one: every part runs, with what such machines have.

Streams and graphs are the tests' fakes there; nothing is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
GPU = ROOT / "benchmarks" / "gpu"

MISSING = """
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
"""
NOT_THERE = {"msgspec", "blake3", "aiohttp", "uvloop", "consul", "msgpack", "xxhash", "click"}


def test_every_part_runs_with_torch_triton_numpy_safetensors_and_tokenizers_alone(
    tmp_path: Path,
) -> None:
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    # transformers too: it is compared with where it is installed.
    names = sorted(NOT_THERE | {"transformers"})
    (hooks / "sitecustomize.py").write_text(MISSING.format(names=names))
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, str(GPU / "all.py"), "--out", str(out), "--dry"],
        env={**os.environ, "PYTHONPATH": str(hooks)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    parts = json.loads((out / "all.json").read_text())["parts"]
    assert [part["ended"] for part in parts] == [0] * 4
    checks = json.loads((out / "engine_checks.json").read_text())["checks"]
    assert [check["right"] for check in checks] == [True] * 2
    rates = json.loads((out / "decode_rates.json").read_text())["rows"]
    assert not [row for row in rates if "error" in row]
    decoded = [row for row in rates if "batch" in row]
    assert all(len(row["replay_s"]) == len(row["step_s"]) == 2 for row in decoded)
    assert {row["batch"] for row in decoded} == {1, 2}


def test_a_part_that_fails_or_hangs_stops_no_other(tmp_path: Path) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(GPU)!r})
from pathlib import Path
import all as command
folder = Path({str(tmp_path)!r})
(folder / "fails.py").write_text("raise SystemExit('broken')")
(folder / "hangs.py").write_text("import time; print('began', flush=True); time.sleep(60)")
(folder / "works.py").write_text("")
command.__file__ = str(folder / "all.py")
command.PARTS = (("fails", 30), ("hangs", 3), ("works", 30))
sys.argv = ["all.py", "--out", str(folder / "out")]
raise SystemExit(command.main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 1, done.stderr
    parts = json.loads((tmp_path / "out" / "all.json").read_text())["parts"]
    assert [part["ended"] for part in parts] == [1, "stopped after 3 s", 0]
