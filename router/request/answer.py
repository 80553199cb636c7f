"""What the client gets of one request: headers once, tokens in order, one ending.

Pure; also writes the times and counts of the answer into the request's record. Which leg may speak
and what its end means is ``router.request.machine``'s.
"""

from __future__ import annotations

from router.api.render import ClientFinish, Usage
from router.request.attempt import Attempt
from router.request.events import (
    Effect,
    EmitError,
    EmitFinish,
    EmitHeaders,
    EmitText,
    RequestSpec,
)
from router.request.record import RequestRecord
from router.request.token_relay import TokenRelay
from wire.errors import MeshError
from wire.messages import Accepted, StepEntry


class Answer:
    """``relay.ids`` are the output tokens so far, ``prompt`` what a first prefill leg counted."""

    def __init__(self, spec: RequestSpec, record: RequestRecord, now: float) -> None:
        self.relay = TokenRelay(spec.relayed)
        self.prompt: Accepted | None = spec.accepted
        self._record = record
        self._started_at = now
        self._headers_sent = False

    def __len__(self) -> int:
        return len(self.relay.ids)

    def add(self, attempt: Attempt, node: str, entry: StepEntry, now: float) -> list[Effect]:
        """New tokens of an open leg; empty while they wait. Raises ``PeerError``, see the relay."""
        ready = self.relay.add(node, entry, may_wait=attempt.prefill_open())
        if not ready:
            return []
        effects: list[Effect] = [
            EmitText(item.text, item.index + len(item.ids)) for item in ready if item.text
        ]
        return effects if self._headers_sent else self._headers(attempt, now) + effects

    def finish(self, attempt: Attempt, reason: ClientFinish, now: float) -> list[Effect]:
        """The answer is complete."""
        prompt = self.prompt
        usage = Usage(0, 0, len(self))
        if prompt is not None:
            usage = Usage(prompt.prompt_tokens, prompt.cached_tokens, len(self))
        self._record.usage = usage
        self.ended(reason, now)
        finish = EmitFinish(reason, usage)
        return [finish] if self._headers_sent else [*self._headers(attempt, None), finish]

    def fail(self, error: MeshError, now: float) -> Effect:
        """The answer ends here for this reason."""
        self.ended(error.code, now)
        return EmitError(error)

    def ended(self, outcome: str, now: float) -> None:
        """Record the end, whatever the client hears of it."""
        self._record.outcome = outcome
        self._record.total_ms = (now - self._started_at) * 1e3

    def _headers(self, attempt: Attempt, now: float | None) -> list[Effect]:
        """Headers go out with the first token, whose time is taken, or with a finish without."""
        self._headers_sent = True
        if now is not None:
            self._record.ttft_ms = (now - self._started_at) * 1e3
        return [EmitHeaders(attempt.route.prefill, attempt.route.decode)]
