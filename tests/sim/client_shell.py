"""A client: asks a router, keeps what it reads, and comes back for the rest when it is cut off."""

from __future__ import annotations

from typing import Any

from router.api.event_id import EventId, TextProof
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

COMING_BACK_S = 120.0
"""So long a client with a proof of what it has read tries to come back: longer than any fault, so
that it must get its answer."""

HURRIES = 8
"""So often an impatient client leaves and comes back before it waits."""

IMPATIENT_S = (0.05, 0.4)
"""Between these it gives a connection to say something: computing an answer again takes from the
one to a multiple of the other."""


class SimClient:
    """State: "reading", then "finished", "error", "lost" (nobody knows its answer any more),
    "left" or "hung".

    ``proves``: it comes back with ids that prove what it has read, other clients with those of an
    earlier release. Some of the former come back impatiently, a few times."""

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
        self.proves = request.number % 4 != 3
        self._hurries = HURRIES if self.proves and request.number % 4 < 2 else 0
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
        self._ask(f"r{request.router}", self._request())

    def _request(self) -> Ask:
        request = self.request
        return Ask(
            request.request_id,
            "",
            request.prompt,
            request.sampling,
            request.timeout_s,
            request.pin,
        )

    def _ask(self, router: str, question: Ask | ComeBack) -> None:
        self.routers_asked.append(router)
        self._reader = _Reader(self, self._process, self._network, router, question)

    # ---- what a connection says ----------------------------------------------------------------

    def heard(self, said: Said, is_text_there: bool) -> None:
        """``is_text_there``: the connection has brought text before."""
        if self.state != "reading":
            self.violations.append(f"{said} after the end")
        elif said.code == "stream_unknown" and self.proves:
            self.violations.append("computed again, its answer begins otherwise")
            self._over("lost")
        elif said.code == "stream_unknown" or (said.code == "taken_over" and self.resumed):
            self._come_back_later()  # its own question to another router may have come late
        elif said.code and said.retryable and self.resumed and self.proves and not is_text_there:
            self._come_back_later()
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
            if self.proves:
                cancel(self._timer)
                wait_s = COMING_BACK_S + self.request.timeout_s + PATIENCE_S
                self._timer = self._process.call_later(wait_s, self._give_up)
        if self.upto == 0:  # it knows no id to come back with
            self._over("lost")
        else:
            self._come_back_later()

    def _come_back_later(self) -> None:
        now = self._process.sim.now
        assert self.cut_at is not None
        if now - self.cut_at > (COMING_BACK_S if self.proves else KEEP_S):
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
        proof = TextProof().after(self.text) if self.proves else None
        event = EventId(request.request_id, self.upto, proof)
        self._ask(f"r{number}", ComeBack(self._request(), event))
        if self._hurries:
            patience_s = self._process.sim.rng.uniform(*IMPATIENT_S)
            self._process.call_later(patience_s, self._lose_patience, self._reader)

    def _lose_patience(self, reader: _Reader) -> None:
        if self.state == "reading" and self._reader is reader and not reader.has_text:
            self._hurries -= 1
            reader.abandon(quietly=self._hurries % 2 == 0)
            self._come_back_later()

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
        self.has_text = False
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
            client.heard(message, self.has_text)
            self.has_text |= bool(message.text)

    def on_lost(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            client.cut_off()
