"""Waiting for a model that a node does not have in memory: for how long, and who is to load it.

What a node says of its models is up to a second old, so an estimate goes on from there: a load that
was under way has come further, and one that this router has caused since has begun. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from router.routing.view import NodeView, Pending
from wire.messages import Warmth

UNKNOWN_LOAD_S = 20.0
"""A load of which the node has no estimate. Source: the budget of a cold start (DESIGN §8)."""

UNKNOWN_FETCH_S = 300.0
"""The same when the model is not on the node's disk yet. Guess: 16 GB at some 400 Mbit/s."""

OVERRUN = 0.1
"""A load that takes longer than estimated is expected to need this share of the estimate more, as
long as the node says no better. Guess."""

SECOND_LOAD = 2.0
"""Where one node loads a model already, a request makes another one load it only if it has to wait
there more than so many times as long: the second copy throws other models out of memory, and the
requests of one burst would all have to make the same guess. Guess."""


CROWD = 128
"""Requests that may wait for one load; more are a reason for a second one. Guess: half of what a
node lets wait for its models, since other routers send theirs as well."""


@dataclass(frozen=True, slots=True)
class LoadWait:
    """``seconds`` until a model is in memory, 0 when it is, and how many requests wait there.
    ``begun``: it is under way."""

    seconds: float
    begun: bool
    detail: str
    waiting: int = 0


IN_MEMORY = LoadWait(0.0, True, "in memory")

_STATES: dict[Warmth, tuple[str, bool, float]] = {
    "loading": ("loading", True, UNKNOWN_LOAD_S),
    "disk": ("on its disk", False, UNKNOWN_LOAD_S),
    "fetching": ("fetching it", True, UNKNOWN_FETCH_S),
    "absent": ("not on its disk", False, UNKNOWN_FETCH_S),
}
"""Words for a state, whether the way into memory has begun, and how long it takes if nobody knows.
A node fetches because of a request, a lease or its plan; what only the plan wants is loaded sooner
when it is asked for, which its next estimate says."""


def is_cold(node: NodeView, model: str) -> bool:
    """The node could answer, but for a model that is not in its memory yet."""
    engine = node.engines.get(model)
    return engine is not None and not engine.ready and engine.warmth in _STATES


def load_wait(node: NodeView, model: str, now: float) -> LoadWait:
    """How long a request that comes to ``node`` now waits for ``model``.

        left = max(OVERRUN * eta, eta - (now - begun at))

    A load that has not begun starts with the request.
    """
    engine = node.engines.get(model)
    if engine is None or engine.ready or engine.warmth not in _STATES:
        return IN_MEMORY
    words, begun, unknown_s = _STATES[engine.warmth]
    eta_s = engine.eta_ms / 1e3 or unknown_s
    pending = node.pending.get(model, Pending())
    since = node.load_at if begun else pending.wanted_at
    left = eta_s if since is None else max(OVERRUN * eta_s, eta_s - max(0.0, now - since))
    if since is not None and not begun:
        words = "asked to load it"
    guess = "" if engine.eta_ms else " (a guess)"
    detail, waiting = f"{words}, {left:.1f} s to go{guess}", engine.waiting + pending.streams
    return LoadWait(left, since is not None, detail, waiting)


def needless_loads(waits: Iterable[tuple[str, LoadWait]]) -> dict[str, str]:
    """Nodes that a request should not make load a model, with why: another has begun to.

    Nodes that have it in memory are no reason: they may be busy, which is a matter of price.
    """
    waits = list(waits)
    soonest = min(
        (
            (wait.seconds, name)
            for name, wait in waits
            if wait.begun and wait.waiting < CROWD and wait is not IN_MEMORY
        ),
        default=None,
    )
    if soonest is None:
        return {}
    left, name = soonest
    return {
        other: f"{name} is loading it already"
        for other, wait in waits
        if not wait.begun and left <= SECOND_LOAD * wait.seconds
    }
