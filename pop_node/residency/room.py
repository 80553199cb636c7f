"""Who makes room for a model, and why nobody can. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from pop_node.residency.events import Refuse
from pop_node.residency.state import ModelState

BUSY_S = 5.0
"""Retry-After when memory is taken by models with legs. Guess: an answer of average length."""


def committed_bytes(models: Iterable[ModelState]) -> int:
    """Memory of models that have a place or were promised one."""
    return sum(m.memory_bytes for m in models if m.is_committed)


def find_room(
    models: Iterable[ModelState], model: ModelState, budget: int | None, now: float
) -> list[ModelState] | None:
    """Who has to leave so that ``model`` fits ``budget`` bytes; None when that is not enough.

    The least recently used leave first, and none of them without need.
    """
    if budget is None:
        return []
    models = list(models)
    lacking = committed_bytes(models) + model.memory_bytes - budget
    victims: list[ModelState] = []
    for candidate in sorted((m for m in models if m.may_leave(now)), key=lambda m: m.used_at):
        if lacking <= 0:
            break
        victims.append(candidate)
        lacking -= candidate.memory_bytes
    if lacking > 0:
        return None
    for victim in reversed(victims[:-1]):
        if lacking + victim.memory_bytes <= 0:
            victims.remove(victim)
            lacking += victim.memory_bytes
    return victims


def memory_ahead(models: Iterable[ModelState], budget: int | None) -> tuple[int, int]:
    """(Bytes of the largest weights that may be loaded next, how much of them is free now).

    A load that needs more than is free waits for others to leave, and takes what they had.
    """
    models = list(models)
    coming = (m for m in models if m.disk == "here" and not m.is_committed)
    largest = max((m.load_bytes for m in coming), default=0)
    free = largest if budget is None else max(0, budget - committed_bytes(models))
    return largest, min(largest, free)


def why_not(
    models: Iterable[ModelState],
    model: ModelState,
    budget: int | None,
    now: float,
    bytes_per_s: float,
) -> Refuse | None:
    """Why a model cannot come to memory now; None when it can, or is there.

    ``bytes_per_s``: measured rate of loads on this node, 0 if there was none.
    """
    if model.barred:
        return Refuse(model.name, f"a drill has {model.name}", BUSY_S)
    if model.is_committed:
        return None
    if model.retry_at > now:
        return Refuse(model.name, model.why_failed, model.retry_at - now)
    if model.disk == "absent" and not model.fetchable:
        why = f"{model.name} is not on this node's disk, and there is nowhere to fetch it from"
        return Refuse(model.name, why, 0.0)
    models = list(models)
    if budget is None or model.disk != "here":
        return None  # what comes from elsewhere looks for room when it is here
    if find_room(models, model, budget, now) is not None:
        return None
    return _full(models, model, budget, now, bytes_per_s)


def _full(
    models: Iterable[ModelState], model: ModelState, budget: int, now: float, bytes_per_s: float
) -> Refuse:
    """What to say where ``find_room`` found none, with the time after which that may change."""
    others = [m for m in models if m.is_committed and m is not model]
    pinned = sum(m.memory_bytes for m in others if m.pinned)
    need, have = model.memory_bytes / 1e9, budget / 1e9
    if model.memory_bytes > budget - pinned:
        why = f"{model.name} takes {need:.1f} GB, {have - pinned / 1e9:.1f} GB are not pinned"
        return Refuse(model.name, why, 0.0)
    waits = [m.held_until - now for m in others if m.held_until > now and not m.pinned]
    waits += [m.eta_s(now, bytes_per_s) for m in others if m.memory == "loading"]
    if any(m.legs for m in others):
        waits.append(BUSY_S)
    why = f"{model.name} takes {need:.1f} of {have:.1f} GB, and the others are in use"
    return Refuse(model.name, why, max(1.0, min(waits, default=BUSY_S)))
