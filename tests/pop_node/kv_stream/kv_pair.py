"""A real sender and a real receiver back to back, with engines and a network made of lists.

The network keeps every frame until the test decides what becomes of it. Misplaced bytes show: see
``kv_content.py``. Its codec is a fake: a block is a number of half the piece's length, and what it
decodes to is looked up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from pop_node.kv_stream import events as ev
from pop_node.kv_stream.frames import CODEC_PACKED, CODEC_RAW, Data, data_checksum
from pop_node.kv_stream.receiver import Receiver
from pop_node.kv_stream.sender import Sender
from pop_node.kv_stream.spec import Piece
from tests.pop_node.kv_stream.kv_content import (
    CHUNK,
    DEADLINE_S,
    SPEC,
    Plan,
    check_cells,
    piece_bytes,
    pieces_after,
    pieces_from,
    scatter,
)
from wire.errors import MeshError, PeerError

SLOT_BYTES = 2 * CHUNK * 8
EXPORT_SLOTS = 3
IMPORT_SLOTS = 4
CONN = 7
LINK = "d 127.0.0.1:1"


@dataclass
class Pair:
    """Both machines, their engines, and what is on its way between them."""

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

    # ---- the network ----

    def write_one(self) -> bool:
        if not self.to_write:
            return False
        s = self.to_write.pop(0)
        payload = self.export[s.slot]
        assert payload is not None, "a slot was freed before it was written"
        p, codec = s.piece, CODEC_RAW
        if s.dtype is not None and p.layer_lo + p.token_lo // CHUNK != 1:  # that one stays raw
            payload, codec = self.pack(payload), CODEC_PACKED
        checksum = data_checksum(s.transfer, s.attempt, p, codec, payload)
        data = Data(
            s.transfer,
            s.attempt,
            p.group,
            p.component,
            p.layer_lo,
            p.layer_hi,
            p.token_lo,
            p.token_hi,
            codec,
            checksum,
        )
        self.up.append((data, payload))
        self.p(ev.Sending(s.transfer, s.nbytes, len(payload) + 60, codec))
        self.p(ev.Written(s.slot))
        return True

    def pack(self, payload: bytes) -> bytes:
        block = len(self.unpacked).to_bytes(len(payload) // 2, "big")
        self.unpacked[block] = payload
        return block

    def deliver_up(self, at: int = 0) -> bool:
        if not self.up:
            return False
        self.arrive(*self.up.pop(at % len(self.up)), self.link)
        return True

    def deliver_stale(self) -> bool:
        """Something that P had sent over a link that it left reaches D after all."""
        if not self.stale:
            return False
        self.arrive(*self.stale.pop(0))
        return True

    def arrive(self, message, payload: bytes, link: int) -> None:
        number = link if self.version > 1 else 0
        conn = CONN + max(link, 1) - 1
        if not isinstance(message, Data):
            self.d(ev.FrameIn(conn, "p", message, number))
            return
        before = set(self.slots)
        self.d(ev.DataBegins(conn, "p", message, len(payload), number))
        for slot in set(self.slots) - before:
            self.arriving.append((slot, message, payload))
            self.arriving_on[slot] = conn

    @property
    def conn(self) -> int:
        """D's number of the connection over which P speaks now."""
        return CONN + max(self.link, 1) - 1

    def connect(self) -> None:
        """P has a new link."""
        self.link_is_up = True
        self.link += 1
        self.p(ev.LinkUp(LINK, SLOT_BYTES, self.version, self.incarnation))

    def finish_one(self, at: int = 0) -> bool:
        """The rest of a payload arrives."""
        if not self.arriving:
            return False
        slot, data, payload = self.arriving.pop(at % len(self.arriving))
        self.slots[slot] = payload
        checksum = data_checksum(data.transfer, data.attempt, data.piece, data.codec, payload)
        self.d(ev.DataEnded(slot, checksum))
        self.drop_unused(slot)
        return True

    def unpack_one(self, at: int = 0) -> bool:
        """A thread is done with a block. Its slot is nobody else's, whatever happened."""
        if not self.to_unpack:
            return False
        item = self.to_unpack.pop(at % len(self.to_unpack))
        block = self.slots[item.slot]
        assert len(block) == item.nbytes
        found = self.unpacked.get(block, b"")
        self.slots[item.slot] = found
        self.d(ev.Unpacked(item.slot, len(found) == item.kv_bytes))
        self.drop_unused(item.slot)
        return True

    def drop_unused(self, slot: int) -> None:
        """A slot that was neither imported nor is unpacked is free."""
        if slot not in {item.slot for item in [*self.to_unpack, *self.to_import]}:
            self.slots.pop(slot, None)

    def deliver_down(self, at: int = 0) -> bool:
        if not self.down:
            return False
        self.p(ev.FromPeer(LINK, self.down.pop(at % len(self.down))))
        return True

    def break_link(self, *, d_notices: bool = True, is_silent: bool = False) -> None:
        """The connections are gone, with everything on them. A D that does not notice may still
        hear what was on its way. ``is_silent``: nothing was heard for as long as one waits."""
        error = PeerError("gone", code="link_lost")
        self.link_is_up = False
        link, up = self.link, self.up[:]
        self.up.clear()
        self.down.clear()
        for item in self.to_write:
            self.p(ev.Written(item.slot))
        self.to_write.clear()
        if d_notices:
            self.lose(self.conn, error, is_silent=is_silent)
        else:
            self.stale += [(*frame, link) for frame in up]
            self.unnoticed.append(self.conn)
        self.p(ev.LinkDown(LINK, error, is_silent))

    def notice(self) -> None:
        """D learns of the end of links that P left long ago; nothing more comes over them."""
        self.stale.clear()
        for conn in self.unnoticed:
            self.lose(conn, PeerError("gone", code="link_lost"))
        self.unnoticed.clear()

    def lose(self, conn: int, error: MeshError, *, is_silent: bool = False) -> None:
        """D hears that a connection is gone, with the payloads under way on it."""
        for item in [item for item in self.arriving if self.arriving_on[item[0]] == conn]:
            self.arriving.remove(item)
            del self.slots[item[0]]
        self.d(ev.ConnLost(conn, error, is_silent))

    # ---- running and checking ----

    def run(self) -> None:
        """Let everything happen until nothing moves."""
        while (
            self.struck()
            or self.stage_one()
            or self.hear_staged()
            or self.write_one()
            or self.deliver_stale()
            or self.deliver_up()
            or self.finish_one()
            or self.unpack_one()
            or self.import_one()
            or self.deliver_down()
        ):
            pass

    def run_moves(self, count: int) -> None:
        """Some of what ``run`` does, but for what D hears of links that P left."""
        for _ in range(count):
            if not (
                self.deliver_up() or self.finish_one(-1) or self.unpack_one() or self.import_one()
            ):
                break

    def rest_until_dialled(self) -> None:
        """Let time pass until links that were lost before they carried anything are made again."""
        for _ in range(20):
            if not len(self.sender):
                break
            self.wait(0.2)
            self.run()

    def struck(self) -> bool:
        """Let the picked fault happen between two events, as in an event loop."""
        due, self.must_strike = self.must_strike, False
        if due:
            self.strike()
        return due

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.p(ev.Tick())
        self.d(ev.Tick())

    def check(self) -> None:
        """Invariants of every moment."""
        pool = self.receiver.pool
        assert pool.free >= 0
        assert pool.free + pool.promised + pool.used == IMPORT_SLOTS
        assert max(self.ended_p.values(), default=0) <= 1
        assert max(self.ended_d.values(), default=0) <= 1

    def check_at_rest(self) -> None:
        """Invariants once every transfer is over."""
        self.run()
        self.wait(10 * DEADLINE_S)
        self.run()
        assert len(self.sender) == len(self.receiver) == self.receiver.parked == 0
        assert self.sender.next_deadline() is None
        assert self.receiver.next_deadline() is None
        assert self.sender.slots_held == 0
        assert set(self.export.values()) == {None}
        assert (self.receiver.pool.free, self.slots) == (IMPORT_SLOTS, {})

    def check_bytes(self, plan: Plan) -> None:
        """What was committed is complete and bit-equal."""
        assert self.committed[plan.transfer] == plan.ids
        check_cells(self.memory[plan.transfer], plan.total)
