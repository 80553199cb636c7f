"""Both machines over a virtual link: the credit window covers bandwidth times round trip."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

import pytest

from pop_node.kv_stream import events as ev
from pop_node.kv_stream.frames import Data
from pop_node.kv_stream.receiver import Receiver
from pop_node.kv_stream.sender import Sender
from pop_node.kv_stream.spec import KvComponent, KvGroup, KvSpec, Piece
from pop_node.kv_stream.staging import StagingLayout

SPEC = KvSpec((KvGroup("tokens", (0,), (KvComponent("k", "float32", (256,)),)),))
T = bytes(16)
CHECKSUM = bytes(8)
LINK = "d"


def transfer_s(layout: StagingLayout, bytes_per_s: float, rtt_s: float, total_bytes: int) -> float:
    """Virtual seconds from ``Grant`` to ``Done`` with engines that cost nothing."""
    chunk = layout.slot_bytes // SPEC.token_bytes
    tokens = total_bytes // layout.slot_bytes * chunk
    sender = Sender()
    receiver = Receiver(layout.export_slots, layout.import_slots, layout.slot_bytes)
    agenda: list[tuple[float, int, Callable[[float], None]]] = []
    order = itertools.count()
    export = list(range(layout.export_slots))
    to_stage = [Piece(0, 0, 0, 1, at, at + chunk) for at in range(0, tokens, chunk)]
    to_stage.reverse()
    link_free = 0.0
    times: dict[str, float] = {}

    def at(when: float, action: Callable[[float], None]) -> None:
        heapq.heappush(agenda, (when, next(order), action))

    def stage(now: float) -> None:
        while export and to_stage:
            p(ev.Staged(T, export.pop(), to_stage.pop(), layout.slot_bytes), now)

    def p(event: ev.SenderEvent, now: float) -> None:
        nonlocal link_free
        for effect in sender.handle(event, now):
            match effect:
                case ev.Tell(_, message):
                    at(now + rtt_s / 2, lambda t, m=message: d(ev.FrameIn(1, "p", m), t))
                case ev.SendPiece(_, _, _, slot, piece, nbytes):
                    begins = max(now, link_free)
                    link_free = begins + nbytes / bytes_per_s
                    at(link_free, lambda t, s=slot: p(ev.Written(s), t))
                    at(link_free + rtt_s / 2, lambda t, b=piece, n=nbytes: arrive(b, n, t))
                case ev.StageFrom():
                    times["grant"] = now
                    at(now, stage)
                case ev.SlotFree(slot):
                    export.append(slot)
                    at(now, stage)
                case ev.Delivered():
                    times["done"] = now
                case ev.Failed(_, error):
                    raise error

    def arrive(b: Piece, nbytes: int, now: float) -> None:
        data = Data(
            T, 1, b.group, b.component, b.layer_lo, b.layer_hi, b.token_lo, b.token_hi,
            "raw", CHECKSUM,
        )  # fmt: skip
        d(ev.DataBegins(1, "p", data, nbytes), now)

    def d(event: ev.ReceiverEvent, now: float) -> None:
        for effect in receiver.handle(event, now):
            match effect:
                case ev.Reply(_, message):
                    at(now + rtt_s / 2, lambda t, m=message: p(ev.FromPeer(LINK, m), t))
                case ev.ReceiveInto(slot):
                    at(now, lambda t, s=slot: d(ev.DataEnded(s, CHECKSUM), t))
                case ev.Import(_, slot):
                    at(now, lambda t, s=slot: d(ev.Imported(s), t))
                case ev.Failed(_, error):
                    raise error

    digest = bytes(16)
    d(ev.Expected(T, 1, "p", "m", "i", SPEC, tokens, digest, 1e9), 0.0)
    d(ev.Allocated(T, 0), 0.0)
    p(ev.Opened(T, 1, "d", LINK, "m", "i", SPEC, tokens, digest, 1e9), 0.0)
    p(ev.LinkUp(LINK, layout.slot_bytes), 0.0)
    p(ev.CommitReady(T, (1,)), 0.0)
    while agenda:
        when, _, action = heapq.heappop(agenda)
        action(when)
        deadline = sender.next_deadline()
        assert deadline is None or when < deadline
    return times["done"] - times["grant"]


@pytest.mark.parametrize("rtt_s", [0.001, 0.02, 0.08, 0.17])
def test_a_gigabit_is_filled_at_any_round_trip(rtt_s: float) -> None:
    total, rate = 128 * 2**20, 125e6
    ideal = total / rate + 2 * rtt_s  # the bytes, then Commit and Done
    assert transfer_s(StagingLayout(), rate, rtt_s, total) < 1.05 * ideal


def test_a_small_window_limits_as_computed() -> None:
    layout = StagingLayout(import_slots=12)
    window = 8 * layout.slot_bytes  # two thirds of the slots for one transfer
    took = transfer_s(layout, 125e6, 0.1, 32 * 2**20)
    assert took == pytest.approx(32 * 2**20 / window * 0.1, rel=0.25)
