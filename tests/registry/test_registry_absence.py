"""A minute without a registry, as nodes and routers live through it.

The real machines of both sides and the real state of the embedded registry, on a virtual clock.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable

import pytest

from registry import keep, watch
from registry import state as registry_state
from registry.client import CALL_TIMEOUT_S
from registry.entries import Registration
from registry.keep import Keep
from registry.watch import Watch

TTL_S = 10.0
"""As nodes register themselves."""


class Mesh:
    """Two nodes and a router at one registry, on a virtual clock. A fake network of no delay: a
    call either arrives at once or, while ``away``, fails after the client's own timeout."""

    def __init__(self, seed: int) -> None:
        self.now = 0.0
        self.rng = random.Random(seed)
        self.away = False
        self.server = registry_state.RegistryState()
        self.watch = Watch()
        self.keeps = {
            name: Keep(Registration(f"n:{name}", "n", "192.0.2.1", 1, {}, TTL_S, 600.0))
            for name in "ab"
        }
        self.calls = 0
        self.views: list[tuple[float, dict[str, str]]] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._waiting: watch.Query | None = None
        for name in self.keeps:
            self.keep_event(name, keep.Start())
        self.watch_event(watch.Start())

    def at(self, when: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), act))

    def run(self, until: float) -> None:
        while True:
            self.server.expire(self.now)
            self._answer_query()
            due = [self._events[0][0]] if self._events else []
            deadlines = [
                self.watch.next_deadline(),
                *(k.next_deadline() for k in self.keeps.values()),
            ]
            if not self.away:
                deadlines.append(self.server.next_deadline())
            wake = min([*due, *(d for d in deadlines if d is not None)], default=until)
            if wake > until:
                self.now = until
                return
            self.now = max(self.now, wake)
            if self._events and self._events[0][0] <= self.now:
                heapq.heappop(self._events)[2]()
                continue
            self.watch_event(watch.Tick())
            for name in self.keeps:
                self.keep_event(name, keep.Tick())

    def keep_event(self, name: str, event: keep.Event) -> None:
        call = self.keeps[name].handle(event, self.now)
        if call is None:
            return
        self.calls += 1
        if self.away:
            fail = keep.Failed(self.rng.random())
            self.at(self.now + CALL_TIMEOUT_S, lambda: self.keep_event(name, fail))
            return
        if isinstance(call, keep.Register):
            known = call.registration
            check = registry_state.TtlCheck(known.ttl_s, call.status, known.deregister_after_s)
            self.server.handle(
                registry_state.RegisterService(
                    known.service_id, known.service, known.address, known.port, known.meta, check
                ),
                self.now,
            )
            answer: keep.Event = keep.Done()
        else:
            assert isinstance(call, keep.Heartbeat)
            update = registry_state.UpdateCheck(f"n:{name}", call.status, call.note)
            refused = self.server.handle(update, self.now)
            answer = keep.Unknown(self.rng.random()) if refused else keep.Done()
        self.at(self.now, lambda: self.keep_event(name, answer))

    def watch_event(self, event: watch.Event) -> None:
        for effect in self.watch.handle(event, self.now):
            match effect:
                case watch.Query():
                    self.calls += 1
                    self._waiting = effect
                    self._asked_at = self.now
                case watch.Publish(snapshot):
                    entries = {entry.service_id: entry.status for entry in snapshot.entries}
                    self.views.append((self.now, entries))
                case watch.Stale():
                    pass

    def _answer_query(self) -> None:
        """A blocking query: answered on news or at its end; without a registry it times out."""
        query = self._waiting
        if query is None:
            return
        end = self._asked_at + query.wait_s + (CALL_TIMEOUT_S if self.away else 0.0)
        snapshot = self.server.service("n")
        if self.away:
            answer: watch.Event = watch.Failed(self.rng.random())
        elif query.index == snapshot.index and self.now < end:
            self.at(end, lambda: None)  # look again then, and at every change before
            return
        else:
            answer = watch.Answered(snapshot)
            end = self.now
        self._waiting = None
        self.at(max(end, self.now), lambda: self.watch_event(answer))


@pytest.mark.parametrize("forgets", [False, True], ids=["frozen", "restarted empty"])
@pytest.mark.parametrize("seed", range(5))
def test_a_minute_without_a_registry(forgets: bool, seed: int) -> None:
    """The router never loses a node, and both are healthy again soon after."""
    mesh = Mesh(seed)
    mesh.run(20.0)
    assert mesh.views[-1][1] == {"n:a": "passing", "n:b": "passing"}
    known, calls = len(mesh.views), mesh.calls
    mesh.away = True
    mesh.run(80.0)
    assert len(mesh.views) == known, "nothing was learnt, nothing was changed"
    assert mesh.calls - calls <= 3 * 60 / 5 + 3, "two nodes and a router that hammer no registry"
    if forgets:
        mesh.server = registry_state.RegistryState()
    mesh.away = False
    mesh.run(80.0 + watch.HOLD_S)
    assert all(view.keys() == {"n:a", "n:b"} for _, view in mesh.views[known:])
    assert mesh.views[-1][1] == {"n:a": "passing", "n:b": "passing"}
    mesh.run(200.0)
    assert mesh.views[-1][1] == {"n:a": "passing", "n:b": "passing"}
