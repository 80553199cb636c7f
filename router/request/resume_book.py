"""Streamed answers that a client may ask for again after it lost its connection.

Pure: time is an argument, in seconds of the router's clock. A record is a request, the output
tokens relayed so far, and the text that was sent by token index. It is kept while the answer is
being sent and for ``KEEP_S`` after its connection ended; beyond the bounds the oldest leave first,
ended ones before those still being sent.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain

from router.api.event_id import EventId, TextProof
from router.api.render import ClientFinish, Usage
from router.request.events import RequestSpec
from wire.messages import Accepted

KEEP_S = 30.0
"""Time to come back with ``Last-Event-ID``: many times what a client needs to see that its
connection is dead and to open another."""

MAX_RECORDS = 4096
"""Answers kept by one router: as many again as may be in flight at once."""

MAX_BYTES = 128 * 1024 * 1024
"""Text, tokens and prompts kept by one router: 4096 answers of 2000 tokens to 10 KB prompts."""

REPLAY_BYTES = 64 * 1024
"""Text of one event of a replay, at most, unless one event held more already."""

Key = tuple[str, str]
"""Tenant and request id."""


@dataclass(frozen=True, slots=True)
class Served:
    """Which nodes serve an answer."""

    prefill: str
    decode: str


@dataclass(frozen=True, slots=True)
class Ended:
    """How a complete answer ended."""

    reason: ClientFinish
    usage: Usage


class Resumable:
    """One answer: what its next attempt starts from, and what was sent."""

    def __init__(
        self,
        spec: RequestSpec,
        created_s: int,
        prompt_bytes: int,
        first_index: int = 0,
        begin: TextProof | None = TextProof(),  # noqa: B008  (frozen)
    ) -> None:
        """``first_index``: of the output token with which the text kept here begins; ``begin``:
        what was sent before it, None if that is not known."""
        self.spec = spec
        self.created_s = created_s
        self.served = Served("", "")
        self.ended: Ended | None = None
        self.accepted: Accepted | None = None
        self.expires_at: float | None = None  # None while it is being sent
        self.is_dropped = False
        self._prompt_bytes = prompt_bytes
        self._first_index = first_index
        self._begin = begin
        self._ids = array("I")
        self._text = bytearray()
        self._uptos = array("I")
        self._ends = array("I")  # of the text, after the event with the same place in _uptos

    @property
    def key(self) -> Key:
        """Who may ask for it, and by which name."""
        return self.spec.tenant, self.spec.request_id

    @property
    def num_tokens(self) -> int:
        """Output tokens relayed when it was last at rest."""
        return len(self._ids)

    @property
    def num_bytes(self) -> int:
        """What keeping it costs, roughly."""
        return self._prompt_bytes + len(self._text) + 8 * len(self._uptos) + 4 * len(self._ids)

    @property
    def proof(self) -> TextProof | None:
        """Of all text so far; None if it is not known how it began."""
        return None if self._begin is None else self._begin.after(bytes(self._text))

    def is_behind(self, event: EventId) -> bool:
        """Whether it is a beginning of the text that the client has read, as far as can be told: it
        was being computed again, and has not come so far yet."""
        if self.is_dropped or self.ended is not None or event.proof is None or self._begin is None:
            return False
        return self._begin.num_bytes + len(self._text) < event.proof.num_bytes

    def add(self, escaped: bytes, upto: int) -> None:
        """An event is sent: ``escaped`` is the text up to output token ``upto``."""
        if self.is_dropped:
            return
        text = self._text
        text += escaped
        self._uptos.append(upto)
        self._ends.append(len(text))

    def rest(self, relayed: Iterable[int], accepted: Accepted | None) -> None:
        """So far its exchange has come: a next attempt goes on after these tokens."""
        self._ids = array("I", relayed)
        self.accepted = accepted or self.accepted

    def next_spec(self, deadline: float) -> RequestSpec:
        """How the next attempt starts."""
        return replace(
            self.spec, deadline=deadline, relayed=tuple(self._ids), accepted=self.accepted
        )

    def finish_if_full(self) -> None:
        """All tokens were relayed that the client asked for: only the finish was lost."""
        limit = self.spec.sampling.max_tokens
        if self.ended is None and limit is not None and self.num_tokens >= limit:
            prompt = self.accepted
            counts = (prompt.prompt_tokens, prompt.cached_tokens) if prompt else (0, 0)
            self.ended = Ended("length", Usage(*counts, self.num_tokens))

    def position(self, event: EventId) -> int | None:
        """Where in the text an event with this id ended; None: there was none.

        Its proof decides, if there is one: other events may have ended there. Without it the index
        does; the newest tokens may have made nothing printable yet, they count with the last event.
        """
        if self.is_dropped:
            return None
        if event.proof is not None and self._begin is not None:
            return event.proof.end_in(self._text, self._begin)
        upto = event.upto
        place = bisect_right(self._uptos, upto) - 1
        event_upto = self._first_index if place < 0 else self._uptos[place]
        is_last = place == len(self._uptos) - 1
        if upto != event_upto and not (is_last and event_upto < upto <= self.num_tokens):
            return None
        return 0 if place < 0 else self._ends[place]

    def after(self, event: EventId) -> Iterator[tuple[bytes, int]]:
        """(Escaped text, token count) of the events that follow an id with a ``position``, small
        ones joined."""
        start = self.position(event)
        assert start is not None, "the caller has checked the id"
        text, ends = self._text, self._ends
        while start < len(text):
            first = bisect_right(ends, start)
            place = max(first, bisect_right(ends, start + REPLAY_BYTES) - 1)
            yield bytes(text[start : ends[place]]), self._uptos[place]
            start = ends[place]

    def drop(self) -> None:
        """Give back the memory; it cannot be resumed here any more."""
        self.is_dropped = True
        self._prompt_bytes = 0
        self._text, self._uptos, self._ends = bytearray(), array("I"), array("I")
        self._ids = array("I")


class ResumeBook:
    """Records by tenant and request id."""

    def __init__(self) -> None:
        self._sending: dict[Key, Resumable] = {}  # in the order in which they began
        self._ended: dict[Key, Resumable] = {}  # in the order in which they expire

    def __len__(self) -> int:
        return len(self._sending) + len(self._ended)

    @property
    def num_bytes(self) -> int:
        """Bytes of all records; adds them up."""
        return sum(answer.num_bytes for answer in self._all())

    def get(self, key: Key, now: float) -> Resumable | None:
        """The record, if it is kept and not expired."""
        answer = self._sending.get(key) or self._ended.get(key)
        if answer is None or (answer.expires_at is not None and answer.expires_at <= now):
            return None
        return answer

    def sending(self, answer: Resumable) -> None:
        """An answer begins to be sent, or goes on over a new connection; it takes the place of
        another record with its key."""
        self.forget(answer.key)
        answer.expires_at = None
        self._sending[answer.key] = answer
        while len(self) > MAX_RECORDS:
            self._drop_oldest()

    def released(self, answer: Resumable, now: float) -> None:
        """Its connection has ended, well or not; nothing happens when the record is gone."""
        if self._sending.get(answer.key) is not answer:
            return
        del self._sending[answer.key]
        answer.expires_at = now + KEEP_S
        self._ended[answer.key] = answer

    def forget(self, key: Key) -> None:
        """Another router has the answer now."""
        self._sending.pop(key, None)
        self._ended.pop(key, None)

    def trim(self, now: float) -> None:
        """Forget what has expired, and the oldest beyond the bounds."""
        for key, answer in list(self._ended.items()):
            if answer.expires_at is None or answer.expires_at > now:
                break
            del self._ended[key]
        excess = self.num_bytes - MAX_BYTES
        while excess > 0:
            excess -= self._drop_oldest()

    def _drop_oldest(self) -> int:
        """Returns the bytes that were given back."""
        records = self._ended or self._sending
        answer = records.pop(next(iter(records)))
        num_bytes = answer.num_bytes
        answer.drop()
        return num_bytes

    def _all(self) -> Iterator[Resumable]:
        return chain(self._ended.values(), self._sending.values())
