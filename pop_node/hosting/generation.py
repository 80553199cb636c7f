"""One start of a model's engine: process, staging memory and KV endpoint.

They are made together and thrown away together, so no slot, transfer or connection of a dead engine
can reach the next one: what the endpoint says about slots goes to the engine of its own start, dead
or alive. Thin: carries out the transfer effects of legs, decides nothing.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

from pop_node.engine import messages as engine
from pop_node.engine.client import EngineClient
from pop_node.engine.config import EngineConfig
from pop_node.engine.spawn import Launch, launch_engine
from pop_node.kv_stream.endpoint import KvEndpoint
from pop_node.kv_stream.prompt import prompt_digest
from pop_node.kv_stream.spec import KvSpec, Piece
from pop_node.kv_stream.staging import Staging, StagingLayout
from pop_node.legs import events as ev
from pop_node.legs import leg as legs
from wire.address import Dialer, format_address
from wire.errors import MeshError
from wire.messages import TransferReport

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HostSettings:
    """What a host needs to know of its node.

    ``launch`` gets engine processes. ``must_work``: whether a model that cannot take KV streams at
    its first start is the end of the node.
    """

    mesh: str
    node: str
    site: str
    incarnation: str
    model: str
    identity: str
    engine: EngineConfig
    kv_host: str
    kv_port: int
    dialer: Dialer
    server_ssl: ssl.SSLContext | None
    client_ssl: ssl.SSLContext | None
    authorize_peer: Callable[[str, ssl.SSLObject | None], None]
    detection_s: float
    launch: Launch = launch_engine
    must_work: Callable[[], bool] = lambda: True


class Generation:
    """Engine client, staging memory and KV endpoint of one start."""

    def __init__(
        self, settings: HostSettings, on_transfer: Callable[[bytes, ev.Event], None]
    ) -> None:
        """``on_transfer`` hears of the end of every transfer, as an event for its leg.

        Raises ``OSError`` when there is no memory for staging.
        """
        self.settings = settings
        self._on_transfer = on_transfer
        self._doors = asyncio.Lock()  # an engine may die while its doors are being opened
        self._is_closed = False
        self.client = EngineClient(settings.detection_s)
        self.staging = Staging.create(StagingLayout())
        self.endpoint = KvEndpoint(
            name=settings.node,
            site=settings.site,
            mesh=settings.mesh,
            incarnation=settings.incarnation,
            staging=self.staging,
            dialer=settings.dialer,
            server_ssl=settings.server_ssl,
            client_ssl=settings.client_ssl,
            authorize=settings.authorize_peer,
            events=self,
        )
        self.ready: engine.Ready | None = None
        self.spec: KvSpec | None = None
        self.kv_address = ""
        self._is_starving = False

    async def open_doors(self, ready: engine.Ready, kv_port: int) -> int | None:
        """The engine has produced a token: take KV streams from now on, at ``kv_port`` or, if that
        is 0, at any free port.

        Returns the port; None when the generation was closed meanwhile. Raises ``ConfigError`` when
        the port is taken.
        """
        async with self._doors:
            if self._is_closed:
                return None
            host, port = await self.endpoint.start(self.settings.kv_host, kv_port)
            self.spec = KvSpec.from_dict(ready.kv_spec)
            self.kv_address = format_address(host, port)
            self.ready = ready
            return port

    def step_done(self, step: engine.StepDone) -> None:
        """The engine said how things stand: transfers may have to give blocks back."""
        is_starving = step.waiting > 0 and step.running == 0
        if is_starving != self._is_starving:
            self._is_starving = is_starving
            self.endpoint.starving(is_starving)

    def engine_died(self) -> None:
        """Tell the peers of all transfers at once; ``close`` follows."""
        if self.ready is not None:
            self.endpoint.engine_lost(self.settings.model)

    def hung(self) -> None:
        """The engine does not do what it was told in time: end it."""
        log.error("engine of %s does not do what it was told and is ended", self.settings.model)
        self.client.kill()

    def kept_tokens(self, transfer: bytes) -> int:
        """Tokens at the beginning of an incoming transfer, rounded down to full blocks, that are
        complete in the engine's blocks once it has done what it was told so far."""
        if self.ready is None:
            return 0
        return self._full_blocks(self.endpoint.kept_tokens(transfer))

    def _full_blocks(self, tokens: int) -> int:
        block_tokens = self.ready.block_tokens if self.ready is not None else 1
        return tokens // block_tokens * block_tokens

    async def close(self) -> None:
        """End all transfers and connections, unmap the memory, and see the engine's process off,
        which is dead or given up already."""
        async with self._doors:
            if self._is_closed:
                return
            self._is_closed = True
            await self.endpoint.close()
            self.staging.close()
            await self.client.stop(timeout_s=0.0)

    # ---- from the KV endpoint (KvEvents) -------------------------------------------------------

    def on_stage_from(
        self, transfer: bytes, have_tokens: int, arrived: list[int], resume: int
    ) -> None:
        self.client.send(engine.StageFrom(transfer, have_tokens, arrived, resume))

    def on_slot_free(self, slot: int) -> None:
        self.client.send(engine.SlotFree(slot))

    def on_import(self, transfer: bytes, slot: int, piece: Piece) -> None:
        self.client.send(engine.Import(transfer, slot, *piece.numbers))

    def on_committed(self, transfer: bytes, ids: list[int]) -> None:
        self._on_transfer(transfer, ev.TransferCommitted(ids))

    def on_done(self, transfer: bytes, report: TransferReport) -> None:
        self._on_transfer(transfer, ev.TransferDone(report))

    def on_failed(self, transfer: bytes, error: MeshError, kept_tokens: int) -> None:
        self._on_transfer(transfer, ev.TransferFailed(error, self._full_blocks(kept_tokens)))

    def on_broken(self) -> None:
        self.client.give_up("can hand nothing over any more")

    # ---- from legs -----------------------------------------------------------------------------

    def transfer_effect(self, leg: legs.Leg, effect: ev.TransferEffect) -> None:
        """Carry out what a leg wants of its transfer."""
        endpoint, settings, submit = self.endpoint, self.settings, leg.submit
        plan, transfer = submit.transfer, leg.transfer_id
        assert plan is not None, "only split legs have transfers"
        assert self.spec is not None, "legs exist only once the engine is ready"
        match effect:
            case ev.OpenTransfer(ids):
                endpoint.open(
                    transfer,
                    submit.attempt,
                    plan.peer,
                    plan.address,
                    settings.model,
                    settings.identity,
                    self.spec,
                    len(ids),
                    prompt_digest(ids),
                    submit.deadline_remaining_ms / 1000,
                )
            case ev.ExpectTransfer(ids):
                endpoint.expect(
                    transfer,
                    submit.attempt,
                    plan.peer,
                    settings.model,
                    settings.identity,
                    self.spec,
                    len(ids),
                    prompt_digest(ids),
                    submit.deadline_remaining_ms / 1000,
                )
            case ev.GrantTransfer(have_tokens):
                endpoint.allocated(transfer, have_tokens)
            case ev.ComputeStarted():
                endpoint.compute_started(transfer)
            case ev.ComputeEnded():
                endpoint.compute_ended(transfer)
            case ev.CommitTransfer(ids):
                endpoint.commit(transfer, ids)
            case ev.CancelTransfer(code, message, old_transfer):
                endpoint.cancel(old_transfer, code, message)
            case _:
                assert_never(effect)
