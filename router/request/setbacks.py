"""What went wrong with one request so far, and what follows for its next attempt.

Pure: whom to avoid (``router.routing.avoidance``), how long to go on (``patience``), which nodes
kept KV of a hand-over that broke. ``broken`` puts it together for ``router.routing.recovery``.
"""

from __future__ import annotations

from router.request.attempt import Attempt
from router.request.patience import Patience
from router.routing.avoidance import AVOID_ENGINE_S, AVOID_S, Avoidance, NodeStart
from router.routing.recovery import Broken
from wire.errors import MeshError, TransferError, error_from_code
from wire.messages import Detached, Failed, Refused

MAX_PEER_MESSAGE = 500
"""Characters of a peer's error text that are passed on."""


class Setbacks:
    """``last_error`` is what the client hears if nothing else comes of it."""

    def __init__(self) -> None:
        self.last_error: MeshError | None = None
        self._patience = Patience()
        self._avoid = Avoidance()
        self._kept: dict[NodeStart, int] = {}

    def progress(self) -> None:
        """A new token was relayed."""
        self._patience.progress()

    def keep(self, node: NodeStart, tokens: int) -> None:
        """``node`` holds the KV of so many tokens at the beginning of prompt and answer."""
        if tokens > 0:
            self._kept[node] = tokens

    def attempt_failed(
        self, attempt: Attempt, node: str, error: MeshError, pair: bool, relayed: int, now: float
    ) -> float | None:
        """Blame ``node``, or the ``pair``; seconds until the next look for a route, None: give up.

        ``relayed`` counts output tokens so far.
        """
        if pair or isinstance(error, TransferError):  # either end may be at fault
            self._avoid.add_pair(attempt.pair, now + AVOID_S)
        else:
            for_s = AVOID_ENGINE_S if error.code == "engine_died" else AVOID_S
            self._avoid.add_node(attempt.start_of(node), now + for_s)
        fruitful = relayed > attempt.relayed_before
        return self._patience.attempt_failed(error, fruitful, relayed > 0, now)

    def no_route(self, relayed: int, now: float) -> float | None:
        """Seconds until the next look for a route, None: give up."""
        return self._patience.no_route(now, relayed > 0)

    def broken(self, attempt: Attempt | None, relayed: int, now: float) -> Broken:
        """What the next attempt can build on and should avoid."""
        return Broken(
            avoid_nodes=self._avoid.nodes(now),
            avoid_pairs=self._avoid.pairs(now),
            kept=dict(self._kept),
            running=None if attempt is None else attempt.running_prefill(now),
            relayed=relayed,
        )


def told_error(node: str, message: Refused | Failed | Detached, request_id: str) -> MeshError:
    """What ``node`` said went wrong, as an error."""
    retry_after_s = None
    if isinstance(message, Refused):
        retry_after_s = message.retry_after_ms / 1e3 or None
    return error_from_code(
        message.code,
        f"{node}: {message.message[:MAX_PEER_MESSAGE]}",
        retryable=True if isinstance(message, Detached) else message.retryable,
        request_id=request_id,
        retry_after_s=retry_after_s,
    )
