"""A client: asks a router, keeps what it reads, and comes back for the rest when it is cut off."""

from __future__ import annotations

from typing import Any

from router.request.resume_book import KEEP_S
from tests.sim.clock import Process, Timer, cancel
from tests.sim.links import Dial, End, Network
from tests.sim.router_clients import Ask, ComeBack, Said
from tests.sim.schedule import Request

PATIENCE_S = 30.0
"""After its request's deadline a client gives up; by then something is wrong."""

COME_BACK_S = 0.3
"""Between two tries to come back, at alternating routers."""

DIAL_TIMEOUT_S = 5.0


class SimClient:
    """State: "reading", then "finished", "error", "lost" (nobody knows its answer any more),
    "left" or "hung"."""

    def __init__(self, process: Process, network: Network, request: Request, routers: int) -> None:
        self.request = request
        self.state = "reading"
        self.code = ""
        self.reason = ""
        self.text = b""
        self.upto = 0
        self.completion_tokens = 0
        self.ended_at = 0.0
        self.cut_at: float | None = None  # when it lost its connection for the first time
        self.resumed = 0
        self.routers_asked: list[str] = []
        self.violations: list[str] = []
        self._process = process
        self._network = network
        self._routers = routers
        self._reader: _Reader | None = None
        self._timer: Any = None

    def start(self) -> None:
        request = self.request
        self._timer = self._process.call_later(request.timeout_s + PATIENCE_S, self._give_up)
        if request.leaves:
            self._process.call_later(request.leaves_after_s, self._leave)
        ask = Ask(
            request.request_id,
            "",
            request.prompt,
            request.sampling,
            request.timeout_s,
            request.pin,
        )
        self._ask(f"r{request.router}", ask)

    def _ask(self, router: str, question: Ask | ComeBack) -> None:
        self.routers_asked.append(router)
        self._reader = _Reader(self, self._process, self._network, router, question)

    # ---- what a connection says ----------------------------------------------------------------

    def heard(self, said: Said) -> None:
        if self.state != "reading":
            self.violations.append(f"{said} after the end")
        elif said.code == "stream_unknown" or (said.code == "taken_over" and self.resumed):
            self._come_back_later()  # its own question to another router may have come late
        elif said.code:
            self.code = said.code
            self._over("error")
        elif said.reason:
            self.reason = said.reason
            self.completion_tokens = said.completion_tokens
            self._over("finished")
        elif said.upto <= self.upto or not said.text:
            self.violations.append(f"text up to {said.upto} after {self.upto}")
        else:
            self.text += said.text
            self.upto = said.upto

    def cut_off(self) -> None:
        """The connection is gone before the end."""
        if self.state != "reading":
            return
        if self.cut_at is None:
            self.cut_at = self._process.sim.now
        if self.upto == 0:  # it knows no id to come back with
            self._over("lost")
        else:
            self._come_back_later()

    def _come_back_later(self) -> None:
        now = self._process.sim.now
        assert self.cut_at is not None
        if now - self.cut_at > KEEP_S:
            self._over("lost")
        else:
            self._reader = None
            self._process.call_later(COME_BACK_S, self._come_back)

    def _come_back(self) -> None:
        if self.state != "reading":
            return
        self.resumed += 1
        request = self.request
        number = (request.router + self.resumed + request.number) % self._routers
        question = ComeBack(request.request_id, "", self.upto, request.timeout_s)
        self._ask(f"r{number}", question)

    # ---- ends ----------------------------------------------------------------------------------

    def _leave(self) -> None:
        if self.state != "reading" or self._reader is None:  # it is cut off already
            return
        leaves, reader = self.request.leaves, self._reader
        reader.abandon(quietly=leaves in ("vanish", "drop_quietly"))
        if leaves in ("drop", "drop_quietly"):
            self.cut_off()
        else:
            self._over("left")

    def die(self) -> None:
        """The client's process is killed."""
        self._process.kill()
        if self.state == "reading":
            self.state = "left"

    def _give_up(self) -> None:
        if self.state == "reading":
            self._over("hung")
            if self._reader is not None:
                self._reader.abandon(quietly=False)

    def _over(self, state: str) -> None:
        self.state = state
        self.ended_at = self._process.sim.now
        cancel(self._timer)


class _Reader:
    """One connection of a client."""

    def __init__(
        self,
        client: SimClient,
        process: Process,
        network: Network,
        router: str,
        question: Ask | ComeBack,
    ) -> None:
        self._client: SimClient | None = client
        self._question = question
        self._end: End | None = None
        self._timer: Timer = process.call_later(DIAL_TIMEOUT_S, self._not_reached)
        self._dial: Dial = network.connect(process, f"{router}:1", self._connected)

    def _connected(self, end: End | None) -> None:
        cancel(self._timer)
        if end is None:
            self.on_lost()
            return
        self._end = end
        end.handler = self
        end.send(self._question, 300)

    def _not_reached(self) -> None:
        self._dial.cancelled = True
        self.on_lost()

    def abandon(self, *, quietly: bool) -> None:
        """Read no more; ``quietly``: the router does not hear of it."""
        self._client = None
        cancel(self._timer)
        self._dial.cancelled = True
        if self._end is not None:
            if quietly:
                self._end.vanish()
            self._end.close()

    def on_message(self, message: Said) -> None:
        if self._client is not None:
            client = self._client
            if message.code or message.reason:
                self._client = None
            client.heard(message)

    def on_lost(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.cut_off()
