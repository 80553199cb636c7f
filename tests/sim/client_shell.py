"""A client: asks one router once, keeps what it reads."""

from __future__ import annotations

from typing import Any

from tests.sim.clock import Process, cancel
from tests.sim.links import End, Network
from tests.sim.router_shell import Ask, Said
from tests.sim.schedule import Request

PATIENCE_S = 30.0
"""After its request's deadline a client gives up; by then something is wrong."""


class SimClient:
    """State: "reading", then "finished", "error", "lost" (its router went), "left" or "hung"."""

    def __init__(self, process: Process, network: Network, request: Request, router: str) -> None:
        self.request = request
        self.router = router
        self.state = "reading"
        self.code = ""
        self.reason = ""
        self.text = b""
        self.upto = 0
        self.completion_tokens = 0
        self.ended_at = 0.0
        self.violations: list[str] = []
        self._process = process
        self._network = network
        self._end: End | None = None
        self._timer: Any = None

    def start(self) -> None:
        request = self.request
        self._timer = self._process.call_later(request.timeout_s + PATIENCE_S, self._give_up)
        if request.leaves:
            self._process.call_later(request.leaves_after_s, self._leave)
        self._network.connect(self._process, f"{self.router}:1", self._connected)

    def _connected(self, end: End | None) -> None:
        if self.state != "reading":
            if end is not None:
                end.close()
            return
        if end is None:
            self._over("lost")
            return
        self._end = end
        end.handler = self
        request = self.request
        ask = Ask(
            request.request_id,
            "",
            request.prompt,
            request.sampling,
            request.timeout_s,
            request.pin,
        )
        end.send(ask, 300)

    def on_message(self, message: Said) -> None:
        if self.state != "reading":
            self.violations.append(f"{message} after the end")
        elif message.code:
            self.code = message.code
            self._over("error")
        elif message.reason:
            self.reason = message.reason
            self.completion_tokens = message.completion_tokens
            self._over("finished")
        else:
            if message.upto <= self.upto or not message.text:
                self.violations.append(f"text up to {message.upto} after {self.upto}")
            self.text += message.text
            self.upto = message.upto

    def on_lost(self) -> None:
        if self.state == "reading":
            self._over("lost")

    def _leave(self) -> None:
        if self.state != "reading":
            return
        if self._end is not None:
            if self.request.leaves == "vanish":
                self._end.vanish()
            else:
                self._end.close()
        self._over("left")

    def die(self) -> None:
        """The client's process is killed."""
        self._process.kill()
        if self.state == "reading":
            self.state = "left"

    def _give_up(self) -> None:
        if self.state == "reading":
            self._over("hung")
            if self._end is not None:
                self._end.close()

    def _over(self, state: str) -> None:
        self.state = state
        self.ended_at = self._process.sim.now
        cancel(self._timer)
