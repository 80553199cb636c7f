"""The timeline of a drill as one SVG: a row for each client, a band of faults above them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from popmesh.drill.check import FAILURES
from popmesh.drill.report import FaultRow, StreamRow

ROW_PX, BAR_PX, BAND_PX, LABEL_PX, FOOT_PX = 18, 12, 34, 64, 24

MIN_WIDTH_PX, MIN_PX_PER_S, MAX_PX_PER_S = 1100.0, 4.0, 40.0
"""A minute fills a screen; an hour scrolls, since a gap of a second has to be seen."""

TICK_STEPS_S = (1, 2, 5, 10, 30, 60, 120, 300, 600)
MIN_TICK_PX = 60.0


@dataclass(frozen=True, slots=True)
class _Scale:
    """Seconds on the drill's clock to pixels."""

    begin_s: float
    end_s: float
    px_per_s: float
    clients: int

    @property
    def width(self) -> int:
        return round(LABEL_PX + (self.end_s - self.begin_s) * self.px_per_s + 20)

    @property
    def height(self) -> int:
        return BAND_PX + self.clients * ROW_PX + FOOT_PX

    def x(self, at_s: float) -> float:
        return round(LABEL_PX + (at_s - self.begin_s) * self.px_per_s, 1)

    def bar(self, kind: str, start_s: float, end_s: float, y: int, height: int) -> str:
        """The attributes of a rectangle, visible however short it is."""
        width = max(round((end_s - start_s) * self.px_per_s, 1), 1.0)
        return f'class="{kind}" x="{self.x(start_s)}" y="{y}" width="{width}" height="{height}"'


def timeline(faults: Sequence[FaultRow], answers: Sequence[StreamRow], duration_s: float) -> str:
    """SVG text; colours are the page's, by class."""
    starts = [row.at_s for row in faults] + [row.started_s for row in answers]
    begin_s = min(starts, default=0.0)
    span_s = max(duration_s - begin_s, 1.0)
    scale = _Scale(
        begin_s,
        begin_s + span_s,
        min(max(MIN_WIDTH_PX / span_s, MIN_PX_PER_S), MAX_PX_PER_S),
        max((row.client for row in answers), default=0) + 1,
    )
    parts = [
        f'<svg role="img" aria-label="Timeline of answers and faults" width="{scale.width}" '
        f'height="{scale.height}" viewBox="0 0 {scale.width} {scale.height}">',
        *_axes(scale),
    ]
    done = [fault for fault in faults if fault.done]
    for fault in done:
        parts += _fault(fault, scale)
    parts += _numbers(done, scale)
    for row in answers:
        parts += _answer(row, scale)
    return "\n".join([*parts, "</svg>"])


def _axes(scale: _Scale) -> list[str]:
    parts = [f'<text class="axis" x="0" y="{BAND_PX // 2 + 4}">faults</text>']
    foot = scale.height - FOOT_PX + 8
    step_s = next((s for s in TICK_STEPS_S if s * scale.px_per_s >= MIN_TICK_PX), 3600)
    for number in range(int((scale.end_s - scale.begin_s) // step_s) + 1):
        x = scale.x(scale.begin_s + number * step_s)
        parts.append(f'<line class="tick" x1="{x}" x2="{x}" y1="{BAND_PX}" y2="{foot}"/>')
        parts.append(f'<text class="axis" x="{x}" y="{foot + 12}">{number * step_s} s</text>')
    for client in range(scale.clients):
        y = BAND_PX + client * ROW_PX + BAR_PX - 2
        parts.append(f'<text class="axis" x="0" y="{y}">client {client}</text>')
    return parts


def _fault(fault: FaultRow, scale: _Scale) -> list[str]:
    end_s = scale.end_s if fault.after_s is None else fault.at_s + fault.after_s
    back = "not whole again" if fault.after_s is None else f"whole after {fault.after_s:.1f} s"
    title = f"{fault.number}: {fault.fault} of {fault.victim}, {fault.stage}; {back}"
    kind = "fault" if fault.after_s is not None else "fault bad"
    x, foot = scale.x(fault.at_s), scale.height - FOOT_PX
    return [
        f"<rect {scale.bar(kind, fault.at_s, end_s, 6, BAND_PX - 14)}>"
        f"<title>{escape(title)}</title></rect>",
        f'<line class="blow" x1="{x}" x2="{x}" y1="6" y2="{foot}"/>',
    ]


def _numbers(faults: Sequence[FaultRow], scale: _Scale) -> list[str]:
    """The faults' numbers, those of one moment in one place."""
    labels: dict[int, list[str]] = {}
    for fault in faults:
        labels.setdefault(round(scale.x(fault.at_s)), []).append(str(fault.number))
    return [
        f'<text class="number" x="{x + 2}" y="{BAND_PX - 14}">{", ".join(numbers)}</text>'
        for x, numbers in labels.items()
    ]


def _answer(row: StreamRow, scale: _Scale) -> list[str]:
    y = BAND_PX + row.client * ROW_PX
    kind = "right"
    if row.verdict != "right":
        kind = "bad" if row.verdict in FAILURES else "differs"
    title = (
        f"request {row.ask}: {row.verdict}, {row.tokens} tokens, {row.attempts} attempts, "
        f"{row.ended_s - row.started_s:.2f} s, {' and '.join(row.nodes) or 'nobody'}"
        + (f"; {row.detail}" if row.detail else "")
    )
    parts = [
        f"<g><title>{escape(title)}</title><rect "
        f"{scale.bar(f'answer {kind}', row.started_s, row.ended_s, y, BAR_PX)}/>"
    ]
    for gap in row.gaps:
        touched = row.pause_s is not None and gap.length_s >= row.pause_s - 1e-3
        kind = "gap hit" if touched else "gap"
        end_s = gap.start_s + gap.length_s
        parts.append(f"<rect {scale.bar(kind, gap.start_s, end_s, y + 3, BAR_PX - 6)}/>")
    return [*parts, "</g>"]
