"""Everything that is checked and measured on a GPU, in one command of less than nine minutes.

    python benchmarks/gpu/all.py --out build/gpu          # --dry: tiny, interpreted, without a GPU

Each step is a process of its own with its own time, so one that fails or hangs costs the others
nothing. Checks come first, side by side, since most of their time goes into compiling; then what is
timed, alone. A check that broke a device's memory is run again at the end, if there is time, with
launches that wait for their kernels, so that the traceback says which it was.

Writes DIR/all.json, after each step anew: how it ended, how long it took and its own report,
whatever it had got to; and DIR/all.log, what they printed. Ends with 1 if one did not end well.

Needs torch, triton, numpy, safetensors and tokenizers; transformers, where it is installed, is
compared with.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from common import report  # noqa: E402

TOTAL_S = 515.0
"""For all steps: a machine is lent for ten minutes at a time, and the rest is for its start."""

LEAST_S = 15.0
"""A step that could have no more is left out. Guess: imports and the first kernels."""

KILL_WAIT_S = 5.0

SHOWN, SHOWN_OF_FAULTY = 800, 4000
"""Characters of a step's output that are printed, its end; all of it is in DIR/all.log."""

KEPT = 200_000
"""Characters of a step's output in DIR/all.log, its end."""

BROKEN = ("CUDA error", "illegal memory access", "device-side assert", "misaligned address")
"""In the output of a step that may have harmed the device's memory."""


RATES_OF_ROWS = {"tokens_s", "flops_s", "bytes_s", "us"}
"""Rows with one of them are printed at the end: the others are too many."""


@dataclass(frozen=True)
class Step:
    """``script`` beside this one with ``arguments``, and the seconds that it may take."""

    script: str
    arguments: tuple[str, ...]
    limit_s: float
    again: bool = False

    @property
    def name(self) -> str:
        """Script and the values of its options."""
        words = [self.script, *self.arguments[1::2], *(["again"] if self.again else [])]
        return " ".join(words)


CHECKS = (
    Step("first_look", (), 60),
    Step("kernel_checks", ("--model", "smollm2-135m", "--dtype", "bfloat16"), 120),
    Step("kernel_checks", ("--model", "llama3-8b", "--dtype", "bfloat16"), 120),
    Step("kernel_checks", ("--model", "smollm2-135m", "--dtype", "float32"), 120),
    Step("kernel_checks", ("--model", "llama3-8b", "--dtype", "float32"), 120),
    Step("engine_checks", ("--dtype", "float32"), 140),
    Step("engine_checks", ("--dtype", "bfloat16"), 140),
    Step("hand_over_checks", (), 120),
)

RATES = (
    Step("decode_rates", ("--model", "llama3-8b", "--engine", "popmesh"), 130),
    Step("resident_rates", (), 60),
    Step("decode_rates", ("--model", "llama3-8b", "--form", "resident"), 60),
    Step("kernel_rates", (), 110),
    Step("decode_rates", ("--model", "smollm2-135m", "--engine", "popmesh"), 60),
    Step("decode_rates", ("--model", "llama3-8b", "--engine", "transformers"), 50),
    Step("decode_rates", ("--model", "smollm2-135m", "--engine", "transformers"), 40),
    Step("load_rates", (), 45),
)

DRY_CHECKS = (
    Step("first_look", (), 60),
    Step("kernel_checks", (), 120),
    Step("engine_checks", (), 120),
    Step("hand_over_checks", (), 120),
)
DRY_RATES = (
    Step("decode_rates", (), 120),
    Step("resident_rates", (), 60),
    Step("kernel_rates", (), 60),
    Step("load_rates", (), 60),
)


class Running:
    """A step's process, in a session of its own: what it starts is ended with it."""

    def __init__(self, step: Step, limit_s: float, folder: Path, dry: bool) -> None:
        self.step = step
        self._began = time.monotonic()
        self._limit_s = limit_s
        self._report = folder / f"{step.name.replace(' ', '-')}.json"
        self._log = self._report.with_suffix(".log")
        command = [sys.executable, str(Path(__file__).with_name(f"{step.script}.py"))]
        command += [*step.arguments, "--out", str(self._report), "--limit", str(limit_s)]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        if dry:
            command.append("--dry")
            environment["TRITON_INTERPRET"] = "1"
        if step.again:
            environment["CUDA_LAUNCH_BLOCKING"] = "1"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )

    def end(self) -> dict[str, Any]:
        """Wait for it, at most for its time. ``ended`` is its exit code, or says why there is
        none."""
        ended: int | str
        try:
            left_s = self._began + self._limit_s - time.monotonic()
            ended = self._process.wait(max(0.0, left_s))
        except subprocess.TimeoutExpired:
            ended = f"stopped after {self._limit_s:.0f} s"
            self.kill()
        return {
            "step": self.step.name,
            "ended": ended,
            "seconds": round(time.monotonic() - self._began, 1),
            "report": self._reported(),
        }

    def kill(self) -> None:
        """End it and what it started; one that sleeps in a driver is left behind."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(KILL_WAIT_S)

    def output(self) -> str:
        """What it printed."""
        return self._log.read_text(errors="replace")

    def _reported(self) -> Any:
        try:
            return json.loads(self._report.read_text())
        except (OSError, ValueError) as exc:
            return f"none: {exc}"


class All:
    """Runs steps and keeps the whole report."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self._dry: bool = given.dry
        self._out: Path = given.out
        self._folder = folder
        self._until = time.monotonic() + given.total
        self._steps: list[dict[str, Any]] = []
        self._under_way: list[Running] = []
        self._broken: list[Step] = []
        self._facts = report.facts(__doc__, ["torch", "triton", "numpy"]) | {"dry": given.dry}
        self._out.mkdir(parents=True, exist_ok=True)
        (self._out / "all.log").write_text("")

    def together(self, steps: tuple[Step, ...]) -> None:
        """Run them side by side."""
        for step in steps:
            self._begin(step)
        self._end()

    def alone(self, steps: tuple[Step, ...]) -> None:
        """Run one after the other."""
        for step in steps:
            self._begin(step)
            self._end()

    def again(self) -> None:
        """Those that broke something, one by one."""
        steps = tuple(
            Step(each.script, each.arguments, each.limit_s, again=True) for each in self._broken
        )
        self.alone(steps)

    def kill(self) -> None:
        """End all that runs."""
        for running in self._under_way:
            running.kill()

    def right(self) -> bool:
        """Whether every step ended well."""
        return all(step["ended"] == 0 for step in self._steps)

    def _begin(self, step: Step) -> None:
        limit_s = min(step.limit_s, self._until - time.monotonic())
        if limit_s < LEAST_S:
            self._note({"step": step.name, "ended": "left out: no time was left"}, "")
            return
        self._under_way.append(Running(step, limit_s, self._folder, self._dry))

    def _end(self) -> None:
        while self._under_way:
            running = self._under_way[0]
            found = running.end()
            output = running.output()
            self._under_way.pop(0)
            broke = found["ended"] != 0 and any(words in output for words in BROKEN)
            if broke and not running.step.again:
                self._broken.append(running.step)
            self._note(found, output)

    def _note(self, found: dict[str, Any], output: str) -> None:
        self._steps.append(found)
        shown = {name: value for name, value in found.items() if name != "report"}
        end = SHOWN if found["ended"] == 0 else SHOWN_OF_FAULTY
        print(f"== {shown}\n{output[-end:]}", flush=True)
        with (self._out / "all.log").open("a") as log:
            log.write(f"== {shown}\n{output[-KEPT:]}\n")
        partial = self._out / "all.partial"
        report.save(self._facts | {"steps": self._steps}, partial)
        os.replace(partial, self._out / "all.json")

    def sum_up(self) -> None:
        """Print a line for each step, last of all, and below it what was wrong or how fast."""
        for step in self._steps:
            print(f"{step.get('seconds', 0.0):6.1f} s  {step['ended']!s:<28} {step['step']}")
            rows = step["report"]["rows"] if isinstance(step.get("report"), dict) else []
            for row in rows:
                wrong = "error" in row or row.get("right") is False
                if wrong or RATES_OF_ROWS & row.keys():
                    print(f"{'WRONG' if wrong else '':>10}  {brief(row)}")


def brief(row: dict[str, Any]) -> str:
    """A row of a report on one line: without lists and tracebacks, in few digits."""
    shown = []
    for name, value in row.items():
        if not isinstance(value, list) and name != "trace":
            shown.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(shown)[:300]


def main() -> int:
    parser = report.command_line(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, interpreted, no GPU")
    parser.add_argument("--total", type=float, default=TOTAL_S, help="seconds for all steps")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="popmesh-gpu-") as folder:
        everything = All(given, Path(folder))
        try:
            everything.together(DRY_CHECKS if given.dry else CHECKS)
            everything.alone(DRY_RATES if given.dry else RATES)
            everything.again()
        finally:
            everything.kill()
        everything.sum_up()
    return 0 if everything.right() else 1


if __name__ == "__main__":
    sys.exit(main())
