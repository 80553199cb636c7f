"""``POST /popmesh/drill``: ask a node to harm itself, or to rehearse a cold start.

Harm is the node's business (``pop_node.drills.drills``): the router passes the question on. A cold
start (``pop_node.drills.cold_start``) is safe on any mesh, since the router sees to it that
somebody else can answer meanwhile, none of those it has asked for another one counted; it is
answered with the node's report, and with when this router would have sent requests there again.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from router.dispatch import Dispatch
from router.links.node_link import NodeLink
from router.links.questions import Answer
from router.routing.costs import Work
from router.routing.policy import RouteRequest, obstacle
from wire.errors import MeshError, PeerError, RequestError
from wire.messages import (
    COLD_START,
    DRILL_FAULTS,
    LOSE_AGENT,
    MAX_AWAY_MS,
    MAX_COLD_START_MS,
    MAX_FREEZE_MS,
    Drill,
    DrillReport,
    DrillStarted,
)

FREEZE_S = 10.0
"""Length of a freeze, or of an absence, that does not say how long."""

COLD_START_S = 600.0
"""Longest cold start that does not say how long it may take; a node waits as long for an engine."""

LOOK_S = 0.005
"""Between two looks at the view: how exactly it is known when the router saw the node ready."""

_ON_DISK = ("warm", "loading", "disk")

SEEN_S = 5.0
"""Longest wait for the view once the node has reported: loads are pushed once a second."""


class DrillBody(msgspec.Struct, forbid_unknown_fields=True):
    """What an operator sends; ``model`` may be left out on nodes with one.

    ``options`` and ``alone`` are for cold starts: how to hold it, see
    ``pop_node.drills.report.Options``, and that it may be held though nobody else could answer.
    """

    node: str
    fault: str
    model: str = ""
    duration_s: float | None = None
    options: dict[str, Any] = {}
    alone: bool = False


def parse_drill(data: bytes) -> DrillBody:
    """Raises ``RequestError``."""
    try:
        body = msgspec.json.decode(data, type=DrillBody)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise RequestError(
            f'{exc}; send {{"node": NAME, "fault": FAULT, "model": NAME, "duration_s": SECONDS}}',
            code="invalid_value",
        ) from exc
    if body.fault not in (*DRILL_FAULTS, COLD_START):
        raise RequestError(
            f"no fault is called {body.fault[:64]!r}; one of "
            f"{', '.join((*DRILL_FAULTS, COLD_START))}",
            code="invalid_value",
            param="fault",
        )
    longest_s = _longest_s(body.fault)
    if body.duration_s is not None and not 0 < body.duration_s <= longest_s:
        raise RequestError(
            f"duration_s of {body.fault} is more than 0 and at most {longest_s:g}, not "
            f"{body.duration_s:g}",
            code="invalid_value",
            param="duration_s",
        )
    return body


def _longest_s(fault: str) -> float:
    if fault == COLD_START:
        return MAX_COLD_START_MS / 1e3
    return (MAX_AWAY_MS if fault == LOSE_AGENT else MAX_FREEZE_MS) / 1e3


async def hold_drill(dispatch: Dispatch, data: bytes) -> dict[str, Any] | None:
    """Returns once the node says that harm begins (None), or how its cold start went.

    Raises ``RequestError`` (``not_found``, ``invalid_value``, ``drill_refused``) or ``PeerError``
    when the node cannot be asked or could not do it.
    """
    body = parse_drill(data)
    nodes = dispatch.builder.snapshot().nodes
    link = dispatch.pool.get(body.node)
    if link is None:
        raise RequestError(
            f"this router is linked to no node called {body.node[:64]!r}; "
            f"known: {', '.join(nodes) or 'none'}",
            code="not_found",
            param="node",
        )
    if body.fault == COLD_START:
        return await _cold_start(dispatch, link, body)
    number = dispatch.next_stream()
    duration_ms = max(1, round((body.duration_s or FREEZE_S) * 1e3))
    answer = await link.ask(number, Drill(number, body.fault, body.model, duration_ms))
    if not isinstance(answer, DrillStarted):
        raise _protocol_error(link, answer)
    if answer.error:
        raise _refused(link, answer.error)
    return None


async def _cold_start(dispatch: Dispatch, link: NodeLink, body: DrillBody) -> dict[str, Any]:
    name, model = link.node.name, _model(dispatch, link.node.name, body.model)
    if name in dispatch.starting_cold:
        raise _refused(link, "is starting cold already")
    if not body.alone:
        _check_others(dispatch, name, model)
    if body.options.get("from") == "peer":
        _check_peers(dispatch, name, model)
    dispatch.starting_cold.add(name)
    try:
        return await _hold_cold_start(dispatch, link, body, model)
    finally:
        dispatch.starting_cold.discard(name)


async def _hold_cold_start(
    dispatch: Dispatch, link: NodeLink, body: DrillBody, model: str
) -> dict[str, Any]:
    name, number = link.node.name, dispatch.next_stream()
    longest_s = body.duration_s or COLD_START_S
    options = msgspec.json.encode(body.options).decode()
    question = Drill(number, COLD_START, model, max(1, round(longest_s * 1e3)), options)
    loop = asyncio.get_running_loop()
    asked_at = loop.time()
    if body.options.get("whole"):
        answer = await _reborn(dispatch, link, question, longest_s)
    else:
        answer = await link.ask(number, question, longest_s + SEEN_S)
    # The report left the node ``said_s`` after the start, half a round trip ago.
    said_at = loop.time() - (link.rtt_ms or 0.0) / 2e3
    if isinstance(answer, DrillStarted):
        raise _refused(link, answer.error)
    if not isinstance(answer, DrillReport):
        raise _protocol_error(link, answer)
    if answer.error:
        raise PeerError(f"{name}: {answer.error[:2000]}", code="drill_failed", retryable=False)
    report, node_said_s = _read_report(link, answer)
    ready_at = await _ready_at(dispatch, name, model)
    offset_s = said_at - node_said_s
    report["seen_ready_s"] = None if ready_at is None else ready_at - offset_s
    report["wall_s"] = loop.time() - asked_at
    return report


class _Said(msgspec.Struct):
    """What the router itself needs of a node's report; the rest is for whoever asked."""

    said_s: float


def _read_report(link: NodeLink, answer: DrillReport) -> tuple[dict[str, Any], float]:
    """A cold start's report and its ``said_s``. Raises ``PeerError`` when it is none."""
    try:
        report = msgspec.json.decode(answer.report, type=dict[str, Any])
        return report, msgspec.convert(report, _Said).said_s
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise _protocol_error(link, answer.report[:500]) from exc


async def _reborn(dispatch: Dispatch, link: NodeLink, question: Drill, longest_s: float) -> Answer:
    """Have the whole node start anew; what its new process says of it.

    Raises ``PeerError`` when it does not come back.
    """
    name, before = link.node.name, link.incarnation
    try:
        async with asyncio.timeout(longest_s):
            try:
                return await link.ask(question.number, question, longest_s)  # why it stays
            except PeerError as exc:
                if exc.code != "link_lost":
                    raise
            while True:
                new = dispatch.pool.get(name)
                if new is not None and new.up and new.incarnation != before:
                    number = dispatch.next_stream()
                    options = msgspec.json.encode({"recall": question.number}).decode()
                    recall = Drill(
                        number, COLD_START, question.model, question.duration_ms, options
                    )
                    return await new.ask(number, recall, longest_s)
                await asyncio.sleep(LOOK_S)
    except TimeoutError as exc:
        raise PeerError(f"{name} did not come back within {longest_s:g} s") from exc


async def _ready_at(dispatch: Dispatch, name: str, model: str) -> float | None:
    """When the view had the node ready again, on the router's clock; None if not within ``SEEN_S``.

    What it said before its report has been heard, so a view that is ready now is no old one.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + SEEN_S
    while not _is_ready(dispatch, name, model):
        if loop.time() >= until:
            return None
        await asyncio.sleep(LOOK_S)
    return loop.time()


def _is_ready(dispatch: Dispatch, name: str, model: str) -> bool:
    """Would this router send a request for the model there now, and get it answered at once?"""
    view = dispatch.builder.snapshot()
    node = view.nodes.get(name)
    engine = None if node is None else node.engines.get(model)
    if node is None or engine is None or not engine.ready:
        return False
    return obstacle(node, RouteRequest(_small(model), view.position()), view) is None


def _small(model: str) -> Work:
    return Work(model, prompt_tokens=1, output_tokens=1, cached={})


def _model(dispatch: Dispatch, name: str, model: str) -> str:
    """The model meant; raises ``RequestError``."""
    node = dispatch.builder.snapshot().nodes.get(name)
    served = list(node.offers) if node is not None else []
    if model in served or (not served and model):
        return model
    if not model and len(served) == 1:
        return served[0]
    raise RequestError(
        f"{name} serves {', '.join(served) or 'nothing now'}; name one of them as model",
        code="invalid_value",
        param="model",
    )


def _check_others(dispatch: Dispatch, name: str, model: str) -> None:
    """Could the rest of the mesh answer, less what starts cold too? Raises ``RequestError`` if
    not. A node that another router takes down counts until its "not ready" is here."""
    view, others = dispatch.builder.snapshot(), dispatch.starting_cold
    request = RouteRequest(_small(model), view.position(), avoid_nodes=frozenset((name, *others)))
    meanwhile = f" while {', '.join(sorted(others))} starts cold" if others else ""
    try:
        dispatch.choose(request)
    except MeshError as exc:
        raise RequestError(
            f"without {name} nobody could answer for {model}{meanwhile}: {exc.message}; say alone "
            "if that does not matter",
            code="drill_refused",
        ) from exc


def _check_peers(dispatch: Dispatch, name: str, model: str) -> None:
    """Has another node the model on its disk? Raises ``RequestError`` if not."""
    nodes = dispatch.builder.snapshot().nodes
    if any(
        other.name != name and model in other.engines and other.engines[model].warmth in _ON_DISK
        for other in nodes.values()
    ):
        return
    raise RequestError(
        f"no other node is known to have {model}, so {name} cannot bring it from a peer",
        code="drill_refused",
    )


def _refused(link: NodeLink, error: str) -> RequestError:
    return RequestError(f"{link.node.name}: {error[:500]}", code="drill_refused")


def _protocol_error(link: NodeLink, answer: object) -> PeerError:
    return PeerError(f"{link.node.name} answers a drill with {answer}", code="protocol_error")
