"""Runs many seeds, on several processes, and says how to repeat one that failed."""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from tests.sim.mutations import MUTATIONS
from tests.sim.world import play

ROOT = Path(__file__).absolute().parents[2]
MAX_SHOWN = 20


def run_range(first: int, count: int, mutation: str | None = None) -> list[str]:
    """Play ``count`` seeds; what went wrong with those that failed, and how to repeat them."""
    again = f" --mutation {mutation}" if mutation else ""
    failures = []
    for seed in range(first, first + count):
        outcome = play(seed)
        if outcome.violations:
            replay = f"replay: python -m tests.sim --seed {seed} --trace{again}"
            failures.append(f"seed {seed}: {'; '.join(outcome.violations)}\n  {replay}")
    return failures


def run_many(first: int, count: int, jobs: int) -> list[str]:
    """Like ``run_range``, on ``jobs`` processes that each take a part."""
    share = -(-count // jobs)
    parts = [(first + at, min(share, first + count - at - first)) for at in range(0, count, share)]
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.sim", "--part", str(start), str(length)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for start, length in parts
    ]
    failures: list[str] = []
    for child, (start, length) in zip(children, parts, strict=True):
        said, _ = child.communicate()
        failures += [line for line in said.replace("\n  replay", "  replay").splitlines() if line]
        if child.returncode not in (0, 1):
            failures.append(f"seeds {start} to {start + length - 1}: exit {child.returncode}")
    return failures


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--schedules", type=int, default=1, help="how many seeds from there on")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--trace", action="store_true", help="print every event of one seed")
    parser.add_argument("--mutation", choices=MUTATIONS, help="break a machine on purpose")
    parser.add_argument("--part", type=int, nargs=2, metavar=("FIRST", "COUNT"))
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)  # what shells report is what was done to them
    with MUTATIONS[args.mutation]() if args.mutation else nullcontext():
        failures = _run(args)
    sys.exit(1 if failures else 0)


def _run(args: argparse.Namespace) -> list[str]:
    started = time.monotonic()
    if args.trace:
        failures = trace(args.seed)
    elif args.part:
        failures = run_range(*args.part)
    elif args.jobs > 1:
        failures = run_many(args.seed, args.schedules, args.jobs)
    else:
        failures = run_range(args.seed, args.schedules, args.mutation)
    for failure in failures if args.part else failures[:MAX_SHOWN]:
        print(failure)
    if not args.part:
        seconds = time.monotonic() - started
        print(f"{args.schedules} schedules in {seconds:.1f} s, {len(failures)} failed")
    return failures


def trace(seed: int) -> list[str]:
    """Play one seed and print every event of it."""
    lines: list[str] = []
    try:
        outcome = play(seed, lines=lines)
    finally:
        print("\n".join(lines))
    print(f"seed {seed}: {outcome.events} events, crc {outcome.crc:08x}")
    return list(outcome.violations)
