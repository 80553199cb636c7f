"""Runs a ``Keep``: keeps one registration alive at the registry until it is closed."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Mapping

from registry.client import Registry
from registry.entries import Registration, Status
from registry.keep import (
    Call,
    Close,
    Deregister,
    Done,
    Event,
    Failed,
    Heartbeat,
    Keep,
    Register,
    SetMeta,
    SetStatus,
    Start,
    Tick,
    Unknown,
)
from wire.errors import PeerError

log = logging.getLogger(__name__)

CONFIRM_WITHIN_S = 3.0
"""How long ``set_meta`` waits for the registry. Guess: a drain must not hang on it."""


class Keeper:
    """One registration, kept alive while ``run`` runs. Survives restarts of the registry."""

    def __init__(
        self,
        registry: Registry,
        registration: Registration,
        *,
        status: Status = "passing",
        rng: random.Random | None = None,
    ) -> None:
        self._registry = registry
        self._service_id = registration.service_id
        self._keep = Keep(registration, status=status)
        self._rng = rng or random.Random()
        self._call: Call | None = None
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        self._ended = asyncio.Event()
        self._running = False
        self._failing = False

    async def run(self) -> None:
        """Keep until closed. Cancelling leaves the instance to its TTL."""
        loop = asyncio.get_running_loop()
        self._running = True
        try:
            async with asyncio.TaskGroup() as group:
                calling: asyncio.Task[None] | None = None
                self._feed(Start())
                while not self._keep.ended:
                    if self._call is not None:
                        calling = group.create_task(self._make(self._call))
                        self._call = None
                    deadline = self._keep.next_deadline()
                    timer = None if deadline is None else loop.call_at(deadline, self._wake.set)
                    try:
                        await self._wake.wait()
                    finally:
                        if timer is not None:
                            timer.cancel()
                    self._wake.clear()
                    self._feed(Tick())
                if calling is not None:
                    calling.cancel()
        finally:
            self._ended.set()

    async def set_meta(self, meta: Mapping[str, str]) -> bool:
        """Replace the metadata; True once the registry has it.

        False after ``CONFIRM_WITHIN_S`` seconds without; the keeper goes on trying.
        """
        self._feed(SetMeta(meta))
        try:
            async with asyncio.timeout(CONFIRM_WITHIN_S):
                await self._settled.wait()
        except TimeoutError:
            return False
        return True

    def set_status(self, status: Status, note: str = "") -> None:
        """Report another health from now on."""
        self._feed(SetStatus(status, note))

    async def wait_settled(self) -> None:
        """Wait until the registry has taken everything that is wanted."""
        await self._settled.wait()

    async def close(self) -> None:
        """Deregister, if the registry answers in time, and end ``run``."""
        self._feed(Close())
        if self._running:
            await self._ended.wait()

    def _feed(self, event: Event) -> None:
        """Give the machine an event; ``run`` carries out the call that comes of it."""
        call = self._keep.handle(event, asyncio.get_running_loop().time())
        if call is not None:
            self._call = call
        if self._keep.settled:
            self._settled.set()
        else:
            self._settled.clear()
        if not isinstance(event, Tick):
            self._wake.set()

    async def _make(self, call: Call) -> None:
        try:
            known = await self._send(call)
        except PeerError as exc:
            if not self._failing:
                log.warning("registration of %s: %s", self._service_id, exc)
            self._failing = True
            self._feed(Failed(self._rng.random()))
            return
        if self._failing:
            log.info("registration of %s is in step again", self._service_id)
            self._failing = False
        if known:
            self._feed(Done())
        else:
            log.warning("the registry does not know %s (any more)", self._service_id)
            self._feed(Unknown(self._rng.random()))

    async def _send(self, call: Call) -> bool:
        """Make the call; False when the registry does not know the instance."""
        match call:
            case Register(registration, status):
                await self._registry.register(registration, status)
            case Heartbeat(status, note):
                return await self._registry.heartbeat(self._service_id, status, note)
            case Deregister():
                await self._registry.deregister(self._service_id)
        return True
