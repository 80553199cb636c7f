"""Break and heal emulated links while a mesh runs: for drills, tests and curious operators.

Each call rewrites the plan file by one rename and rings its shaper; it returns when the change
holds. Calls of several processes take turns. Blocking (milliseconds): from a coroutine, use
``asyncio.to_thread``.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path

import msgspec

from popmesh.links.doorbell import ring
from popmesh.links.plan import LinkFault, LinkPlan, check_link_plan, read_link_plan, write_json
from wire.errors import ConfigError


def both_ways(
    a: str,
    b: str,
    *,
    down: bool = False,
    bandwidth_mbps: float | None = None,
    rtt_ms: float | None = None,
    jitter_ms: float = 0.0,
    loss: float = 0.0,
) -> tuple[LinkFault, LinkFault]:
    """The same fault in both directions; each takes half of ``rtt_ms`` and all of the jitter."""
    one_way_ms = None if rtt_ms is None else rtt_ms / 2
    there = LinkFault(a, b, down, bandwidth_mbps, one_way_ms, jitter_ms, loss)
    return there, msgspec.structs.replace(there, from_site=b, to_site=a)


def disturb(plan: Path, *faults: LinkFault) -> None:
    """Put ``faults`` in place of whatever was wrong with their directions.

    Raises ``ConfigError`` for an unknown direction or an impossible figure (nothing is changed
    then), ``PeerError`` if no shaper answers.
    """
    ways = {(fault.from_site, fault.to_site) for fault in faults}
    _change(plan, lambda now: _with_faults(now, [*_without(now, ways), *faults]))


def heal(plan: Path, a: str | None = None, b: str | None = None) -> None:
    """Take the faults out: of the link between ``a`` and ``b``, of all links without them.

    What was sent meanwhile on connections that are still open arrives. Raises like ``disturb``.
    """
    if a is None or b is None:
        _change(plan, lambda now: _with_faults(now, []))
        return
    ways = {(a, b), (b, a)}
    _change(plan, lambda now: _with_faults(_known(now, a, b), _without(now, ways)))


def cut(plan: Path, a: str, b: str) -> None:
    """Reset every open connection between ``a`` and ``b``, once. Raises like ``disturb``."""

    def count(now: LinkPlan) -> LinkPlan:
        links = [
            msgspec.structs.replace(link, cuts=link.cuts + 1) if link.pair == {a, b} else link
            for link in _known(now, a, b).links
        ]
        return msgspec.structs.replace(now, links=links)

    _change(plan, count)


def _change(path: Path, change: Callable[[LinkPlan], LinkPlan]) -> None:
    with path.with_name(path.name + ".lock").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        plan = change(read_link_plan(path))
        check_link_plan(plan, str(path))
        write_json(path, plan)
        ring(path)


def _with_faults(plan: LinkPlan, faults: list[LinkFault]) -> LinkPlan:
    return msgspec.structs.replace(plan, faults=faults)


def _without(plan: LinkPlan, ways: set[tuple[str, str]]) -> list[LinkFault]:
    return [fault for fault in plan.faults if (fault.from_site, fault.to_site) not in ways]


def _known(plan: LinkPlan, a: str, b: str) -> LinkPlan:
    if frozenset((a, b)) not in plan.by_pair():
        pairs = ", ".join(sorted(f"{link.a}-{link.b}" for link in plan.links))
        raise ConfigError(f"no link between {a} and {b}", suggestion=f"links: {pairs}")
    return plan
