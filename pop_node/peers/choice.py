"""Which bundle to take from whom, and whose turn it is to go to the origin: pure decisions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from pop_node.peers.inventory import Inventory, Stocked
from pop_node.peers.neighbours import Peer
from topology.model import Model, Node

START_S = 2.0
"""How long nodes that the topology says have the model, and that nobody has seen yet, are waited
for before the origin is asked: agents that start together listen within a second of each other."""

TURN_S = 3.0
"""How long the next node of a site waits for the one before it to be seen going to the origin:
longer than it takes until inventories are asked for again."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A bundle of the wanted model; ``holders`` have all or some of it, the quickest first."""

    bundle: str
    holders: tuple[Peer, ...]


def best_offer(
    model: Model,
    peers: Sequence[Peer],
    found: Mapping[str, Inventory],
    begun: Collection[str],
    refused: Collection[str],
) -> Offer | None:
    """The bundle of ``model`` to take; None if nobody has any.

    A pinned model is known by its identity, another one by its name. One that was ``begun`` before
    comes first, then the one that most peers have (for a model that is not pinned: what most agree
    on), then the one with fewer bytes, which is the packed one. ``refused`` bundles turned out to
    be something else. Of the holders, given in order of ``peers``, the quickest complete one comes
    first, lest none is asked.
    """
    complete: dict[str, list[Peer]] = {}
    holders: dict[str, list[Peer]] = {}
    nbytes: dict[str, int] = {}
    for peer in peers:
        for stocked in found[peer.name].bundles if peer.name in found else ():
            if not is_model(model, stocked) or stocked.bundle in refused:
                continue
            holders.setdefault(stocked.bundle, []).append(peer)
            nbytes[stocked.bundle] = stocked.nbytes
            if stocked.arrived == stocked.chunks:
                complete.setdefault(stocked.bundle, []).append(peer)
    if not holders:
        return None
    bundle = min(
        holders,
        key=lambda b: (b not in begun, -len(complete.get(b, ())), -len(holders[b]), nbytes[b], b),
    )
    first = complete.get(bundle, [])[:1]
    rest = [peer for peer in holders[bundle] if peer not in first]
    return Offer(bundle, (*first, *rest))


def is_model(model: Model, stocked: Stocked) -> bool:
    """Whether a bundle is, as far as its giver says, the model that the topology means."""
    if stocked.dtype != model.dtype:
        return False
    if model.digest is not None:
        return stocked.identity == model.digest
    return model.name in stocked.names


def origin_wait_s(
    model: Model,
    node: Node,
    peers: Sequence[Peer],
    found: Mapping[str, Inventory],
    waited_s: float,
    unseen: Collection[str] = (),
) -> float:
    """Seconds to wait for other nodes before going to the origin: for ``unseen`` ones, which should
    have the model and have not been heard of, ``START_S``; for others of the site as follows.

    Nodes that start together go one after the other, in order of their names: each waits ``TURN_S``
    for everybody before it to be seen going, and as long as one of them brings the model from
    there. The first waits as well, for those that it has not seen yet.
    """
    start_s = START_S - waited_s if unseen else 0.0
    wanting = set()
    for peer in peers:
        inventory = found.get(peer.name)
        if inventory is None or peer.site != node.site:
            continue
        if model.name in inventory.bringing:
            return TURN_S
        if model.name in inventory.wanting:
            wanting.add(peer.name)
    if not wanting:
        return max(0.0, start_s)
    turn = 1 + sum(name < node.name for name in wanting)
    return max(0.0, start_s, turn * TURN_S - waited_s)
