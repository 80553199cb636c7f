"""A real sender and a real receiver, with agents and engines made of lists; no network yet.

Misplaced bytes show: see ``kv_content.py``. What invariants hold at every moment is checked here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from pop_node.kv_stream import events as ev
from pop_node.kv_stream.frames import Data
from pop_node.kv_stream.receiver import Receiver
from pop_node.kv_stream.sender import Sender
from pop_node.kv_stream.spec import Piece
from tests.pop_node.kv_stream.kv_content import (
    CHUNK,
    SPEC,
    Plan,
    check_cells,
    piece_bytes,
    pieces_after,
    pieces_from,
    scatter,
)
from wire.errors import MeshError

SLOT_BYTES = 2 * CHUNK * 8
EXPORT_SLOTS = 3
IMPORT_SLOTS = 4
CONN = 7
LINK = "d 127.0.0.1:1"


@dataclass
class Ends:
    """Both machines, their engines, and what has been given to the network between them."""

    now: float = 0.0
    sender: Sender = field(default_factory=Sender)
    receiver: Receiver = field(
        default_factory=lambda: Receiver(EXPORT_SLOTS, IMPORT_SLOTS, SLOT_BYTES)
    )
    plans: dict[bytes, Plan] = field(default_factory=dict)
    up: list = field(default_factory=list)  # (message, payload) P -> D
    down: list = field(default_factory=list)  # messages D -> P
    to_write: list[ev.SendPiece] = field(default_factory=list)
    to_stage: list[tuple[bytes, Piece]] = field(default_factory=list)
    to_import: list[ev.Import] = field(default_factory=list)
    to_unpack: list[ev.Unpack] = field(default_factory=list)
    unpacked: dict[bytes, bytes] = field(default_factory=dict)  # by block
    arriving: list[tuple[int, Data, bytes]] = field(default_factory=list)
    arriving_on: dict[int, int] = field(default_factory=dict)  # slot -> connection
    export: dict[int, bytes | None] = field(
        default_factory=lambda: dict.fromkeys(range(EXPORT_SLOTS))
    )
    slots: dict[int, bytes] = field(default_factory=dict)  # import slots in use
    memory: dict[bytes, dict] = field(default_factory=dict)
    ended_p: Counter = field(default_factory=Counter)
    ended_d: Counter = field(default_factory=Counter)
    committed: dict[bytes, tuple[int, ...]] = field(default_factory=dict)
    reports: dict = field(default_factory=dict)
    errors_p: dict[bytes, MeshError] = field(default_factory=dict)
    errors_d: dict[bytes, MeshError] = field(default_factory=dict)
    staged: list[ev.Staged] = field(default_factory=list)  # engine -> agent, of a slow agent
    is_slow: bool = False
    resumes: dict[bytes, int] = field(default_factory=dict)
    version: int = 2
    incarnation: str = "d1"
    can_dial: bool = True
    dials: list[float] = field(default_factory=list)
    link: int = 0  # number of P's link; its only connection is CONN + link - 1 at D
    stale: list = field(default_factory=list)  # (message, payload, link) of links that P left
    unnoticed: list = field(default_factory=list)  # links whose end D has not noticed
    link_is_up: bool = False
    effects_left: int = -1  # fault sweep: the effect that fails; negative: none
    is_lost: bool = False  # ... by not reaching the peer; otherwise ``strike`` follows it
    strike: Callable[[], None] = lambda: None
    must_strike: bool = False

    # ---- the agents ----

    def open(self, plan: Plan, **changes) -> None:
        self.plans[plan.transfer] = plan
        self.p(replace(plan.opened(LINK), **changes))

    def expect(self, plan: Plan, **changes) -> None:
        self.plans[plan.transfer] = plan
        self.d(replace(plan.expected(), **changes))

    def allocate(self, plan: Plan) -> None:
        cells = self.memory[plan.transfer] = {}
        for p in pieces_from(0, plan.have_tokens):
            scatter(cells, p, piece_bytes(b"kv", p))
        self.d(ev.Allocated(plan.transfer, plan.have_tokens))

    def commit(self, plan: Plan) -> None:
        self.p(ev.ComputeEnded(plan.transfer))
        self.p(ev.CommitReady(plan.transfer, plan.ids))

    # ---- events in, effects out ----

    def p(self, event) -> None:
        for effect in self.sender.handle(event, self.now):
            if not (self.is_fault() and self.is_lost and isinstance(effect, ev.Tell)):
                self.on_p(effect)
        self.check()

    def d(self, event) -> None:
        for effect in self.receiver.handle(event, self.now):
            if not (self.is_fault() and self.is_lost and isinstance(effect, ev.Reply)):
                self.on_d(effect)
        self.check()

    def is_fault(self) -> bool:
        """Count an effect; True for the one that the sweep picked."""
        self.effects_left -= 1
        if self.effects_left == -1:
            self.must_strike = True
            return True
        return False

    def on_p(self, effect) -> None:
        match effect:
            case ev.Connect():
                self.dials.append(self.now)
                if not self.link_is_up and self.can_dial:
                    self.connect()
            case ev.Tell(_, message):
                self.up.append((message, b""))
            case ev.SendPiece():
                self.to_write.append(effect)
            case ev.StageFrom(transfer, have, arrived, resume):
                plan = self.plans[transfer]
                assert resume == self.resumes.get(transfer, -1) + 1
                self.resumes[transfer] = resume
                self.to_stage = [item for item in self.to_stage if item[0] != transfer]
                wanted = pieces_from(have, plan.total)
                if arrived:
                    wanted = pieces_after(arrived, plan.total)
                self.to_stage += [(transfer, p) for p in wanted]
            case ev.SlotFree(slot):
                assert self.export[slot] is not None, "an export slot came back twice"
                self.export[slot] = None
            case ev.Delivered(transfer, report):
                self.ended_p[transfer] += 1
                self.reports[transfer] = report
            case ev.Failed(transfer, error):
                self.ended_p[transfer] += 1
                self.errors_p[transfer] = error

    def on_d(self, effect) -> None:
        match effect:
            case ev.Reply(conn, message):
                left = range(CONN, CONN + self.link - self.link_is_up)  # nobody hears it there
                if conn not in left:
                    self.down.append(message)
            case ev.Unpack():
                self.to_unpack.append(effect)
            case ev.Import():
                self.to_import.append(effect)
            case ev.Committed(transfer, ids):
                self.ended_d[transfer] += 1
                self.committed[transfer] = ids
                self.check_bytes(self.plans[transfer])
            case ev.Failed(transfer, error):
                self.ended_d[transfer] += 1
                self.errors_d[transfer] = error
            case ev.ReceiveInto(slot):
                assert slot not in self.slots, "an import slot was handed out twice"
                assert EXPORT_SLOTS <= slot < EXPORT_SLOTS + IMPORT_SLOTS
                self.slots[slot] = b""

    # ---- the engines ----

    def stage_one(self) -> bool:
        free = [slot for slot, held in self.export.items() if held is None]
        if not self.to_stage or not free:
            return False
        transfer, piece = self.to_stage.pop(0)
        self.export[free[0]] = piece_bytes(b"kv", piece)
        resume = self.resumes[transfer]
        self.staged.append(ev.Staged(transfer, free[0], piece, piece.nbytes(SPEC), resume))
        return self.is_slow or self.hear_staged()

    def hear_staged(self) -> bool:
        """The agent hears of a piece that the engine staged."""
        if not self.staged:
            return False
        self.p(self.staged.pop(0))
        return True

    def import_one(self, at: int = 0) -> bool:
        if not self.to_import:
            return False
        item = self.to_import.pop(at % len(self.to_import))
        cells = self.memory.get(item.transfer)
        if cells is not None:
            scatter(cells, item.piece, self.slots[item.slot])
        del self.slots[item.slot]
        self.d(ev.Imported(item.slot))
        return True

    # ---- the link ----

    @property
    def conn(self) -> int:
        """D's number of the connection over which P speaks now."""
        return CONN + max(self.link, 1) - 1

    def connect(self) -> None:
        """P has a new link."""
        self.link_is_up = True
        self.link += 1
        self.p(ev.LinkUp(LINK, SLOT_BYTES, self.version, self.incarnation))

    # ---- checking ----

    def check(self) -> None:
        """Invariants of every moment."""
        pool = self.receiver.pool
        assert pool.free >= 0
        assert pool.free + pool.promised + pool.used == IMPORT_SLOTS
        assert max(self.ended_p.values(), default=0) <= 1
        assert max(self.ended_d.values(), default=0) <= 1

    def check_bytes(self, plan: Plan) -> None:
        """What was committed is complete and bit-equal."""
        assert self.committed[plan.transfer] == plan.ids
        check_cells(self.memory[plan.transfer], plan.total)
