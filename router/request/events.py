"""What a request machine is told and what it asks for; frozen values without behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from router.api.render import ClientFinish, Usage
from router.routing.policy import Route
from router.routing.recovery import Broken, Recovery
from wire.errors import MeshError
from wire.messages import (
    Accepted,
    Detached,
    Failed,
    Finished,
    Input,
    Loading,
    Refused,
    Retarget,
    Sampling,
    StepEntry,
    Submit,
    Warm,
)

LegMessage = Accepted | Loading | Refused | Finished | Failed | Detached
"""What a node says about one leg, tokens apart."""


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """The request as every attempt submits it. ``deadline`` is on the router's clock, seconds.

    ``relayed`` are output tokens that the client has already, from an answer that is resumed, and
    ``accepted`` is what its first attempt said of the prompt. ``salvage_s`` is how long to wait for
    a decode node's word on what it keeps of a hand-over that its prefill node did not finish; 0:
    not worth waiting for.
    """

    request_id: str
    model: str
    tenant: str
    input: Input
    sampling: Sampling
    chain: list[bytes]
    deadline: float
    relayed: tuple[int, ...] = ()
    salvage_s: float = 0.0
    accepted: Accepted | None = None


# ---- events ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Routed:
    """A route for the next attempt, with what only the shell can mint or look up.

    ``stream`` is fresh, and left unused when ``keeps_prefill``: then the running prefill leg gets
    another decode node and its stream goes on. ``recovery`` says why an attempt after the first
    goes this way.
    """

    route: Route
    stream: int
    transfer_id: bytes
    kv_address: str
    keeps_prefill: bool = False
    recovery: Recovery | None = None


@dataclass(frozen=True, slots=True)
class Unroutable:
    """There is no route for the next attempt. ``final``: waiting for one is not allowed either."""

    error: MeshError
    final: bool = False


@dataclass(frozen=True, slots=True)
class Tokens:
    """New tokens from ``node``."""

    node: str
    entry: StepEntry


@dataclass(frozen=True, slots=True)
class NodeSaid:
    """A control message of one of this request's streams."""

    node: str
    message: LegMessage


@dataclass(frozen=True, slots=True)
class LinkLost:
    """The link to ``node`` is gone, and with it everything that ran there for us."""

    node: str


@dataclass(frozen=True, slots=True)
class ClientGone:
    """Nobody reads the answer here any more; ``outcome`` is the word for it."""

    outcome: Literal["client_gone", "taken_over"] = "client_gone"


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed; sent when ``next_deadline`` is reached."""


Event = Routed | Unroutable | Tokens | NodeSaid | LinkLost | ClientGone | Tick


# ---- effects -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Replan:
    """Find another route; answer with ``Routed`` or ``Unroutable``."""

    broken: Broken


@dataclass(frozen=True, slots=True)
class SendSubmit:
    """Start a leg at ``node``.

    A transfer without an address goes to where its decode node takes KV by now.
    """

    node: str
    message: Submit


@dataclass(frozen=True, slots=True)
class SendRetarget:
    """Give the prefill leg at ``node`` another decode node."""

    node: str
    message: Retarget


@dataclass(frozen=True, slots=True)
class SendWarm:
    """Have ``node`` load the model for a leg that it will get later."""

    node: str
    message: Warm


@dataclass(frozen=True, slots=True)
class SendCancel:
    """Stop a leg at ``node``."""

    node: str
    stream: int


@dataclass(frozen=True, slots=True)
class CloseLeg:
    """The leg of this stream at ``node`` has ended; the stream's other leg goes on."""

    node: str
    stream: int


@dataclass(frozen=True, slots=True)
class CloseStream:
    """No message of this stream matters any more, from whichever node."""

    stream: int


@dataclass(frozen=True, slots=True)
class EmitHeaders:
    """The answer begins; sent once, before any text."""

    prefill: str
    decode: str


@dataclass(frozen=True, slots=True)
class EmitText:
    """JSON-escaped text for the client, never empty, which becomes printable by the output tokens
    before index ``upto``."""

    text: bytes
    upto: int


@dataclass(frozen=True, slots=True)
class EmitFinish:
    """The answer is complete."""

    reason: ClientFinish
    usage: Usage


@dataclass(frozen=True, slots=True)
class EmitError:
    """The request failed; before ``EmitHeaders`` an HTTP status, after it an event in the
    stream."""

    error: MeshError


@dataclass(frozen=True, slots=True)
class Done:
    """Nothing is held any more; the machine ignores everything from now on."""


Effect = (
    Replan
    | SendSubmit
    | SendRetarget
    | SendWarm
    | SendCancel
    | CloseLeg
    | CloseStream
    | EmitHeaders
    | EmitText
    | EmitFinish
    | EmitError
    | Done
)
