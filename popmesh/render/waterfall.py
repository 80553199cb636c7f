"""One cold start as an SVG: a row for each phase, all runs of a page on one scale."""

from __future__ import annotations

from html import escape

from popmesh.drill.cold_start.report import Run
from popmesh.render.cold_start import rate_of

ROW_PX, BAR_PX, LABEL_PX, NOTE_PX, FOOT_PX = 20, 13, 110, 150, 22
WIDTH_PX = 800.0
MIN_TICK_PX = 60.0
TICK_STEPS_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 300, 600)

KINDS = (
    ("process", "--soft", "process and imports"),
    ("bytes", "--right", "the model's bytes"),
    ("compute", "--hit", "kernels and first token"),
    ("mesh", "--fault", "until routers know"),
)
"""Kinds of phase: CSS class, colour of the page, in words."""

_KIND_OF = {
    **dict.fromkeys(("agent", "process_start", "imports", "standby", "setup"), "process"),
    **dict.fromkeys(
        ("fetch", "load", "read", "verify", "decode", "pack", "to_device", "bind"),
        "bytes",
    ),
    **dict.fromkeys(("ready", "in the plan"), "mesh"),
}


def waterfall(run: Run, longest_s: float) -> str:
    """SVG text; colours are the page's, by class. ``longest_s`` fills the width."""
    px_per_s = WIDTH_PX / longest_s if longest_s > 0 else 0.0
    height = len(run.phases) * ROW_PX + FOOT_PX
    width = round(LABEL_PX + WIDTH_PX + NOTE_PX)
    parts = [
        f'<svg role="img" aria-label="Phases of run {run.number}" width="{width}" '
        f'height="{height}" viewBox="0 0 {width} {height}">',
        *_axis(longest_s, px_per_s, height),
    ]
    for number, phase in enumerate(run.phases):
        y = number * ROW_PX
        x = round(LABEL_PX + phase.start_s * px_per_s, 1)
        length_s = phase.end_s - phase.start_s
        bar = max(round(length_s * px_per_s, 1), 1.0)
        kind = _KIND_OF.get(phase.name, "compute")
        note = " ".join(text for text in (f"{length_s:.3f} s", rate_of(phase)) if text)
        name = escape(phase.name)
        parts += [
            f'<text class="label" x="0" y="{y + BAR_PX - 1}">{name}</text>',
            f'<rect class="phase {kind}" x="{x}" y="{y}" width="{bar}" height="{BAR_PX}">'
            f"<title>{name}: {note}</title></rect>",
            f'<text class="axis" x="{x + bar + 4}" y="{y + BAR_PX - 2}">{escape(note)}</text>',
        ]
    return "\n".join([*parts, "</svg>"])


def _axis(longest_s: float, px_per_s: float, height: int) -> list[str]:
    step_s = next((step for step in TICK_STEPS_S if step * px_per_s >= MIN_TICK_PX), 3600.0)
    foot = height - FOOT_PX + 4
    parts = []
    for number in range(int(longest_s // step_s) + 1):
        x = round(LABEL_PX + number * step_s * px_per_s, 1)
        parts.append(f'<line class="tick" x1="{x}" x2="{x}" y1="0" y2="{foot}"/>')
        parts.append(f'<text class="axis" x="{x}" y="{foot + 12}">{number * step_s:g} s</text>')
    return parts
