"""Everything a drill has seen, as it comes in; turned into a report at the end. Knows no clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from popmesh.drill.check import FAILURES, Verdict, Window, judge
from popmesh.drill.faults import Order
from popmesh.drill.observation import Observation
from popmesh.drill.report import (
    MAX_GAPS_LISTED,
    MAX_ROWS,
    FaultRow,
    GapRow,
    Rest,
    StreamRow,
)
from popmesh.drill.statistics import SHOWN_GAP_S, FaultSpan, Pause, Quantiles, pause_of, quantiles

DESCRIPTOR_SLACK = 16
"""Descriptors that a process may have gained: connections to peers are made when first needed and
then kept, two or three for each."""

RESIDENT_SLACK_BYTES = 256 * 2**20
"""Resident memory that a process may have gained: allocators keep what the largest batch needed.
Guess: a leak of the size of one answer shows after some thousand answers."""


class Answers:
    """Verdicts, gaps and rows of many answers."""

    def __init__(self) -> None:
        self.verdicts: Counter[str] = Counter()
        self.rows: list[StreamRow] = []
        self.pauses: list[Pause] = []
        self.tokens = 0
        self.resumed = 0
        self._gaps_s: list[float] = []
        self._ttft_s: list[float] = []

    def add(self, seen: Observation, verdict: Verdict, pause: Pause | None) -> None:
        """One answer that is over."""
        self.verdicts[verdict.kind] += 1
        self.tokens += seen.completion_tokens or 0
        self.resumed += any(not loss.refused for loss in seen.losses)
        gaps = seen.gaps()
        if gaps:
            self._ttft_s.append(gaps[0][1])
            self._gaps_s += [length_s for _, length_s in gaps[1:]]
        if pause is not None:
            self.pauses.append(pause)
        if verdict.kind == "right" and len(self.rows) >= MAX_ROWS:
            return
        shown = sorted((gap for gap in gaps if gap[1] >= SHOWN_GAP_S), key=lambda gap: -gap[1])
        self.rows.append(
            StreamRow(
                client=seen.client,
                ask=seen.ask.number,
                request_id=seen.request_id,
                nodes=list(seen.nodes),
                started_s=round(seen.started_s, 4),
                first_s=round(seen.arrivals[0], 4) if seen.arrivals else None,
                ended_s=round(seen.ended_s, 4),
                tokens=seen.completion_tokens,
                attempts=seen.attempts,
                resumed=len(seen.losses),
                verdict=verdict.kind,
                detail=verdict.detail,
                pause_s=None if pause is None else round(pause.length_s, 4),
                gaps=[
                    GapRow(round(start, 4), round(length_s, 4))
                    for start, length_s in sorted(shown[:MAX_GAPS_LISTED])
                ],
            )
        )

    def gaps(self) -> Quantiles:
        """Between texts."""
        return quantiles(self._gaps_s)

    def ttft(self) -> Quantiles:
        """Request sent to first text."""
        return quantiles(self._ttft_s)


class Ledger:
    """Faults and the answers under them; answers are judged when all faults are known."""

    def __init__(self) -> None:
        self._faults: dict[int, FaultRow] = {}
        self.seen: list[Observation] = []

    @property
    def faults(self) -> list[FaultRow]:
        """In the order of the orders."""
        return list(self._faults.values())

    def ordered(self, order: Order, at_s: float) -> None:
        """An order is being carried out."""
        row = FaultRow(order.number, order.fault.name, order.victim, order.stage, round(at_s, 4))
        self._faults[order.number] = row

    def refused(self, number: int, why: str) -> None:
        """It was not."""
        row = self._faults[number]
        row.done, row.problem = False, why

    def recovered(self, number: int, after_s: float) -> None:
        """Its victim is whole again."""
        self._faults[number].after_s = round(after_s, 4)

    def missing(self, number: int, why: str) -> None:
        """Its victim did not come back."""
        self._faults[number].problem = why

    def over(self, seen: Observation) -> None:
        """A client's answer is over."""
        self.seen.append(seen)

    def judged(self, references: dict[int, Observation], end_s: float) -> Answers:
        """All answers, with the pauses laid to their faults."""
        done = [row for row in self._faults.values() if row.done]
        spans = [FaultSpan(row.number, row.victim, row.at_s, _end(row, end_s)) for row in done]
        windows = [
            Window(row.victim, row.at_s, _end(row, end_s))
            for row in done
            if row.fault == "kill-router"
        ]
        answers = Answers()
        for seen in self.seen:
            pause = pause_of(seen, spans)
            if pause is not None:
                row = self._faults[pause.fault]
                row.touched += 1
                row.longest_pause_s = max(row.longest_pause_s, round(pause.length_s, 4))
            answers.add(seen, judge(seen, references[seen.ask.number], windows), pause)
        return answers


def problems(
    answers: Answers, faults: Sequence[FaultRow], before: Rest, after: Rest, exact: bool
) -> list[str]:
    """Why a drill is not passed, in words; empty if it is."""
    found: list[str] = []
    bad = [*FAILURES, "differs"] if exact else list(FAILURES)
    found += [f"{answers.verdicts[kind]} answers {kind}" for kind in bad if answers.verdicts[kind]]
    if not any(row.after_s is not None for row in faults):
        found.append("no fault was done and recovered from")
    found += [
        f"fault {row.number}, {row.fault} of {row.victim}: {row.problem}"
        for row in faults
        if row.done and row.problem
    ]
    found += [f"not at rest afterwards: {text}" for text in after.busy]
    found += leaks(before, after)
    return found


def leaks(before: Rest, after: Rest) -> list[str]:
    """Processes that hold more at rest than before, beyond the slack."""
    found = []
    for name, now in after.processes.items():
        then = before.processes.get(name)
        if then is None:
            continue
        if now.descriptors > then.descriptors + DESCRIPTOR_SLACK:
            found.append(f"{name}: {then.descriptors} descriptors before, {now.descriptors} after")
        if now.resident_bytes > then.resident_bytes + RESIDENT_SLACK_BYTES:
            megabytes = (then.resident_bytes // 10**6, now.resident_bytes // 10**6)
            found.append(f"{name}: {megabytes[0]} MB before, {megabytes[1]} MB after")
    return found


def outages(faults: Iterable[FaultRow]) -> Quantiles:
    """From the blow until the victim was whole again."""
    return quantiles(row.after_s for row in faults if row.after_s is not None)


def _end(row: FaultRow, end_s: float) -> float:
    return end_s if row.after_s is None else row.at_s + row.after_s
