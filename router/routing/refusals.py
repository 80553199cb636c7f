"""Why a request gets no route: names that do not exist, pins that cannot be, nodes that are out."""

from __future__ import annotations

from collections.abc import Mapping

from router.routing.view import View
from wire.errors import OverloadError, RequestError
from wire.messages import Role

ROUTE_HEADER = "x-popmesh-route"

MAX_EXCUSES = 8
"""Nodes named in the message of a refusal."""

MAX_EXCUSE = 200
"""Characters of what a node says about itself there."""

REFUSED_S = 5.0
"""When to come back to nodes whose memory is taken by models that answer: an answer of average
length. Guess."""


def known_models(view: View) -> list[str]:
    """Names that the topology lists or a node offers."""
    return sorted(view.topology.models.keys() | view.offered.keys())


def check_model(view: View, model: str) -> None:
    """Raises ``RequestError`` (``model_not_found``) for a name that nobody knows."""
    if model in view.offered or model in view.topology.models:
        return
    known = ", ".join(known_models(view))
    raise RequestError(
        f"the model {model[:80]!r} does not exist; available: {known or 'none'}",
        code="model_not_found",
        param="model",
    )


def check_pin(view: View, role: Role, name: str | None, model: str) -> None:
    """Raises ``RequestError`` (``invalid_value``) for a node that can never have this role."""
    if name is None:
        return
    node = view.topology.nodes.get(name)
    if node is None:
        problem = f"there is no node {name[:80]!r}"
    elif role not in node.roles:
        problem = f"{name} has no {role} role"
    elif model not in node.models:
        problem = f"{name} does not serve {model}"
    else:
        return
    raise RequestError(f"{ROUTE_HEADER}: {problem}", code="invalid_value", param=ROUTE_HEADER)


def no_route(
    model: str, rejected: list[tuple[str, str]], missing: Mapping[str, bool], waits: list[float]
) -> OverloadError:
    """No pair passes the hard rules. Where a model only has to be loaded, the shortest of these
    ``waits`` in seconds says when to come back."""
    roles = " and ".join(role for role, out in missing.items() if out)
    problem = f"no node for {roles}" if roles else "no two nodes that can hand over to each other"
    excuses = "; ".join(f"{name}: {_for_clients(why)}" for name, why in rejected[:MAX_EXCUSES])
    return OverloadError(
        f"{model}: {problem} at the moment" + (f" ({excuses})" if excuses else ""),
        code="no_route",
        retry_after_s=min(waits, default=1.0),
    )


def _for_clients(why: str) -> str:
    """What we say of a node and the node of itself, without what its engine said, behind a second
    colon: that may name what is on its disk."""
    return ": ".join(why.split(": ")[:2])
