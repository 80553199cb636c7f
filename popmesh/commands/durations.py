"""Lengths of time as drills take them on the command line."""

from __future__ import annotations

import re

import click

MAX_DURATION_S = 4 * 3600.0
"""Every answer is kept until the end, some 5 KB each: 16 clients fill about a gigabyte in it."""

_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


class Duration(click.ParamType[float]):
    """``90``, ``90s``, ``5m`` or ``1h`` as seconds."""

    name = "duration"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if isinstance(value, float):
            return value
        matched = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", str(value))
        seconds = float(matched[1]) * _SECONDS[matched[2]] if matched else 0.0
        if not 0 < seconds <= MAX_DURATION_S:
            self.fail(f"{value!r} is no time from 1s to {MAX_DURATION_S / 3600:.0f}h", param, ctx)
        return seconds
