"""What a router asks of a node."""

from __future__ import annotations

from wire.messages.base import Leg, WireStruct
from wire.messages.inputs import Input, Sampling

COLD_START = "cold-start"
"""The drill that takes a model down, drops its pages and starts it again; see ``Drill``."""

LOSE_AGENT = "lose-agent"
"""The agent and its engines die as by "kill-agent", and nothing of them comes back for the time of
the drill: what a site that is lost looks like."""

NO_FAULT = "none"
"""Harms nobody: the answer says whether the node takes part in drills."""

DRILL_FAULTS = (
    "kill-agent", "kill-engine", "freeze-agent", "freeze-engine", LOSE_AGENT, NO_FAULT,
)  # fmt: skip
"""What a node can be asked to do to itself, see ``Drill``."""

MAX_AWAY_MS = 3_600_000
"""Longest absence of a drill. Guess: whoever waits longer forgets that it was a drill."""

MAX_COLD_START_MS = 3_600_000
"""Longest cold start that is waited for. Guess: hundreds of gigabytes over a slow line; whoever
needs longer has no use for a rehearsal."""

MAX_FREEZE_MS = 60_000
"""Longest freeze of a drill: far beyond every detection time, and an operator sees its end."""


class Transfer(WireStruct, frozen=True):
    """The KV hand-over of one attempt.

    ``id`` is 16 unguessable bytes. ``peer`` names the node at the other end; ``address`` is where
    the decode node listens for KV streams (``host:port``), empty in the decode leg.
    """

    id: bytes
    peer: str
    address: str


class Submit(WireStruct, frozen=True, tag=16):
    """Start one leg of one attempt of a request.

    ``attempt`` counts one request's tries from 1. ``forced_ids`` are tokens the client has already
    read: they are part of the answer and are never sampled again. ``chain`` is the prefix chain of
    the canonical request (``wire.prefix``), 16 bytes per 256-byte span, for cache digests.
    """

    stream: int
    request_id: str
    attempt: int
    leg: Leg
    model: str
    tenant: str
    input: Input
    sampling: Sampling
    forced_ids: list[int]
    transfer: Transfer | None
    chain: list[bytes]
    deadline_remaining_ms: int


class Cancel(WireStruct, frozen=True, tag=17):
    """Stop a stream and free what it holds; answered by ``Finished(reason="cancelled")``."""

    stream: int


class Retarget(WireStruct, frozen=True, tag=18):
    """Hand the KV of a running prefill leg to another decode node (version 2).

    ``attempt`` and ``transfer`` are those of the new decode leg, which got its ``Submit`` with the
    same stream number; the old transfer is over. A leg that has ended answers nothing: its end is
    on its way.
    """

    stream: int
    attempt: int
    transfer: Transfer


class Attach(WireStruct, frozen=True, tag=19):
    """Take over an answer that another router, or another connection, has lost (version 2).

    The node that knows the newest stream of ``request_id`` of this tenant stops it, if it still
    runs, and answers ``Attached`` under ``stream``, else ``Refused`` with code "stream_unknown".
    ``from_index`` is the number of output tokens whose text the client has read.
    """

    stream: int
    request_id: str
    tenant: str
    from_index: int


class Drill(WireStruct, frozen=True, tag=20):
    """Do this node harm on purpose; answered by ``DrillStarted`` (version 2).

    ``fault`` is one of ``DRILL_FAULTS``; ``model`` names the engine (empty: the only one) and
    ``duration_ms`` is for the freezes and ``LOSE_AGENT``. Nodes not started for drills refuse,
    ``NO_FAULT`` too.

    ``fault`` may also be ``COLD_START`` (version 3), which any node takes: ``DrillReport`` follows
    once the model answers again, within ``duration_ms`` or with an error. ``options`` is JSON; its
    keys are the drill's.
    """

    number: int
    fault: str
    model: str
    duration_ms: int
    options: str = ""


class Warm(WireStruct, frozen=True, tag=21):
    """Have ``model`` in memory for the next ``hold_ms``: fetch and load it if need be (version 3).

    Not answered: ``Load`` says how far it is, ``warm_refused`` there why it cannot be. Said again
    while the demand lasts; when it has ended, the model may make room for others.
    """

    model: str
    hold_ms: int
