"""What happened to a request, kept for ``/popmesh/requests/{id}``.

Plain data filled in by the request machine; the log bounds how many are kept.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from router.api.render import Usage
from router.routing.policy import Route
from router.routing.recovery import Recovery
from wire.messages import Finished, TransferReport

MAX_RECORDS = 1024
"""Finished and running requests remembered per router; some 2 KB each."""

MAX_ATTEMPTS_KEPT = 32
"""Attempts remembered per request, the newest; a long answer in a bad hour may take more."""


@dataclass(frozen=True, slots=True)
class LoadWaited:
    """A leg that came before its model was in memory: the node's newest estimate, from when it was
    said, and how long the wait was; None: it has not ended well."""

    eta_ms: int
    waited_ms: float | None


@dataclass(slots=True)
class AttemptRecord:
    """One try; ``forced_tokens`` were already relayed when it began, ``outcome`` is a word or code.

    ``recovery`` says how it takes over from the one before it, and at what price; ``loads`` has the
    nodes that had to load the model first.
    """

    number: int
    route: Route
    forced_tokens: int
    recovery: Recovery | None = None
    outcome: str = "running"
    message: str = ""
    loads: dict[str, LoadWaited] = field(default_factory=dict)


@dataclass(slots=True)
class RequestRecord:
    """One request. Times are milliseconds since the request was read; None: did not happen.

    ``client_source`` says how the client was placed (``ClientPlace.source``), ``resumed_from`` how
    many output tokens it had read when it came back for the rest.
    """

    request_id: str
    model: str
    tenant: str
    client_source: str
    attempts: list[AttemptRecord] = field(default_factory=list)
    attempts_forgotten: int = 0
    usage: Usage | None = None
    outcome: str = "running"
    ttft_ms: float | None = None
    total_ms: float | None = None
    node_queue_ms: float | None = None
    node_prefill_ms: float | None = None
    transfer: TransferReport | None = None
    stale_messages: int = 0
    resumed_from: int | None = None

    def leg_finished(self, message: Finished) -> None:
        """The leg that computed the prompt has ended well."""
        self.node_queue_ms = message.queue_ms
        self.node_prefill_ms = message.prefill_ms
        self.transfer = message.transfer

    def begin(self, attempt: AttemptRecord) -> None:
        """Add an attempt, forgetting the oldest beyond the bound."""
        self.attempts.append(attempt)
        if len(self.attempts) > MAX_ATTEMPTS_KEPT:
            del self.attempts[0]
            self.attempts_forgotten += 1


class RequestLog:
    """The newest ``MAX_RECORDS`` records by request id."""

    def __init__(self) -> None:
        self._records: OrderedDict[str, RequestRecord] = OrderedDict()

    def add(self, record: RequestRecord) -> None:
        """Remember a record, forgetting the oldest beyond the bound."""
        self._records[record.request_id] = record
        while len(self._records) > MAX_RECORDS:
            self._records.popitem(last=False)

    def get(self, request_id: str) -> RequestRecord | None:
        """The record, if it is still remembered."""
        return self._records.get(request_id)
