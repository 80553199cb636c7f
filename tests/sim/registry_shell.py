"""The registry of a simulated mesh, and the two shells that speak to it.

The state is the embedded registry's own; a call is one connection that carries one question and one
answer, so a registry that is down, slow or partitioned shows as it would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from registry import keep, watch
from registry.entries import Registration, Snapshot
from registry.state import (
    DeregisterService,
    RegisterService,
    RegistryState,
    TtlCheck,
    UpdateCheck,
)
from tests.sim.clock import Process, cancel
from tests.sim.links import End, Network

ADDRESS = "registry:1"
SERVICE = "popmesh-node"
TTL_S = 10.0
DEREGISTER_AFTER_S = 60.0
CALL_TIMEOUT_S = 5.0


class SimRegistry:
    """One start of the registry; a new one has forgotten everything unless ``state`` is kept."""

    def __init__(self, process: Process, network: Network, state: RegistryState | None) -> None:
        self.process = process
        self.state = state or RegistryState()
        self._waiting: list[tuple[End, int]] = []
        self._expiry: Any = None
        network.listen(ADDRESS, process.host, self)

    def accept(self, end: End) -> None:
        end.handler = _Call(self, end)

    def asked(self, end: End, question: Any) -> None:
        """One question; a query waits until its index is old."""
        now = self.process.time()
        if isinstance(question, watch.Query):
            self._expire()
            snapshot = self.state.service(SERVICE)
            if question.index == 0 or snapshot.index != question.index:
                end.send(snapshot, 1000)
                return
            self._waiting.append((end, question.index))
            self.process.call_later(question.wait_s, self._time_out, end)
            return
        refused = self.state.handle(question, now)
        end.send(refused is None)
        self._changed()

    def _time_out(self, end: End) -> None:
        for at, (waiting, _) in enumerate(self._waiting):
            if waiting is end:
                del self._waiting[at]
                end.send(self.state.service(SERVICE), 1000)
                return

    def _expire(self) -> None:
        self.state.expire(self.process.time())
        self._changed()

    def _changed(self) -> None:
        cancel(self._expiry)
        at = self.state.next_deadline()
        self._expiry = None if at is None else self.process.call_at(at, self._expire)
        if not self._waiting:
            return
        snapshot = self.state.service(SERVICE)
        ready = [end for end, index in self._waiting if index != snapshot.index]
        self._waiting = [w for w in self._waiting if w[1] == snapshot.index]
        for end in ready:
            end.send(snapshot, 1000)


class _Call:
    """The server's end of a call."""

    def __init__(self, registry: SimRegistry, end: End) -> None:
        self._registry = registry
        self._end = end

    def on_message(self, message: Any) -> None:
        self._registry.asked(self._end, message)

    def on_lost(self) -> None:
        """The caller gave up; a later answer finds a closed end."""


class _Question:
    """The client's end of a call: ``done`` gets the answer, or None."""

    def __init__(
        self,
        process: Process,
        network: Network,
        question: Any,
        timeout_s: float,
        done: Callable[[Any], None],
    ) -> None:
        self._question = question
        self._done = done
        self._end: End | None = None
        self._over = False
        self._timer = process.call_later(timeout_s, self.on_lost)
        self._dial = network.connect(process, ADDRESS, self._connected)

    def _connected(self, end: End | None) -> None:
        if end is None:
            self.on_lost()
            return
        self._end = end
        end.handler = self
        end.send(self._question)

    def on_message(self, message: Any) -> None:
        self._finish(message)

    def on_lost(self) -> None:
        self._finish(None)

    def _finish(self, answer: Any) -> None:
        if self._over:
            return
        self._over = True
        cancel(self._timer)
        self._dial.cancelled = True
        if self._end is not None:
            self._end.close()
        self._done(answer)


class SimKeeper:
    """Keeps a node registered (``registry.keeper``)."""

    def __init__(
        self, process: Process, network: Network, name: str, meta: Mapping[str, str]
    ) -> None:
        self._process = process
        self._network = network
        self._service_id = f"sim:{name}"
        self.keep = keep.Keep(
            Registration(self._service_id, SERVICE, name, 1, meta, TTL_S, DEREGISTER_AFTER_S)
        )
        self._timer: Any = None
        self._feed(keep.Start())

    def _feed(self, event: keep.Event) -> None:
        call = self.keep.handle(event, self._process.time())
        if call is not None:
            question = _command(call, self._service_id)
            _Question(self._process, self._network, question, CALL_TIMEOUT_S, self._answered)
        cancel(self._timer)
        at = self.keep.next_deadline()
        self._timer = None if at is None else self._process.call_at(at, self._tick)

    def _tick(self) -> None:
        self._feed(keep.Tick())

    def _answered(self, answer: Any) -> None:
        jitter = self._process.sim.rng.random()
        if answer is None:
            self._feed(keep.Failed(jitter))
        else:
            self._feed(keep.Done() if answer else keep.Unknown(jitter))


def _command(call: keep.Call, service_id: str) -> Any:
    match call:
        case keep.Register(r, status):
            check = TtlCheck(r.ttl_s, status, r.deregister_after_s)
            return RegisterService(r.service_id, r.service, r.address, r.port, r.meta, check)
        case keep.Heartbeat(status, note):
            return UpdateCheck(service_id, status, note)
        case keep.Deregister():
            return DeregisterService(service_id)


class SimWatcher:
    """A router's view of the directory (``registry.watcher``)."""

    def __init__(
        self, process: Process, network: Network, on_change: Callable[[Snapshot], None]
    ) -> None:
        self._process = process
        self._network = network
        self._on_change = on_change
        self.watch = watch.Watch()
        self._timer: Any = None
        self._feed(watch.Start())

    def _feed(self, event: watch.Event) -> None:
        for effect in self.watch.handle(event, self._process.time()):
            match effect:
                case watch.Query(_, wait_s):
                    timeout_s = wait_s * 1.1 + 2.0
                    _Question(self._process, self._network, effect, timeout_s, self._answered)
                case watch.Publish(snapshot):
                    self._on_change(snapshot)
                case watch.Stale():
                    pass
        cancel(self._timer)
        at = self.watch.next_deadline()
        self._timer = None if at is None else self._process.call_at(at, self._tick)

    def _tick(self) -> None:
        self._feed(watch.Tick())

    def _answered(self, answer: Any) -> None:
        if answer is None:
            self._feed(watch.Failed(self._process.sim.rng.random()))
        else:
            self._feed(watch.Answered(answer))
