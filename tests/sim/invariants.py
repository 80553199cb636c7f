"""What must hold at the end of every run, whatever went wrong in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.sim import model as fake
from tests.sim.client_shell import SimClient

if TYPE_CHECKING:
    from tests.sim.node_shell import SimNode
    from tests.sim.router_shell import SimRouter
    from tests.sim.world import World

DETECTION_S = 1.0
"""How long after its deadline a request may end: the router's own timer and the way to the client.
"""

RECOVERY_S = 30.0
"""How long after the last fault healed a request may still take: two silent links, one after the
other, a hand-over that stands still, and the pauses between attempts."""

RETRYABLE = {
    "no_route",
    "overloaded",
    "out_of_blocks",
    "not_ready",
    "draining",
    "peer_failed",
    "link_lost",
    "engine_died",
    "transfer_failed",
    "transfer_timeout",
    "checksum_mismatch",
}
"""Errors that faults may end a request with."""


def outcomes(world: World) -> list[str]:
    """What is wrong with what the clients saw."""
    found: list[str] = []
    for router in world.routers.values():
        found += router.violations
        if world.schedule.undisturbed and not world.harmed:
            found += [
                f"{record.request_id} took {len(record.attempts)} attempts"
                for record in router.records
                if len(record.attempts) > 1
            ]
    for client in world.clients:
        found += [f"{client.request.request_id}: {v}" for v in client.violations]
        found += [f"{client.request.request_id}: {v}" for v in _answer(world, client)]
    return found


def _answer(world: World, client: SimClient) -> list[str]:
    request, found = client.request, []
    sampling = request.sampling
    limit = sampling.max_tokens or 0
    ids = fake.answer(request.prompt, limit, ignore_eos=sampling.ignore_eos)
    text, count, reason = fake.expected_text(ids, sampling.stop, ignore_eos=sampling.ignore_eos)
    expected = text.encode()
    if not expected.startswith(client.text):
        found.append(f"wrong text {client.text!r}, expected {expected!r}")
    match client.state:
        case "finished":
            if client.text != expected:
                found.append(f"text {client.text!r} of {expected!r}")
            if client.completion_tokens != count:
                found.append(f"{client.completion_tokens} tokens counted of {count}")
            if client.reason != reason:
                found.append(f"finish {client.reason}, expected {reason}")
        case "error":
            harmed = bool(world.schedule.faults) or world.harmed
            allowed = set(RETRYABLE) if harmed else set()
            if request.timeout_s < 2.0 or harmed:
                allowed.add("deadline_exceeded")
            if any(fault.kind == "mangle" for fault in world.schedule.faults):
                allowed.add("protocol_error")
            if client.code not in allowed:
                found.append(f"ended in {client.code}")
        case "lost":
            if not _may_be_lost(world, client):
                found.append(f"nobody knows its answer from {client.upto} on")
        case "hung" | "reading":
            found.append(f"{client.state} {request.timeout_s} s")
    stuck = client.ended_at - max(request.at, world.schedule.healed_at)
    # Who is lost has tried to come back for as long as that is promised to work.
    if stuck > RECOVERY_S and request.timeout_s > RECOVERY_S and client.state != "lost":
        found.append(f"ended {stuck:.1f} s after everything was well")
    late = client.ended_at - request.at - request.timeout_s
    frozen = sum(f.duration_s for f in world.schedule.faults if f.kind == "freeze_router")
    # Who comes back gets a new deadline.
    in_one_go = client.state in ("finished", "error") and not client.resumed
    if in_one_go and late > DETECTION_S + frozen:
        found.append(f"ended {late:.1f} s after its deadline")
    return found


def _may_be_lost(world: World, client: SimClient) -> bool:
    """It had no event yet to come back with; or none with a proof, and the router that sent its
    answer was killed: then it is up to the nodes, which may be out of reach."""
    if client.proves:
        return client.upto == 0
    return client.upto == 0 or bool(world.killed_routers & set(client.routers_asked))


# ---- rest --------------------------------------------------------------------------------------


def unrest(world: World) -> list[str]:
    """What is not at rest yet: something held, or a view that is not the truth."""
    found: list[str] = []
    for node in world.nodes.values():
        found += [f"{node.incarnation}: {what}" for what in _node_unrest(node)]
    for router in world.routers.values():
        found += [f"{router.process.name}: {what}" for what in _router_unrest(world, router)]
    return found


def records(world: World) -> list[str]:
    """Answers that somebody may still come back for; all are forgotten after a while."""
    found = [f"{n.incarnation} keeps answers" for n in world.nodes.values() if len(n.desk._book)]
    return found + [
        f"{router.process.name} keeps answers"
        for router in world.routers.values()
        if len(router.resumer.book)
    ]


def _node_unrest(node: SimNode) -> list[str]:
    tables: list[dict[Any, Any]] = [node.legs._by_seq, node.legs._by_stream, node.legs._by_transfer]
    found = [f"{len(table)} legs in a table" for table in tables if table]
    generation = node.generation
    if generation is None or generation.ready is None:
        return [*found, "no engine"]
    held = generation.engine.at_rest()
    if held is not None:
        found.append(f"engine: {held}")
    sender, receiver = generation.endpoint.sender, generation.endpoint.receiver
    pool = receiver.pool
    if len(sender) or sender.slots_held:
        found.append(f"sends {len(sender)} transfers, holds {sender.slots_held} slots")
    if len(receiver) or receiver.parked:
        found.append(f"receives {len(receiver)} transfers, {receiver.parked} parked")
    if pool.used or pool.promised or pool.free != pool.count:
        found.append(f"import slots: {pool.free} free of {pool.count}")
    return found


def _router_unrest(world: World, router: SimRouter) -> list[str]:
    running = len(router.dispatch.running)
    found = [f"{running} requests run"] if running else []
    if router.resumer._senders:
        found.append(f"{len(router.resumer._senders)} answers are being sent")
    if router.builder.reservations():
        found.append(f"{router.builder.reservations()} reservations")
    view = router.watcher.watch.view
    listed = {} if view is None else {e.meta["name"]: e for e in view.entries}
    snapshot = router.builder.snapshot()
    for name, node in world.nodes.items():
        entry, link = listed.get(name), router.links.get(name)
        if entry is None or entry.status != "passing":
            found.append(f"{name} is not listed")
        elif entry.meta["incarnation"] != node.incarnation:
            found.append(f"{name} is listed in another incarnation")
        if link is None or link.hello is None or link.hello.incarnation != node.incarnation:
            found.append(f"no link to {name}")
            continue
        if link.streams:
            found.append(f"streams {list(link.streams)} at {name}")
        engine = snapshot.nodes[name].engines.get("m")
        if engine is None or not engine.ready:
            found.append(f"{name} is not known to be ready")
    return found
