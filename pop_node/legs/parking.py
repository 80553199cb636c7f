"""Submits that wait until their model is in memory.

A thin shell: keeps them with their deadlines, tells routers how long it may take, and lets go of
them when the model is ready, refused, or nobody wants the answer any more. Each ends exactly once
here: taken over by the model's legs, or with one word to its router.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from pop_node.legs.admission import problem_with, problem_with_transfer
from pop_node.legs.refusal import refusal
from pop_node.router_link import RouterLink
from wire.errors import MeshError, OverloadError, PeerError
from wire.messages import Failed, Finished, Loading, Retarget, Submit

PARKING_VERSION = 3
"""First version of the mesh wire that knows ``Loading``."""

MAX_PARKED = 256
"""On a node, whatever the model. Guess: what an engine lets wait (``DEFAULT_MAX_WAITING``)."""

RETELL_S = 1.0
CHANGED_SHARE = 0.25
"""How often estimates are looked at again, and how far one must be off to be worth a message.
Guesses: routers act on seconds."""


@dataclass(slots=True)
class Parked:
    """A submit that waits; ``until`` and ``ready_at`` are moments of the loop's clock: its
    deadline, and what its router was told."""

    link: RouterLink
    submit: Submit
    until: float
    ready_at: float
    timer: asyncio.TimerHandle


class Parking:
    """All submits of a node that wait; ``eta_s`` says how long for a model."""

    def __init__(self, eta_s: Callable[[str], float]) -> None:
        self._eta_s = eta_s
        self._parked: dict[tuple[RouterLink, int], Parked] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._parked)

    def waiting_for(self, model: str) -> int:
        """How many wait for this model."""
        return sum(parked.submit.model == model for parked in self._parked.values())

    def problem(self, link: RouterLink, submit: Submit) -> MeshError | None:
        """Why a submit cannot wait here; None when it can."""
        if (link, submit.stream) in self._parked:
            return PeerError("stream number used twice", code="protocol_error", retryable=False)
        if len(self._parked) >= MAX_PARKED:
            return OverloadError("too many requests wait for models here", retry_after_s=1.0)
        return problem_with(submit)

    def add(self, link: RouterLink, submit: Submit) -> None:
        """Let one wait, and say so."""
        loop = asyncio.get_running_loop()
        now, key, eta_s = loop.time(), (link, submit.stream), self._eta_s(submit.model)
        until = now + max(0.0, submit.deadline_remaining_ms / 1000)
        timer = loop.call_at(until, self._deadline_passed, key)
        self._parked[key] = Parked(link, submit, until, now + eta_s, timer)
        link.say(Loading(submit.stream, round(eta_s * 1000)))
        if self._timer is None:
            self._timer = loop.call_later(RETELL_S, self._retell)

    def take(self, model: str) -> list[tuple[RouterLink, Submit]]:
        """Let go of all that wait for a model, oldest first, with the time that they have left."""
        now, taken = asyncio.get_running_loop().time(), []
        for parked in self._leaving(model):
            left_ms = max(0, round((parked.until - now) * 1000))
            submit = msgspec.structs.replace(parked.submit, deadline_remaining_ms=left_ms)
            taken.append((parked.link, submit))
        return taken

    def refuse(self, model: str, error: MeshError) -> None:
        """Nobody waits for this model any more."""
        for parked in self._leaving(model):
            parked.link.say(refusal(parked.submit.stream, error))

    def refuse_all(self, error: MeshError) -> None:
        """Nobody waits any more."""
        for model in {parked.submit.model for parked in self._parked.values()}:
            self.refuse(model, error)

    # ---- from routers --------------------------------------------------------------------------

    def cancel(self, link: RouterLink, stream: int) -> bool:
        """The router wants no more of a stream; False when it does not wait here."""
        parked = self._forget((link, stream))
        if parked is None:
            return False
        read = len(parked.submit.forced_ids)
        link.say(Finished(stream, "cancelled", read, 0.0, 0.0, None))
        return True

    def retarget(self, link: RouterLink, message: Retarget) -> bool:
        """The KV of a prefill leg goes elsewhere; False when it does not wait here."""
        parked = self._parked.get((link, message.stream))
        if parked is None or parked.submit.leg != "prefill":
            return False
        error = problem_with_transfer(message.transfer)
        if error is not None:
            self._forget((link, message.stream))
            link.say(Failed(message.stream, error.code, error.message, error.retryable))
            return True
        parked.submit = msgspec.structs.replace(
            parked.submit, attempt=message.attempt, transfer=message.transfer
        )
        return True

    def router_left(self, link: RouterLink) -> None:
        """A router's connection is gone: nobody reads its streams any more."""
        for owner, stream in list(self._parked):
            if owner is link:
                self._forget((owner, stream))

    # ---- inside --------------------------------------------------------------------------------

    def _leaving(self, model: str) -> list[Parked]:
        keys = [key for key, parked in self._parked.items() if parked.submit.model == model]
        return [parked for key in keys if (parked := self._forget(key)) is not None]

    def _forget(self, key: tuple[RouterLink, int]) -> Parked | None:
        parked = self._parked.pop(key, None)
        if parked is not None:
            parked.timer.cancel()
        if not self._parked and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        return parked

    def _deadline_passed(self, key: tuple[RouterLink, int]) -> None:
        if self._forget(key) is not None:
            message = "the request's deadline passed while its model was loaded"
            key[0].say(Failed(key[1], "deadline_exceeded", message, retryable=False))

    def _retell(self) -> None:
        """Estimates change; whoever was told something else hears of it."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._timer = loop.call_later(RETELL_S, self._retell)
        for parked in self._parked.values():
            eta_s = self._eta_s(parked.submit.model)
            told_s = max(0.0, parked.ready_at - now)
            if abs(eta_s - told_s) > CHANGED_SHARE * max(eta_s, told_s, RETELL_S):
                parked.ready_at = now + eta_s
                parked.link.say(Loading(parked.submit.stream, round(eta_s * 1000)))
