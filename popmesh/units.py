"""Sizes as people write them on a command line."""

from __future__ import annotations

import math
import re

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kMGT])(i?))?B?")


def size_of(text: str) -> float | None:
    """``500GB``, ``1.5 TiB`` or plain bytes, as bytes; None for what is no size."""
    matched = _SIZE.fullmatch(text)
    if matched is None:
        return None
    base = 1024.0 if matched[3] else 1000.0
    power = " kMGT".index(matched[2]) if matched[2] else 0
    return float(matched[1]) * math.pow(base, power)
