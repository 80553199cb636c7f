"""An answer that nobody knows any more, computed again for a client that has read its beginning.

The same request with the same seed gives the same text wherever the numerics are the same class.
Whether it did is checked, not believed: the id of the client's last event says how many bytes it
has read and what their checksum is. Up to there nothing is sent, no header either, so that another
text is still a plain ``stream_unknown``. That may take as long as the whole answer did: a client
that loses patience, or whose proxy does, comes back and finds what was computed until then.
"""

from __future__ import annotations

from typing import Literal

from router.api.event_id import HEADER, EventId, TextProof
from router.api.render import ClientFinish, Usage
from router.metrics import Counter
from router.request.exchange import AnswerSink
from router.request.resume_book import Resumable
from wire.errors import MeshError, RequestError


class UnheardSink:
    """Keeps the text from a ``sink`` that its client has read already.

    ``answer`` has what was computed before, gets the rest, and is dropped when it proves to be
    another; ``resumed`` counts that it was found.
    """

    def __init__(
        self, sink: AnswerSink, answer: Resumable, read: TextProof, resumed: Counter
    ) -> None:
        self._sink = sink
        self._answer = answer
        self._read = read
        self._resumed = resumed
        self._so_far = answer.proof or TextProof()
        self._served = ("", "")
        self._state: Literal["unheard", "heard", "another"] = "unheard"

    def headers(self, prefill: str, decode: str) -> None:
        """The answer begins again."""
        self._served = prefill, decode
        self._compare()

    def text(self, escaped: bytes, upto: int) -> None:
        """Hold back what was read, pass on the rest."""
        if self._state == "unheard":
            missing = self._read.num_bytes - self._so_far.num_bytes
            known, escaped = escaped[:missing], escaped[missing:]
            self._so_far = self._so_far.after(known)
            self._answer.add(known, upto)
            self._compare()
        if escaped and self._state == "heard":
            self._sink.text(escaped, upto)

    def finish(self, reason: ClientFinish, usage: Usage) -> None:
        """Complete; too early, if the client had read more."""
        if self._state == "unheard":
            self._differs()
        elif self._state == "heard":
            self._sink.finish(reason, usage)

    def error(self, error: MeshError) -> None:
        """Failed."""
        self._sink.error(error)

    def _compare(self) -> None:
        """Send from now on, if all was computed that the client has read."""
        if self._so_far.num_bytes < self._read.num_bytes:
            return
        if self._so_far != self._read:
            self._differs()
            return
        self._state = "heard"
        self._resumed.add("recomputed")
        self._sink.headers(*self._served)

    def _differs(self) -> None:
        self._state = "another"
        self._answer.drop()
        self._sink.error(_begins_otherwise())


def _begins_otherwise() -> RequestError:
    """The text that was computed again is not the one that the client knows."""
    return RequestError(
        "no such answer is known, and computed again from this body it begins otherwise; send the "
        f"request again without {HEADER}",
        code="stream_unknown",
        param=HEADER,
    )


def can_be_computed(error: RequestError, event: EventId) -> bool:
    """Whether an answer that was not found may be computed again."""
    return error.code == "stream_unknown" and event.proof is not None
