"""One transfer as the decode node sees it: what was agreed and what has arrived. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from pop_node.kv_stream.coverage import Coverage, validate_piece
from pop_node.kv_stream.events import Expected
from pop_node.kv_stream.faults import timed_out, violation
from pop_node.kv_stream.frames import CODEC_RAW, Commit, Data, Open
from pop_node.kv_stream.liveness import dial_limit_s, wait_limit_s
from pop_node.kv_stream.spec import Piece
from wire.errors import MeshError, PeerError, TransferError

RESUMABLE = frozenset({"link_lost"})
"""Codes of a connection's end after which its transfers may go on over another one. A peer that
broke the protocol does not get that chance."""

IMPORT_WAIT_S = 30.0
"""Longest import of a piece. Guess: several of the longest engine steps of a slow CPU."""


@dataclass(slots=True)
class Landed:
    """A piece whose bytes come in, or are unpacked: ``nbytes`` bytes of KV so far."""

    piece: Piece
    nbytes: int = 0


@dataclass(slots=True)
class Incoming:
    """State of one expected transfer.

    ``conn`` is where its ``Open`` came from, over link ``link``; None before the first and while it
    is *detached*: its connection broke and the peer may say ``Open`` again. ``have_tokens`` is set
    once blocks are allocated. ``coverage`` holds the verified pieces, which the engine has or is
    importing; ``landing`` those whose bytes come in over this link, by slot. ``granted`` and
    ``received_bytes`` are of this link too.
    """

    expected: Expected
    last_progress: float
    coverage: Coverage = field(init=False)
    conn: int | None = None
    link: int = 0
    codec: str = CODEC_RAW
    rtt_s: float = 0.0
    have_tokens: int | None = None
    granted: bool = False
    grants: int = 0
    landing: dict[int, Landed] = field(default_factory=dict)
    importing: int = 0
    received_bytes: int = 0
    ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self.coverage = Coverage(self.expected.spec)

    def attach(self, conn: int, link: int, codecs: list[str], now: float) -> None:
        """The peer, which has these ``codecs``, opened the transfer here, or took it up again after
        its connection broke.

        What lies behind a hole is forgotten: the peer sends each place from its first missing token
        on. So is a ``Commit``, which the peer will repeat.
        """
        if self.have_tokens is not None:
            self.coverage.trim(self.have_tokens)
        self.landing.clear()
        self.received_bytes, self.ids = 0, None
        self.conn, self.link, self.last_progress = conn, link, now
        self.codec = next(codec for codec in self.expected.codecs if codec in codecs)

    def had_link(self, link: int) -> bool:
        """It was attached to this link or a later one: what is said there is late. That holds while
        it is detached too, because pieces of its last link may still be unpacked."""
        return link <= self.link and (self.conn is not None or self.link > 0)

    def detach(self, now: float, *, is_silent: bool = False) -> None:
        """The connection broke; what is verified stays. A peer that was silent has used up its
        time, but for one dial."""
        self.conn, self.granted, self.last_progress = None, False, now
        if is_silent:
            self.last_progress -= wait_limit_s(self.rtt_s) - dial_limit_s(self.rtt_s)

    def may_resume(self, error: MeshError) -> bool:
        """Can the transfer go on over another link after this end of its connection?"""
        return self.link > 0 and error.code in RESUMABLE

    def arrived(self) -> list[int]:
        """Per place, the tokens at the beginning that are here: what a repeated ``Grant`` says."""
        assert self.have_tokens is not None
        return self.coverage.contiguous(self.have_tokens) if self.grants else []

    @property
    def bytes_seen(self) -> int:
        """Bytes of KV that arrived over this link, those of unfinished pieces too."""
        return self.received_bytes + sum(landed.nbytes for landed in self.landing.values())

    @property
    def most_tokens(self) -> int:
        """Tokens that the engine allocated blocks for: no piece may go beyond."""
        return self.expected.prompt_tokens + self.expected.max_ids - 1

    @property
    def kept_tokens(self) -> int:
        """Tokens at the beginning that are complete in all layers, once the engine has imported
        what it was given. 0 for caches where a beginning alone is of no use."""
        if self.have_tokens is None:
            return 0
        if any(group.kind != "tokens" for group in self.expected.spec.groups):
            return 0
        return min(self.coverage.contiguous(self.have_tokens))

    @property
    def is_idle(self) -> bool:
        """The engine holds blocks for it, and nothing has come over this link."""
        return self.have_tokens is not None and self.ids is None and self.bytes_seen == 0

    @property
    def is_whole(self) -> bool:
        """The ``Commit`` is here, every piece that it needs too, and the engine has them all."""
        if self.ids is None or self.have_tokens is None or self.landing or self.importing:
            return False
        total = self.expected.prompt_tokens + len(self.ids) - 1
        return self.coverage.complete(self.have_tokens, total)

    def deadline(self, rtt_s: float) -> float:
        """The earlier of the request's deadline and the end of the wait for progress."""
        deadline = self.expected.deadline
        if self.importing:
            return min(deadline, self.last_progress + IMPORT_WAIT_S)
        if self.conn is None or self.ids is not None:
            return min(deadline, self.last_progress + wait_limit_s(rtt_s))
        return deadline

    def standstill(self) -> TransferError:
        """What it waited for in vain when its wait for progress ends."""
        what = "the KV transfer stands still"
        if self.conn is None:
            what = "nobody resumed the KV transfer" if self.grants else "no Open came"
        return timed_out(f"{what} ({self.expected.peer})")

    def refuse_open(self, peer: str, message: Open) -> MeshError | None:
        """Why the peer's ``Open`` is not the transfer we were told of; None when it is."""
        e = self.expected
        if peer != e.peer:
            return PeerError(
                f"{peer} opens a transfer that belongs to {e.peer}", code="protocol_error"
            )
        if (message.model, message.identity) != (e.model, e.identity):
            return PeerError(
                f"model {e.model} is {_short(e.identity)} here and "
                f"{message.model} is {_short(message.identity)} at {peer}",
                code="identity_mismatch",
            )
        if message.spec_digest != e.spec.digest():
            return TransferError(
                f"the KV cache of {e.model} is laid out otherwise at {peer}", code="spec_mismatch"
            )
        if (message.prompt_tokens, message.prompt_digest) != (e.prompt_tokens, e.prompt_digest):
            return TransferError(
                f"the prompt is {e.prompt_tokens} tokens here and {message.prompt_tokens} at "
                f"{peer}, or their ids differ",
                code="prompt_mismatch",
            )
        if CODEC_RAW not in message.codecs:
            return PeerError(f"no KV codec in common with {peer}", code="version_mismatch")
        return None

    def refuse_data(self, data: Data, nbytes: int, slot_bytes: int) -> MeshError | None:
        """Why a ``Data`` header is unacceptable; None when its payload may come in."""
        piece = data.piece
        if not self.granted or self.have_tokens is None:
            return violation("Data before the Grant")
        if data.codec not in (CODEC_RAW, self.codec):
            return violation(f"Data in codec {data.codec!r}, which was not granted")
        wrong = validate_piece(self.expected.spec, piece)
        if wrong is not None:
            return violation(f"Data for {wrong}")
        whole = piece.nbytes(self.expected.spec)
        fits = nbytes == whole if data.codec == CODEC_RAW else nbytes < whole
        if not fits or whole > slot_bytes:
            return violation(f"Data with {nbytes} bytes ({data.codec}) for {whole}")
        if piece.token_lo < self.have_tokens or piece.token_hi > self.most_tokens:
            return violation(
                f"Data for tokens [{piece.token_lo}, {piece.token_hi}), wanted are "
                f"[{self.have_tokens}, {self.most_tokens})"
            )
        if self.coverage.overlaps(piece) or any(
            landed.piece.overlaps(piece) for landed in self.landing.values()
        ):
            return violation("Data for tokens that were sent before")
        return None

    def refuse_commit(self, commit: Commit) -> MeshError | None:
        """Why a ``Commit`` is unacceptable; None when it is the one to wait for."""
        if not self.granted or self.ids is not None:
            return violation("a Commit that nobody waits for")
        if len(commit.ids) > self.expected.max_ids:
            return violation(f"a Commit of {len(commit.ids)} ids, at most {self.expected.max_ids}")
        if commit.prompt_digest != self.expected.prompt_digest:
            return TransferError("the Commit is for another prompt", code="prompt_mismatch")
        return None


@dataclass(slots=True)
class ReceiverCounts:
    """Totals since the start; bytes of KV, and of the payloads that carried them."""

    expected: int = 0
    committed: int = 0
    failed: int = 0
    denied: int = 0
    resumed: int = 0
    late_frames: int = 0
    bad_checksums: int = 0
    received_bytes: int = 0
    received_wire_bytes: int = 0
    unpacked_pieces: int = 0


def _short(identity: str) -> str:
    return identity[:12] or "unknown"
