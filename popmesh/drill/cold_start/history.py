"""Earlier runs, one JSON line each, in a file per mesh, model and node; and what got slower.

Only runs of the same kind are compared: the same source, the same coldness, the same bundle.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from popmesh.drill.cold_start.report import ColdStartDrill, Regression, Run

MAX_LINES = 500
"""Lines that are looked at, the newest; some 500 bytes each."""

MIN_EARLIER = 3
"""Earlier runs below which a median says nothing. Guess."""

SLOWER_BY, SLOWER_BY_S = 1.25, 0.2
"""A regression is slower than the earlier median by this factor and by this many seconds. Guess:
five runs on a machine with other work differ by less."""

THRESHOLD = (
    f"a median more than {SLOWER_BY:g} times and {SLOWER_BY_S:g} s above that of at least "
    f"{MIN_EARLIER} earlier runs"
)


class Line(msgspec.Struct, rename={"source": "from"}):
    """One run as it is remembered; ``phases`` are their lengths in seconds."""

    started: str
    source: str
    libraries: bool
    whole: bool
    bundle: str
    bundle_bytes: int
    time_s: float
    phases: dict[str, float]

    @property
    def kind(self) -> tuple[str, bool, bool, str]:
        """Runs of one kind can be compared."""
        return self.source, self.libraries, self.whole, self.bundle


def lines_of(drill: ColdStartDrill) -> dict[str, list[Line]]:
    """The drill's runs by node, in their order."""
    found: dict[str, list[Line]] = defaultdict(list)
    for run in drill.runs:
        found[run.node].append(_line(drill, run))
    return dict(found)


def _line(drill: ColdStartDrill, run: Run) -> Line:
    return Line(
        started=drill.started,
        source=drill.source,
        libraries=drill.libraries,
        whole=drill.whole,
        bundle=run.bundle,
        bundle_bytes=run.bundle_bytes,
        time_s=run.time_s,
        phases={phase.name: run.length_s(phase.name) or 0.0 for phase in run.phases},
    )


def regressions(new: dict[str, list[Line]], earlier: dict[str, list[Line]]) -> list[Regression]:
    """Nodes whose median is beyond the threshold (``THRESHOLD``)."""
    found = []
    for node, lines in new.items():
        before = [line for line in earlier.get(node, []) if line.kind == lines[-1].kind]
        if len(before) < MIN_EARLIER:
            continue
        now_s, then_s = _median(lines), _median(before)
        if now_s <= then_s * SLOWER_BY or now_s <= then_s + SLOWER_BY_S:
            continue
        phase, phase_now_s, phase_then_s = _grown(lines, before)
        found.append(Regression(node, now_s, then_s, len(before), phase, phase_now_s, phase_then_s))
    return found


def _median(lines: Iterable[Line]) -> float:
    return statistics.median(line.time_s for line in lines)


def _grown(now: Sequence[Line], before: Sequence[Line]) -> tuple[str, float, float]:
    """The phase that grew most: its name, its median now and before."""

    def median(lines: Sequence[Line], name: str) -> float:
        return statistics.median(line.phases.get(name, 0.0) for line in lines)

    names = sorted({name for line in now for name in line.phases})
    grown = [(name, median(now, name), median(before, name)) for name in names]
    name, now_s, then_s = max(grown, key=lambda row: row[1] - row[2], default=("", 0.0, 0.0))
    return (name, now_s, then_s) if now_s > then_s else ("", 0.0, 0.0)


# ---- files --------------------------------------------------------------------------------------


def history_file(directory: Path, mesh: str, model: str, node: str) -> Path:
    """Where a node's runs are remembered under a report directory."""
    parts = [_file_name(part) for part in (mesh, model, node)]
    return directory.joinpath("history", parts[0], parts[1], f"{parts[2]}.jsonl")


def read_history(path: Path) -> list[Line]:
    """The newest lines, oldest first; what is no line of ours is skipped, as a drill that was
    killed may have left half of one. Raises ``OSError``."""
    if not path.is_file():
        return []
    found = []
    for text in path.read_bytes().splitlines()[-MAX_LINES:]:
        try:
            found.append(msgspec.json.decode(text, type=Line))
        except msgspec.DecodeError:
            continue
    return found


def append_history(path: Path, lines: Iterable[Line]) -> None:
    """Remember runs; raises ``OSError``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
    with path.open("ab") as file:
        if file.tell() and not path.read_bytes().endswith(b"\n"):
            file.write(b"\n")
        file.write(data)


def _file_name(text: str) -> str:
    """A name as one path component."""
    safe = "".join(char if char.isalnum() or char in "-_." else "_" for char in text)
    return safe if safe.strip(".") else f"_{safe}"
