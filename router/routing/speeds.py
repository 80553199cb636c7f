"""How fast an engine counts for routing: its own measurement, damped towards its equals.

Two nodes of one kind are equally fast until evidence says otherwise: measurements of short prompts
and odd batches scatter by tens of percent, and priced as they come they would send requests across
an ocean to the luckiest node. So with ``r = measured / typical`` (typical: the kind's median)

    |log r| <= B        counts as typical            (B = log SAME_SPEED)
    |log r| <= 2 B      goes over steadily: log r' = 2 (|log r| - B)
    beyond              counts as measured

An engine that has measured nothing yet counts as typical, so a fresh node is not shunned for a
default. Pure.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

from router.routing.view import NodeView, Speed
from wire.messages import EngineLoad

DEFAULT_PREFILL_TOKENS_PER_S = 1000.0
"""Until any engine has measured itself. Measured on 2 CPU cores with a 135M model: about 1,000."""

DEFAULT_STEP_S = 0.030
"""Decode step until measured. Measured on one CPU core with a 135M model: 20-40 ms."""

BATCH_DOUBLING = 8.0
"""Sequences that double a decode step. Guess between a CPU (about 4) and a GPU (64 and more)."""

SAME_SPEED = 1.5
"""Speeds within this factor are the same. Guess: above the scatter between equal nodes on shared
cores, below the step from one generation of hardware to the next."""

_BAND = math.log(SAME_SPEED)


def prefill_rate(engine: EngineLoad, typical: Speed) -> float:
    """Prompt tokens per second of one engine."""
    rate = damped(engine.prefill_tokens_per_s, typical.prefill_tokens_per_s)
    return rate or DEFAULT_PREFILL_TOKENS_PER_S


def base_step_s(engine: EngineLoad, typical: Speed) -> float:
    """Seconds of a decode step before sequences make it longer."""
    measured = damped(_measured_base_s(engine), typical.base_step_s)
    return measured or DEFAULT_STEP_S / (1.0 + 1.0 / BATCH_DOUBLING)


def damped(measured: float, typical: float) -> float:
    """``measured``, or what counts instead of it; 0 when both are unknown (0)."""
    if measured <= 0.0 or typical <= 0.0:
        return max(measured, typical, 0.0)
    away = math.log(measured / typical)
    if abs(away) <= _BAND:
        return typical
    if abs(away) >= 2 * _BAND:
        return measured
    return typical * math.exp(math.copysign(2 * (abs(away) - _BAND), away))


def typical_speeds(nodes: Iterable[NodeView]) -> dict[tuple[str, str], Speed]:
    """Medians by (model, kin) over engines that are ready; of two the lower one."""
    rates: dict[tuple[str, str], list[float]] = {}
    steps: dict[tuple[str, str], list[float]] = {}
    for node in nodes:
        for model, engine in node.engines.items():
            key = (model, node.kin)
            if engine.ready and engine.prefill_tokens_per_s > 0:
                rates.setdefault(key, []).append(engine.prefill_tokens_per_s)
            if engine.ready and engine.decode_step_ms > 0:
                steps.setdefault(key, []).append(_measured_base_s(engine))
    return {key: Speed(_median(rates.get(key)), _median(steps.get(key))) for key in rates | steps}


def _measured_base_s(engine: EngineLoad) -> float:
    """The measured step is of a time when at least one sequence ran, also when none does now."""
    return engine.decode_step_ms / 1e3 / (1.0 + max(1, engine.running) / BATCH_DOUBLING)


def _median(values: list[float] | None) -> float:
    return statistics.median_low(values) if values else 0.0
