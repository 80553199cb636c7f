"""How long a model of another size would take to start, from rates that were measured. Pure but
for reading them.

Nothing here is a measurement of that model: it is a calculation, and it says what it assumes.
"""

from __future__ import annotations

import math
import re
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from popmesh.drill.cold_start.report import ColdStartDrill
from popmesh.render.models import size
from popmesh.render.words import counted
from popmesh.units import size_of
from wire.errors import ConfigError

BUDGET_S = 20.0
"""What others promise for a start."""

FIXED_S = 2.5
"""Start without the model's bytes, where no report says it: the aim for a process that imports
torch. Guess."""

MAX_RANKS = 4096


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's bytes on the disk, and over how many ranks they are spread evenly."""

    nbytes: int
    ranks: int

    @property
    def rank_bytes(self) -> int:
        """What each rank reads."""
        return math.ceil(self.nbytes / self.ranks)


@dataclass(frozen=True, slots=True)
class Rates:
    """Measured, or given: bytes per second into the memory of one rank, and the seconds of a start
    that do not depend on the model's size. The texts say where they are from."""

    load_bytes_per_s: float
    load_from: str
    fixed_s: float
    fixed_from: str


class Row(msgspec.Struct, frozen=True):
    """One assumption about the drives: the rate each rank gets, and what follows."""

    drives: str
    rank_bytes_per_s: float
    load_s: float
    total_s: float
    within: bool


class Projection(msgspec.Struct, frozen=True):
    """One shape. ``needed_bytes_per_s``: what each rank has to get so that the start takes
    ``budget_s``; None where the fixed part alone takes longer."""

    nbytes: int
    ranks: int
    rank_bytes: int
    budget_s: float
    fixed_s: float
    rows: list[Row]
    needed_bytes_per_s: float | None
    assumptions: list[str]

    @property
    def passed(self) -> bool:
        """Within the budget, if every rank has drives of its own?"""
        return self.rows[0].within


def parse_shapes(text: str) -> list[Shape]:
    """``560GB@8,218GB@2``; raises ``ConfigError``."""
    found = []
    for part in text.split(","):
        written, _, ranks_text = (piece.strip() for piece in part.partition("@"))
        nbytes = round(size_of(written) or 0)
        ranks = int(ranks_text) if re.fullmatch(r"\d+", ranks_text) else 0
        if nbytes < 1 or not 1 <= ranks <= MAX_RANKS:
            raise _bad(part)
        found.append(Shape(nbytes, ranks))
    return found


def _bad(part: str) -> ConfigError:
    return ConfigError(
        f"{part.strip()!r} is no model shape",
        where="--project",
        suggestion="write BYTES@RANKS, such as 560GB@8 or 218GB@2",
    )


def parse_rate(text: str) -> float:
    """``7GB/s`` as bytes per second; raises ``ConfigError``."""
    rate = size_of(text.strip().removesuffix("/s"))
    if not rate:
        raise ConfigError(f"{text!r} is no rate", where="--rate", suggestion="write 7GB/s")
    return rate


def project(shape: Shape, rates: Rates, budget_s: float) -> Projection:
    """The calculation."""
    left_s = budget_s - rates.fixed_s
    rate = rates.load_bytes_per_s

    def row(drives: str, rank_rate: float) -> Row:
        load_s = shape.rank_bytes / rank_rate
        total_s = rates.fixed_s + load_s
        return Row(drives, rank_rate, load_s, total_s, total_s <= budget_s)

    rows = [row("drives of its own for each rank", rate)]
    if shape.ranks > 1:
        rows.append(row("one drive for all ranks", rate / shape.ranks))
    return Projection(
        nbytes=shape.nbytes,
        ranks=shape.ranks,
        rank_bytes=shape.rank_bytes,
        budget_s=budget_s,
        fixed_s=rates.fixed_s,
        rows=rows,
        needed_bytes_per_s=shape.rank_bytes / left_s if left_s > 0 else None,
        assumptions=_assumptions(shape, rates),
    )


def _assumptions(shape: Shape, rates: Rates) -> list[str]:
    return [
        f"Into memory at {size(round(rates.load_bytes_per_s))}/s for each rank that has drives of "
        f"its own: {rates.load_from}.",
        f"{rates.fixed_s:.2f} s do not depend on the size (process, imports, kernels, first token, "
        f"until routers know): {rates.fixed_from}.",
        f"The {shape.ranks} ranks read at the same time, each only its own share "
        f"({size(shape.rank_bytes)}): bundles are laid out in stripes along the shard axis."
        if shape.ranks > 1
        else "One rank reads all of it.",
        "Verifying, decoding and copying to the device overlap with reading and keep up with it; "
        "a link to the device that is slower than the rate above bounds it instead.",
        "The first token of a larger model takes longer to compute than the one that was measured; "
        "that, and capturing graphs, is not in here.",
        "The drive keeps its rate over the whole of its share, and nothing else uses it.",
    ]


# ---- where the rates come from ------------------------------------------------------------------


def measured_rates(report: Path, benchmark: Path) -> Rates:
    """The rate at which the larger model was loaded, in the newest drill or in the benchmark of
    loading, and what else a start takes from the drill. Raises ``ConfigError`` when there is no
    measurement."""
    drill = _of_report(report) if report.is_file() else None
    loading = _of_benchmark(benchmark) if benchmark.is_file() else None
    known = [one for one in (drill, loading) if one is not None]
    if not known:
        raise ConfigError(
            "no rate has been measured here",
            suggestion="hold a 'popmesh drill cold-start' first, or give one with --rate 7GB/s",
        )
    _, rates = max(known, key=lambda one: one[0])
    if drill is None:
        return rates
    return replace(rates, fixed_s=drill[1].fixed_s, fixed_from=drill[1].fixed_from)


def given_rates(load_bytes_per_s: float, report: Path) -> Rates:
    """A rate that the operator gives; the rest as measured where there is a report."""
    fixed_s, fixed_from = FIXED_S, "assumed, no report at hand"
    if report.is_file():
        _, known = _of_report(report)
        fixed_s, fixed_from = known.fixed_s, known.fixed_from
    return Rates(load_bytes_per_s, "given with --rate", fixed_s, fixed_from)


def _of_report(path: Path) -> tuple[int, Rates]:
    """Bytes of the model, and the rates."""
    try:
        drill = msgspec.json.decode(path.read_bytes(), type=ColdStartDrill)
    except (OSError, msgspec.DecodeError) as exc:
        raise ConfigError(f"is no report of a cold-start drill: {exc}", where=str(path)) from exc
    loads = [(run.bytes_per_s(), run.time_s - run.bytes_s()) for run in drill.runs]
    rates = [rate for rate, _ in loads if rate is not None]
    if not rates:
        raise ConfigError("says of no run how fast it loaded", where=str(path))
    nbytes = drill.runs[-1].bundle_bytes
    where = (
        f"median of {counted(len(drill.runs), 'cold start')} of {drill.model} ({size(nbytes)}) "
        f"on {', '.join(drill.nodes)}"
    )
    return nbytes, Rates(
        load_bytes_per_s=statistics.median(rates),
        load_from=f"{where}, {drill.started}, {path}",
        fixed_s=statistics.median(fixed_s for _, fixed_s in loads),
        fixed_from=f"{where}, {drill.started}, without the time in which its bytes moved",
    )


def _of_benchmark(path: Path) -> tuple[int, Rates]:
    """As ``_of_report``."""
    try:
        said: dict[str, Any] = msgspec.json.decode(path.read_bytes())
        nbytes = int(said["summary"]["model_bytes"])
        rate = float(said["summary"]["gbytes_per_s"]["ours"]) * 1e9
        when = str(said["date"])
    except (OSError, msgspec.DecodeError, KeyError, TypeError, ValueError) as exc:
        raise ConfigError(f"is no result of this benchmark: {exc}", where=str(path)) from exc
    return nbytes, Rates(
        load_bytes_per_s=rate,
        load_from=f"the whole load of a model of {size(nbytes)}, {when}, {path.name}",
        fixed_s=FIXED_S,
        fixed_from="assumed, no report at hand",
    )
