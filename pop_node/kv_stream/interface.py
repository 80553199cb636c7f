"""What an endpoint tells the agent, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from pop_node.kv_stream.spec import Piece
from wire.errors import MeshError
from wire.messages import TransferReport


class KvEvents(Protocol):
    """What the agent is told. Called on the event loop; must neither block nor raise.

    Every transfer ends with exactly one of ``on_done`` (prefill side), ``on_committed`` (decode
    side) and ``on_failed`` (either), also after ``cancel``. Calls into the endpoint from here are
    safe.
    """

    def on_stage_from(self, transfer: bytes, have_tokens: int) -> None:
        """Prefill side: granted; stage all tokens but [0, have_tokens)."""

    def on_slot_free(self, slot: int) -> None:
        """Prefill side: the export slot may be overwritten; once for every ``staged``."""

    def on_import(self, transfer: bytes, slot: int, piece: Piece) -> None:
        """Decode side: a verified piece lies in the import slot; ``imported`` answers."""

    def on_committed(self, transfer: bytes, ids: list[int]) -> None:
        """Decode side: everything is imported; decode on after ``ids``."""

    def on_done(self, transfer: bytes, report: TransferReport) -> None:
        """Prefill side: the peer decodes on."""

    def on_failed(self, transfer: bytes, error: MeshError) -> None:
        """Either side: the transfer is over."""


@dataclass(frozen=True, slots=True)
class KvStatistics:
    """State and totals of one endpoint; ``*_now`` are gauges, the rest counts since the start."""

    outgoing_now: int
    incoming_now: int
    parked_now: int
    connections_now: int
    export_slots_held_now: int
    import_slots_free_now: int
    import_slots_promised_now: int
    import_slots_used_now: int
    delivered: int
    committed: int
    failed_outgoing: int
    failed_incoming: int
    denied: int
    late_frames: int
    bad_checksums: int
    sent_bytes: int
    received_bytes: int
