"""One start of a model's engine: process, staging memory and KV endpoint.

They are made together and thrown away together, so no slot, transfer or connection of a dead engine
can reach the next one. Thin: carries out the transfer effects of legs, decides nothing.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

from pop_node import leg as legs
from pop_node import leg_events as ev
from pop_node.engine import messages as engine
from pop_node.engine.client import EngineClient
from pop_node.engine.config import EngineConfig
from pop_node.kv_stream.endpoint import KvEndpoint
from pop_node.kv_stream.interface import KvEvents
from pop_node.kv_stream.prompt import prompt_digest
from pop_node.kv_stream.spec import KvSpec
from pop_node.kv_stream.staging import Staging, StagingLayout
from wire.address import Dialer, format_address


@dataclass(frozen=True, slots=True)
class HostSettings:
    """What a host needs to know of its node."""

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


class Generation:
    """Engine client, staging memory and KV endpoint of one start."""

    def __init__(self, settings: HostSettings, events: KvEvents) -> None:
        self.settings = settings
        self.client = EngineClient()
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
            events=events,
        )
        self.ready: engine.Ready | None = None
        self.spec: KvSpec | None = None
        self.kv_address = ""

    async def open_doors(self, ready: engine.Ready) -> None:
        """The engine has produced a token: take KV streams from now on."""
        host, port = await self.endpoint.start(self.settings.kv_host, self.settings.kv_port)
        self.spec = KvSpec.from_dict(ready.kv_spec)
        self.kv_address = format_address(host, port)
        self.ready = ready

    async def close(self) -> None:
        """End all transfers and connections and unmap the memory; the engine is gone already."""
        await self.endpoint.close()
        self.staging.close()

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
            case ev.CancelTransfer(code, message):
                endpoint.cancel(transfer, code, message)
            case _:
                assert_never(effect)
