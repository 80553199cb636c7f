"""One transfer as the decode node sees it: what was agreed and what has arrived; and the slots in
use. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from pop_node.kv_stream.coverage import Coverage, validate_piece
from pop_node.kv_stream.events import Expected
from pop_node.kv_stream.faults import violation
from pop_node.kv_stream.frames import CODEC_RAW, Commit, Data, Open
from wire.errors import MeshError, PeerError, TransferError


@dataclass(slots=True)
class Incoming:
    """State of one expected transfer.

    ``conn`` is where its ``Open`` came from, ``have_tokens`` is set once blocks are allocated.
    """

    expected: Expected
    last_progress: float
    coverage: Coverage = field(init=False)
    arrived: Coverage = field(init=False)
    conn: int | None = None
    have_tokens: int | None = None
    granted: bool = False
    receiving: int = 0
    importing: int = 0
    received_bytes: int = 0
    ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self.coverage = Coverage(self.expected.spec)
        self.arrived = Coverage(self.expected.spec)

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
        return min(self.arrived.contiguous(self.have_tokens))

    @property
    def is_whole(self) -> bool:
        """The ``Commit`` is here, every piece that it needs too, and the engine has them all."""
        if self.ids is None or self.have_tokens is None or self.receiving or self.importing:
            return False
        total = self.expected.prompt_tokens + len(self.ids) - 1
        return self.coverage.complete(self.have_tokens, total)

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
        if data.codec != CODEC_RAW:
            return violation(f"Data in codec {data.codec!r}, which was not granted")
        wrong = validate_piece(self.expected.spec, piece)
        if wrong is not None:
            return violation(f"Data for {wrong}")
        if nbytes != piece.nbytes(self.expected.spec) or nbytes > slot_bytes:
            return violation(f"Data with {nbytes} bytes for {piece.nbytes(self.expected.spec)}")
        if piece.token_lo < self.have_tokens or piece.token_hi > self.most_tokens:
            return violation(
                f"Data for tokens [{piece.token_lo}, {piece.token_hi}), wanted are "
                f"[{self.have_tokens}, {self.most_tokens})"
            )
        if self.coverage.overlaps(piece):
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


@dataclass(frozen=True, slots=True)
class Receiving:
    """An import slot that bytes come into from connection ``conn``."""

    data: Data
    nbytes: int
    conn: int


@dataclass(frozen=True, slots=True)
class Importing:
    """An import slot that the engine reads."""

    transfer: bytes
    attempt: int
    model: str


@dataclass(slots=True)
class ReceiverCounts:
    """Totals since the start."""

    expected: int = 0
    committed: int = 0
    failed: int = 0
    denied: int = 0
    late_frames: int = 0
    bad_checksums: int = 0
    received_bytes: int = 0


def _short(identity: str) -> str:
    return identity[:12] or "unknown"
