"""What the GPU benchmarks share of running at all: arguments, where they ran, and reports whose
rows are on the drive as soon as they are known.

On a machine that is lent for minutes, whatever goes wrong has to say what and where: each row names
what it is before it begins, an error keeps its traceback, and what hangs shows its stacks in the
log shortly before it is ended.
"""

from __future__ import annotations

import argparse
import faulthandler
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from common import report  # noqa: E402

T = TypeVar("T")

DEFAULT_LIMIT_S = 500.0

LAST_WORDS_S = 4.0
"""Before the limit: stacks are printed then."""

TRACE_CHARACTERS = 3000
"""Of an error's traceback, its end."""


def arguments(doc: str | None, **choices: list[str]) -> argparse.Namespace:
    """``--out``, ``--dry``, ``--limit`` and an option for each of ``choices``, the first being the
    default; exits with 2 where there is no GPU for a real run."""
    parser = report.command_line(doc)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, interpreted, no GPU")
    parser.add_argument("--limit", type=float, default=DEFAULT_LIMIT_S, help="seconds at most")
    for name, allowed in choices.items():
        parser.add_argument(f"--{name}", choices=allowed, default=allowed[0])
    given = parser.parse_args()
    if not given.dry and not torch.cuda.is_available():
        print("needs a CUDA device", file=sys.stderr)
        raise SystemExit(2)
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(1.0, given.limit - LAST_WORDS_S))
    torch.set_num_threads(1)
    return given


def facts(doc: str | None, dry: bool) -> dict[str, Any]:
    """Where and with what it ran."""
    found = report.facts(doc, ["torch", "triton", "numpy"]) | {"dry": dry}
    if not dry:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {
            "device": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return found


class Report:
    """A benchmark's JSON: facts, what is ``note``d, and ``rows``."""

    def __init__(self, doc: str | None, given: argparse.Namespace) -> None:
        self._dry = given.dry
        self._out = given.out
        self._until = time.monotonic() + given.limit
        self.rows: list[dict[str, Any]] = []
        self._content = facts(doc, given.dry) | {"rows": self.rows}
        self._lost = ""

    def note(self, **what: Any) -> None:
        """Something beside the rows."""
        self._content |= what
        self._save()

    def left_s(self) -> float:
        """Until the limit."""
        return self._until - time.monotonic()

    def add(
        self, key: dict[str, Any], measure: Callable[[], dict[str, Any]], needs_s: float = 0.0
    ) -> dict[str, Any]:
        """Append ``key`` with what ``measure`` gives, or with its error; left out if less than
        ``needs_s`` is left, or the device answers no more."""
        began = time.monotonic()
        print(f"... {key}", flush=True)
        if self._lost or self.left_s() < needs_s:
            row = key | {"left_out": self._lost or "no time was left"}
        else:
            try:
                row = key | measure()
            except Exception as exc:  # noqa: BLE001 - supervisor: recorded, and the next goes on
                row = key | self._failed(exc)
        row["took_s"] = round(time.monotonic() - began, 3)
        self.rows.append(row)
        print({n: v for n, v in row.items() if not isinstance(v, list) and n != "trace"})
        if "error" in row:
            print(row["trace"])
        sys.stdout.flush()
        self._save()
        return row

    def each(self, key: dict[str, Any], values: Iterator[T]) -> Iterator[T]:
        """The ``values`` as far as they can be made; an error is a row with ``key``."""
        while True:
            try:
                value = next(values, None)
            except Exception as exc:  # noqa: BLE001 - supervisor: as in ``add``
                row = key | self._failed(exc)
                self.rows.append(row)
                print(row["trace"], flush=True)
                self._save()
                return
            if value is None:
                return
            yield value

    def _failed(self, exc: Exception) -> dict[str, Any]:
        trace = "".join(traceback.format_exception(exc))[-TRACE_CHARACTERS:]
        self._lost = self._what_is_lost()
        return {"error": f"{type(exc).__name__}: {exc}"[:2000], "trace": trace}

    def ended(self) -> int:
        """The exit code: 0 unless a row has an error, is wrong or was left out for a lost device.
        Call it last."""
        self._save()
        faulthandler.cancel_dump_traceback_later()
        bad = [row for row in self.rows if "error" in row or row.get("right") is False]
        return 1 if bad or self._lost else 0

    def _what_is_lost(self) -> str:
        """After an illegal access nothing runs in this process any more."""
        if self._dry:
            return ""
        try:
            torch.cuda.synchronize()
        except RuntimeError as exc:
            return f"the device answers no more: {exc}"[:300]
        torch.cuda.empty_cache()  # of what ran out of memory
        return ""

    def _save(self) -> None:
        """Whole or not at all, whenever the process is ended."""
        partial = self._out.with_suffix(".partial")
        report.save(_finite(self._content), partial)
        os.replace(partial, self._out)


def _finite(value: Any) -> Any:
    """``value`` with text for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def synchronize(dry: bool) -> None:
    if not dry:
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], Any], dry: bool) -> float:
    """Wall time of ``run`` and of all that it queued."""
    synchronize(dry)
    began = time.perf_counter()
    run()
    synchronize(dry)
    return time.perf_counter() - began


def ceilings(dry: bool) -> dict[str, float]:
    """Of the device, measured: bytes copied per second, read and written, and FLOPs of a large
    bfloat16 product of random numbers."""
    size, side, rounds = (1 << 16, 32, 1) if dry else (4 << 30, 8192, 10)
    device = torch.device("cpu") if dry else torch.device("cuda")
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))

    def best(run: Callable[[], Any]) -> float:
        run()
        return min(seconds_of(lambda: [run() for _ in range(rounds)], dry) for _ in range(3))

    copy_s, product_s = best(lambda: target.copy_(source)), best(lambda: a @ b)
    return {
        "copy_bytes_s": 2 * size * rounds / copy_s,
        "product_flops_s": 2 * side**3 * rounds / product_s,
    }


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of ``expected``; infinity for what is not finite."""
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    return float(error) if math.isfinite(error) else math.inf
