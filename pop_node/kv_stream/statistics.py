"""What an endpoint counts."""

from __future__ import annotations

from dataclasses import dataclass

from pop_node.kv_stream.receiver import Receiver
from pop_node.kv_stream.sender import Sender


@dataclass(frozen=True, slots=True)
class KvStatistics:
    """State and totals of one endpoint; ``*_now`` are gauges, the rest counts since the start.

    ``sent_bytes`` and ``received_bytes`` are of KV. What went over the wire for them, packed or
    raw, is ``sent_wire_bytes`` (frames with their headers) and ``received_wire_bytes`` (payloads).
    """

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
    resumed: int
    late_frames: int
    bad_checksums: int
    sent_bytes: int
    sent_wire_bytes: int
    packed_pieces: int
    raw_pieces: int
    received_bytes: int
    received_wire_bytes: int
    unpacked_pieces: int


def statistics(sender: Sender, receiver: Receiver, connections: int) -> KvStatistics:
    """Gauges and totals of both machines at this moment."""
    sent, got, pool = sender.counts, receiver.counts, receiver.pool
    return KvStatistics(
        outgoing_now=len(sender),
        incoming_now=len(receiver),
        parked_now=receiver.parked,
        connections_now=connections,
        export_slots_held_now=sender.slots_held,
        import_slots_free_now=pool.free,
        import_slots_promised_now=pool.promised,
        import_slots_used_now=pool.used,
        delivered=sent.delivered,
        committed=got.committed,
        failed_outgoing=sent.failed,
        failed_incoming=got.failed,
        denied=sent.denied + got.denied,
        resumed=sent.resumed + got.resumed,
        late_frames=sent.late_frames + got.late_frames,
        bad_checksums=got.bad_checksums,
        sent_bytes=sent.sent_bytes,
        sent_wire_bytes=sent.sent_wire_bytes,
        packed_pieces=sent.packed_pieces,
        raw_pieces=sent.raw_pieces,
        received_bytes=got.received_bytes,
        received_wire_bytes=got.received_wire_bytes,
        unpacked_pieces=got.unpacked_pieces,
    )
