"""A real sender and a real receiver back to back: all that can happen, until nothing moves."""

from __future__ import annotations

from pop_node.kv_stream import events as ev
from tests.pop_node.kv_stream.kv_content import (
    DEADLINE_S,
)
from tests.pop_node.kv_stream.kv_ends import IMPORT_SLOTS
from tests.pop_node.kv_stream.kv_network import Network


class Pair(Network):
    """Both ends and the network between them."""

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
