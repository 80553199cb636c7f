"""One transfer, and one link, as the prefill node sees them. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from kernels.codec.layout import FLOAT_TYPES
from pop_node.kv_stream.coverage import Coverage, validate_piece
from pop_node.kv_stream.events import Opened, Staged
from pop_node.kv_stream.frames import CODEC_RAW, Commit, Grant, Open
from pop_node.kv_stream.liveness import dial_limit_s, wait_limit_s
from pop_node.kv_stream.report import TransferMeter
from pop_node.kv_stream.spec import Piece
from wire.errors import MeshError

State = Literal["connecting", "opening", "granted", "committing"]

RESUME_VERSION = 2
"""First version of the KV stream whose decode nodes keep what arrived of a broken transfer."""

RESUMABLE = frozenset({"link_lost", "peer_failed"})
"""Codes of a link's end, or of a vain attempt to make it again, after which its transfers may go on
over another one. A peer that broke the protocol does not get that chance."""

REDIAL_FIRST_S = 0.1
REDIAL_MAX_S = 1.0
"""The first new link is dialled at once: most breaks are a lost connection, not a lost path. Then
the pause doubles. Guesses: five dials within the shortest wait, whatever the path does."""


@dataclass(slots=True)
class Link:
    """What is known of one link; ``slot_bytes`` is 0 until it is up, ``incarnation`` is empty when
    the peer cannot resume transfers.

    ``failures`` counts ends in a row without a byte acknowledged; ``redial_at`` is when the next
    attempt is due for transfers that wait for it; ``is_dialled`` says that one has begun.
    """

    slot_bytes: int = 0
    incarnation: str = ""
    rtt_s: float = 0.0
    last_ack: float = 0.0
    up_since: float = 0.0
    failures: int = 0
    redial_at: float | None = None
    is_dialled: bool = False

    def is_sound(self, now: float) -> bool:
        """It was of use: it carried something, or stood as long as we wait for one."""
        lasted = now - self.up_since >= wait_limit_s(self.rtt_s)
        return self.slot_bytes > 0 and (self.failures == 0 or lasted)

    def successor(self, now: float, *, at_once: bool) -> Link:
        """The link to dial after this one ended, after a pause unless ``at_once``."""
        failures = 0 if self.is_sound(now) else self.failures
        pause_s = min(REDIAL_FIRST_S * 2 ** (failures - 1), REDIAL_MAX_S) if failures else 0.0
        if at_once:
            pause_s = 0.0
        return Link(rtt_s=self.rtt_s, failures=min(failures + 1, 16), redial_at=now + pause_s)


@dataclass(slots=True)
class Outgoing:
    """State of one transfer.

    ``sent_bytes`` and ``acked_bytes`` count from the last ``Grant``; ``sure_bytes`` is what was
    there before it; all three are of KV, however it travels. ``waiting_since`` is the last progress
    before the wait for a link, which lasts until ``dial_until`` at least; ``moved_at`` is the last
    step towards the end, ``incarnation`` the decode node's that was told of the transfer.
    ``is_late``: it came after the dial that it waits for had begun, when perhaps nobody listened
    yet, and is owed one of its own.
    """

    opened: Opened
    waiting_since: float
    dial_until: float = 0.0
    is_late: bool = False
    coverage: Coverage = field(init=False)
    state: State = "connecting"
    incarnation: str = ""
    was_granted: bool = False
    was_committed: bool = False
    resume: int = 0
    codec: str = CODEC_RAW
    credit_bytes: int = 0
    have_tokens: int = 0
    queue: deque[Staged] = field(default_factory=deque)  # bounded by the export slots
    ids: tuple[int, ...] | None = None
    sure_bytes: int = 0
    sent_bytes: int = 0
    acked_bytes: int = 0
    unacked_since: float = 0.0
    moved_at: float = 0.0
    meter: TransferMeter = field(default_factory=TransferMeter)

    def __post_init__(self) -> None:
        self.coverage = Coverage(self.opened.spec)

    def open_frame(self) -> Open:
        """What begins the transfer, or takes it up again."""
        o = self.opened
        return Open(
            o.transfer,
            o.attempt,
            o.model,
            o.identity,
            o.spec.digest(),
            o.prompt_tokens,
            o.prompt_digest,
            list(o.codecs),
            self.was_granted,
        )

    def break_off(self, link: Link, now: float, *, is_silent: bool) -> list[int]:
        """The link is gone; the slots of pieces that did not leave. When the link was of no use,
        the wait for a better one goes on."""
        slots = [staged.slot for staged in self.queue]
        self.queue.clear()
        if self.state != "connecting" and link.is_sound(now):
            self.waiting_since = now - wait_limit_s(link.rtt_s) if is_silent else now
            if self.acked_bytes < self.sent_bytes:
                self.waiting_since = min(self.waiting_since, self._acked_at(link))
            self.dial_until = now + dial_limit_s(link.rtt_s)
        self.state, self.is_late = "connecting", False
        self.credit_bytes = self.sent_bytes = self.acked_bytes = 0
        return slots

    def take_grant(self, grant: Grant) -> str | None:
        """Go on from what the decode node has; what is wrong with its ``Grant``, or None."""
        opened, spec = self.opened, self.opened.spec
        if grant.codec not in opened.codecs or grant.have_tokens > opened.prompt_tokens:
            return "a Grant that does not fit its Open"
        if self.was_granted and grant.have_tokens != self.have_tokens:
            return "a Grant that forgot its cache"
        arrived: Sequence[int] = grant.arrived or [grant.have_tokens] * spec.places
        coverage = self.coverage.beginning(grant.have_tokens, arrived)
        if coverage is None:
            return "a Grant for what was never sent"
        self.coverage = coverage
        self.resume += self.was_granted
        self.was_granted = True
        self.state = "granted"
        self.codec = grant.codec
        self.credit_bytes = grant.credit_bytes
        self.have_tokens = grant.have_tokens
        self.sure_bytes = coverage.nbytes()
        return None

    def refuse_staged(self, event: Staged, slot_bytes: int) -> str | None:
        """Why a staged piece cannot be sent, or None."""
        spec, piece = self.opened.spec, event.piece
        if self.state != "granted":
            return "staged before the Grant or after the Commit"
        wrong = validate_piece(spec, piece)
        if wrong is not None:
            return wrong
        if event.nbytes != piece.nbytes(spec):
            return f"{event.nbytes} bytes staged for a piece of {piece.nbytes(spec)}"
        if piece.token_lo < self.have_tokens:
            return f"token {piece.token_lo} staged; the peer has {self.have_tokens}"
        if self.coverage.overlaps(piece):
            return "staged twice"
        if event.nbytes > slot_bytes:
            return f"a piece of {event.nbytes} bytes does not fit the peer's staging slots"
        return None

    def packs_as(self, piece: Piece) -> str | None:
        """The type of a piece's values, if there is a codec for it that was granted."""
        dtype = self.opened.spec.groups[piece.group].components[piece.component].dtype
        return dtype if self.codec != CODEC_RAW and dtype in FLOAT_TYPES else None

    def commit_frame(self) -> Commit | None:
        """The ``Commit``, once all that it needs has been sent."""
        if self.ids is None or self.queue:
            return None
        opened = self.opened
        total = opened.prompt_tokens + len(self.ids) - 1
        if not self.coverage.complete(self.have_tokens, total):
            return None
        return Commit(opened.transfer, opened.attempt, list(self.ids), opened.prompt_digest)

    def may_resume(self, error: MeshError) -> bool:
        """Can the transfer go on over another link after this end of its link?"""
        return (self.is_late or bool(self.incarnation)) and error.code in RESUMABLE

    def _acked_at(self, link: Link) -> float:
        """The last progress while bytes are on their way. Pieces of other transfers share the link:
        their acknowledgements are progress too."""
        return max(self.unacked_since, link.last_ack)

    def deadline(self, link: Link) -> float:
        """The earlier of the request's deadline and the end of the wait for progress."""
        limit_s = wait_limit_s(link.rtt_s)
        if self.state == "connecting":
            return min(self.opened.deadline, max(self.waiting_since + limit_s, self.dial_until))
        if self.acked_bytes < self.sent_bytes:
            return min(self.opened.deadline, self._acked_at(link) + limit_s)
        if self.ids is not None and self.state != "committing":
            # Computed, so only its blocks are kept from others here: perhaps from the very legs
            # that hold what the decode node waits for. A lease ends such circles.
            return min(self.opened.deadline, self.moved_at + limit_s)
        return self.opened.deadline


@dataclass(slots=True)
class SenderCounts:
    """Totals since the start; bytes of KV, and of the data frames that carried them."""

    opened: int = 0
    resumed: int = 0
    delivered: int = 0
    failed: int = 0
    denied: int = 0
    late_frames: int = 0
    sent_bytes: int = 0
    sent_wire_bytes: int = 0
    packed_pieces: int = 0
    raw_pieces: int = 0
