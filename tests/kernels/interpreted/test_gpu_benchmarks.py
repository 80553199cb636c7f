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
# Nor is this project installed there.
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in str(finder)]
sys.meta_path.insert(0, Missing())
"""
NOT_THERE = {"msgspec", "blake3", "consul", "xxhash", "click"}


def test_every_step_runs_with_what_a_gpu_machine_has(tmp_path: Path) -> None:
    hooks = tmp_path / "hooks"
    hooks.mkdir()
    # transformers too: it is compared with where it is installed.
    names = sorted(NOT_THERE | {"transformers"})
    (hooks / "sitecustomize.py").write_text(MISSING.format(names=names))
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, str(GPU / "all.py"), "--out", str(out), "--dry", "--total", "270"],
        env={**os.environ, "PYTHONPATH": str(hooks)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert sorted(path.name for path in out.iterdir()) == ["all.json", "all.log"]
    steps = {step["step"]: step for step in json.loads((out / "all.json").read_text())["steps"]}
    assert [step["ended"] for step in steps.values()] == [0] * 8
    rows = {name: step["report"]["rows"] for name, step in steps.items()}
    assert [row["right"] for row in rows["engine_checks"]] == [True] * 2
    assert all(row["right"] for row in (*rows["kernel_checks"], *rows["resident_rates"]))
    assert any("resident" in row["case"] for row in rows["resident_rates"])
    handed = [row for row in rows["hand_over_checks"] if "kv_bytes" in row]
    assert [row["right"] for row in handed] == [True]
    assert handed[0]["kv_bytes"] == 37 * 2 * 2 * 2 * 8 * 4  # layers, K and V, heads, width, float32
    decoded = [row for row in rows["decode_rates"] if "batch" in row]
    assert all(len(row["replay_s"]) == len(row["step_s"]) == 2 for row in decoded)
    assert {row["batch"] for row in decoded} == {1, 2}


def in_the_scripts_folder(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.path.insert(0, {str(GPU)!r})\n{program}"],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_step_that_fails_or_hangs_stops_no_other(tmp_path: Path) -> None:
    out = tmp_path / "out"
    program = f"""
from pathlib import Path
import all as command
folder = Path({str(tmp_path)!r})
(folder / "fails.py").write_text(
    "import json, sys; rows = [{{'check': 'sums', 'right': False, 'off': 0.5, 'samples': [1]}}]\\n"
    "open(sys.argv[2], 'w').write(json.dumps({{'rows': rows}}))\\n"
    "raise SystemExit('CUDA error: broken')"
)
(folder / "hangs.py").write_text("import time; print('began', flush=True); time.sleep(60)")
(folder / "works.py").write_text("")
command.__file__ = str(folder / "all.py")
command.LEAST_S = 0.0
command.CHECKS = (command.Step("hangs", (), 3), command.Step("fails", (), 30))
command.RATES = (command.Step("works", ("--model", "small"), 30),)
sys.argv = ["all.py", "--out", {str(out)!r}]
raise SystemExit(command.main())
"""
    done = in_the_scripts_folder(program)
    assert done.returncode == 1, done.stderr
    steps = json.loads((out / "all.json").read_text())["steps"]
    # What harmed the device is looked at again, last.
    assert [(step["step"], step["ended"]) for step in steps] == [
        ("hangs", "stopped after 3 s"),
        ("fails", 1),
        ("works small", 0),
        ("fails again", 1),
    ]
    assert "began" in (out / "all.log").read_text()
    assert done.stdout.count("WRONG  check sums, right False, off 0.5\n") == 2


def test_no_step_begins_when_the_time_is_over(tmp_path: Path) -> None:
    program = f"""
import all as command
sys.argv = ["all.py", "--out", {str(tmp_path)!r}, "--total", "1"]
raise SystemExit(command.main())
"""
    assert in_the_scripts_folder(program).returncode == 1
    steps = json.loads((tmp_path / "all.json").read_text())["steps"]
    assert {step["ended"] for step in steps} == {"left out: no time was left"}
    assert len(steps) > 10


def test_a_report_keeps_what_is_known_when_a_row_fails(tmp_path: Path) -> None:
    program = f"""
import argparse, json
from pathlib import Path
import running
out = Path({str(tmp_path / "rows.json")!r})
report = running.Report("What.", argparse.Namespace(dry=True, out=out, limit=50.0))
def bad():
    raise KeyError("no such kernel")
report.add({{"row": 1}}, lambda: {{"value": float("inf")}})
report.add({{"row": 2}}, bad)
assert [row["row"] for row in json.loads(out.read_text())["rows"]] == [1, 2]
report.add({{"row": 3}}, lambda: {{"right": True}}, needs_s=60.0)
report.add({{"row": 4}}, lambda: {{"right": True}})
assert list(report.each({{"part": 5}}, (1 // (2 - number) for number in range(1, 4)))) == [1]
raise SystemExit(report.ended())
"""
    done = in_the_scripts_folder(program)
    assert done.returncode == 1, done.stderr
    first, second, third, fourth, fifth = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert first["value"] == "inf"
    assert "no such kernel" in second["error"]
    assert "in bad" in second["trace"]
    assert third["left_out"] == "no time was left"
    assert fourth["right"]
    assert fifth["part"] == 5
    assert "ZeroDivisionError" in fifth["error"]


def test_the_peer_is_what_people_run() -> None:
    # A rotary table cast to bfloat16 would excuse any error of ours.
    program = """
import torch
from random_llama import TINY, hugging_face
model = hugging_face(TINY, "bfloat16", torch.device("cpu"))
assert {each.dtype for each in model.parameters()} == {torch.bfloat16}
assert {each.dtype for each in model.buffers()} == {torch.float32}
"""
    done = in_the_scripts_folder(program)
    assert done.returncode == 0, done.stderr
